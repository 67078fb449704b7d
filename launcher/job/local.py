"""A run on a Ray of its own, on this machine: started for the run, stopped with it.

Ray Core rather than Ray Train: a placement group waits for what the run needs as long as we say, the
driver hears of each failure at once, and events do not pass through a controller that polls every two
seconds (../shared/FACTS.md). The side that trains is named here by its import path only.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.errors import ClusterError, Interrupted, LauncherError, Stopped, TrainingError
from launcher.job.worker import Worker, worker_options
from launcher.plan import PLAN_FILE, Plan
from launcher.run import Event, RunFolder, write_status

AGAIN = "the same command goes on from the newest checkpoint; where there is none it starts over"
START_TIMEOUT_S = 120.0
POLL_S = 0.25
FELLOW_ERRORS_S = 3.0
"""After the first rank fails, how long the others may still say why: the cause often speaks second."""


def run_job(plan: Plan, show: Callable[[Event], None]) -> None:
    """Run a plan to its end, giving each event to `show`. Raises LauncherError; leaves no process behind."""
    folder = RunFolder(Path(plan.run_dir))
    write_status(folder, "running", pid=os.getpid(), host=platform.node())
    try:
        with _own_ray(plan) as ray, _noting_signals() as stop_asked:
            show({"event": "phase", "name": "starting workers"})
            _drive(ray, plan, show, stop_asked)
    except KeyboardInterrupt:
        write_status(folder, "stopped", message="interrupted")
        raise Interrupted("interrupted", AGAIN) from None
    except (Interrupted, Stopped) as error:
        write_status(folder, "stopped", message=error.message)
        raise
    except LauncherError as error:
        write_status(folder, "failed", error=type(error).__name__, message=error.message, remedy=error.remedy, exit_code=error.exit_code)
        raise
    except BaseException as error:
        write_status(folder, "failed", error=type(error).__name__, message=str(error), remedy="", exit_code=1)
        raise
    write_status(folder, "finished")


@contextmanager
def _own_ray(plan: Plan) -> Iterator[Any]:
    """A Ray that listens on loopback only, with its files in a folder of its own, gone afterwards."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray's sockets live there, and a socket's path has at most 107 characters.
    files = tempfile.mkdtemp(prefix="lepton-", dir=None if len(tempfile.gettempdir()) <= 24 else "/tmp")
    os.environ |= {
        # A token for this Ray alone. Left to itself, Ray writes one to ~/.ray, and every later `ray start` there wants it.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Ray on a Mac listens on loopback only; elsewhere it turns 127.0.0.1 into the machine's address unless told not to
        # (ray 2.60, _private/services.py, get_node_ip_address).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray runs workers at niceness 15; here they are what the machine is for, as they would be under torchrun.
        "RAY_worker_niceness": "0",
        # How long Ray's agents look for its head before they end themselves, should this process be killed.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    }
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=plan.layout.workers_per_node,
            num_gpus=plan.layout.workers_per_node if plan.layout.accelerator == "cuda" else 0,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
            _temp_dir=files,
            _node_ip_address="127.0.0.1",
        )
        yield ray
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        raise ClusterError(f"Ray did not start on this machine: {error}", "lepton-launch doctor says what this machine lacks") from error
    finally:
        ray.shutdown()
        shutil.rmtree(files, ignore_errors=True)


def _drive(ray: Any, plan: Plan, show: Callable[[Event], None], stop_asked: Callable[[], LauncherError | None]) -> None:
    """Start a worker a rank, hand over the plan, pass events on until all are done or one fails."""
    actor = ray.remote(**worker_options(plan))(Worker)
    workers = [actor.remote(plan.run_dir, rank) for rank in range(plan.layout.world_size)]
    try:
        address = ray.get(workers[0].reserve_address.remote(), timeout=START_TIMEOUT_S)
        plan_path = str(Path(plan.run_dir) / PLAN_FILE)
        running = {worker.train.remote(plan_path, address): rank for rank, worker in enumerate(workers)}
        training, stopping = False, None
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
            if stopping is None and (stopping := stop_asked()):
                if not training:
                    raise stopping
                show({"event": "note", "text": "stopping: the step is ended and saved; once more stops at once"})
                for worker in workers:
                    worker.ask_to_stop.options(concurrency_group="control").remote()
            training = _show_events(ray, workers[0], show) or training
            failures = [failure for ref in done if (failure := _failure_of(ray, ref, running.pop(ref)))]
            if failures:
                _show_events(ray, workers[0], show)
                raise _cause(failures + _fellow_failures(ray, running), stopping)
        _show_events(ray, workers[0], show)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(
            f"no worker started within {START_TIMEOUT_S:.0f} s", "lepton-launch doctor says what this machine lacks"
        ) from None
    finally:
        for worker in workers:
            ray.kill(worker)


def _show_events(ray: Any, worker: Any, show: Callable[[Event], None]) -> bool:
    """Pass on what rank 0 reported; whether steps were among it."""
    try:
        events = ray.get(worker.take_events.options(concurrency_group="control").remote(), timeout=10)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return False  # its train() call tells why
    for event in events:
        show(event)
    return any(event["event"] == "step" for event in events)


def _failure_of(ray: Any, ref: Any, rank: int) -> LauncherError | None:
    try:
        ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return (
            cause if isinstance(cause, LauncherError) else TrainingError(f"rank {rank}: {cause!r}", "the traceback is in the run's logs/")
        )
    except ray.exceptions.RayActorError as error:
        reason = " ".join(str(error).split("\n")[0].split())
        return TrainingError(
            f"the process of rank {rank} died: {reason}",
            "see the end of its file in the run's logs/; a kill by the kernel (out of memory) leaves no trace there",
        )
    return None


def _fellow_failures(ray: Any, running: dict[Any, int]) -> list[LauncherError]:
    deadline, failures = time.monotonic() + FELLOW_ERRORS_S, []
    while running and time.monotonic() < deadline:
        done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
        failures += [failure for ref in done if (failure := _failure_of(ray, ref, running.pop(ref)))]
    return failures


def _cause(failures: list[LauncherError], stopping: LauncherError | None) -> LauncherError:
    """The failure that says most: a named one before "the connection to the others broke". A stop that was asked for
    is named by how it was asked, with what the workers say about the save.
    """
    cause = min(failures, key=lambda failure: type(failure) is TrainingError)
    return type(stopping)(f"{stopping.message}; {cause.message}", cause.remedy) if stopping and isinstance(cause, Stopped) else cause


@contextmanager
def _noting_signals() -> Iterator[Callable[[], LauncherError | None]]:
    """Inside, the first SIGINT or SIGTERM is noted, and given as the error it means: raised from within Ray's
    compiled code, it would come out as another. A second one takes its usual, immediate effect.
    """
    noted: list[LauncherError] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(Interrupted("interrupted", AGAIN) if number == signal.SIGINT else Stopped("stopped by SIGTERM", AGAIN))
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
