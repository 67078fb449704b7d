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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.errors import ClusterError, Interrupted, LauncherError, Stopped
from launcher.job.group import Group, GroupFailed, ask_to_stop, end_workers, run_group, start_workers
from launcher.plan import Plan
from launcher.plan.heap import heap_environment
from launcher.run import Event, RunFolder, write_status

AGAIN = "the same command goes on from the newest checkpoint; where there is none it starts over"


def run_job(plan: Plan, show: Callable[[Event], None]) -> None:
    """Run a plan to its end, giving each event to `show`. Raises LauncherError; leaves no process behind."""
    folder = RunFolder(Path(plan.run_dir))
    write_status(folder, "running", pid=os.getpid(), host=platform.node())
    try:
        with _own_ray(plan) as ray, _noting_signals() as stop_asked:
            show({"event": "phase", "name": "starting workers"})
            _run_workers(ray, plan, show, stop_asked)
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


def _run_workers(ray: Any, plan: Plan, show: Callable[[Event], None], stop_asked: Callable[[], LauncherError | None]) -> None:
    """Start a worker a rank and train. Asked to stop, the group saves after the step it is in; before its first it just ends."""
    stopping: list[LauncherError] = []

    def end_if_asked(group: Group) -> None:
        if stopping or not (asked := stop_asked()):
            return
        if not group.step:
            raise asked
        stopping.append(asked)
        show({"event": "note", "text": "stopping: the step is ended and saved; once more stops at once"})
        ask_to_stop(group)

    try:
        group = start_workers(ray, plan, [{}] * plan.layout.world_size, secrets={})
        try:
            run_group(ray, group, plan, show, hear=lambda rank, news: None, watch=end_if_asked)
        finally:
            end_workers(ray, group.workers)
    except GroupFailed as failed:
        raise _name_end(failed.failure.error, stopping) from None


def _name_end(error: LauncherError, stopping: list[LauncherError]) -> LauncherError:
    """A stop that was asked for is named by how it was asked, with what the workers say about the save."""
    if stopping and isinstance(error, Stopped):
        return type(stopping[0])(f"{stopping[0].message}; {error.message}", error.remedy)
    return error


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
    os.environ |= heap_environment(plan.layout.accelerator, os.environ)
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
