"""A run's life seen from outside: sent, found again, followed, stopped. Ray's job states are the states."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cluster import RayOptions
from launcher.errors import ClusterError, DataError, LauncherError, Stopped
from launcher.job.client import naming_ray_errors
from launcher.job.messages import MARK, make_error, read_message
from launcher.job.package import Order, build_package
from launcher.recipe import Recipe
from launcher.run import Event

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DRIVER = "exec python -m launcher.job.driver"
"""exec: without it the driver is the child of a shell, which dies first when the job is stopped; in a container whose
first process reaps no orphans, Ray would then wait for a driver that has long ended.
"""
TELL = "exec python -m launcher.job.tell"
PREFIX = "lepton-"
STOP_WAIT_S = 6 * 3600
"""How long Ray leaves a driver that it told to stop: the driver keeps its own time (ray.stop_grace_s, stop --grace)."""
RECONNECT_S = 1.0
SILENCE_S = 10.0
"""How long a tail may say nothing before the job is asked whether it is over."""
GIVE_UP_S = 90.0
"""How long a client looks for a cluster that no longer answers."""
DEFAULT_GRACE_S = RayOptions().stop_grace_s
FORGOTTEN_S = 5.0
"""How long a cluster that answers may say that it does not know the run: its parts do not start at one time."""
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run as Ray Jobs knows it."""

    run: str
    submission_id: str
    state: str
    folder: str
    started: float | None
    ended: float | None
    message: str
    exit_code: int | None

    @property
    def is_over(self) -> bool:
        return self.state in OVER


def make_submission_id(recipe: Recipe) -> str:
    """The same for the same recipe in the same place (its output_dir): what makes a second submit find the first. No sizes are in it:
    a run that goes on with other nodes is the same run.
    """
    digest = hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:8]
    return f"{PREFIX}{recipe.name}-{digest}"


def list_jobs(client: JobSubmissionClient) -> list[Job]:
    """All runs of this launcher that the cluster remembers, the newest first."""
    with naming_ray_errors(str(client.get_address())):
        found = client.list_jobs()
    jobs = [_read_job(details) for details in found if (details.metadata or {}).get("lepton_run")]
    return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)


def _read_job(details: Any) -> Job:
    return Job(
        run=details.metadata["lepton_run"],
        submission_id=details.submission_id,
        state=str(details.status.value),
        folder=details.metadata.get("lepton_folder", ""),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        message=details.message or "",
        exit_code=details.driver_exit_code,
    )


def find_job(client: JobSubmissionClient, name: str) -> Job:
    """The newest job of a run, by its name, its folder, its submission id or what that has after `lepton-`. Raises DataError."""
    jobs = list_jobs(client)
    for job in jobs:
        if name in (job.run, job.folder, job.submission_id, job.submission_id.removeprefix(PREFIX)):
            return job
    names = ", ".join(dict.fromkeys(job.run for job in jobs))
    raise DataError(f"the cluster at {client.get_address()} knows no run {name}", f"it knows {names}" if names else "it knows no runs")


def submit(client: JobSubmissionClient, order: Order, given: str, recipe_dir: Path, secrets: dict[str, str]) -> tuple[Job, bool]:
    """The run's job, and whether it is new: the same run that is going on already is found, not started twice.

    Raises ClusterError where a run of that name goes on with another recipe.
    """
    recipe = order.load_recipe()
    base = make_submission_id(recipe)
    jobs = list_jobs(client)
    for job in jobs:
        if job.run != recipe.name or job.is_over or order.dry_run:
            continue
        if re.fullmatch(re.escape(base) + r"(-\d+)?", job.submission_id):
            return job, False
        raise ClusterError(
            f"a run named {recipe.name} goes on with another recipe ({job.submission_id})",
            f"stop it, or give this one another name: name={recipe.name}-2",
        )
    taken = {job.submission_id for job in jobs}
    if order.dry_run:
        base += "-plan"
    submission_id = next(name for number in range(1, 10_000) if (name := base if number == 1 else f"{base}-{number}") not in taken)
    with tempfile.TemporaryDirectory(prefix="lepton-package-") as folder, naming_ray_errors(str(client.get_address())):
        build_package(Path(folder), order, given, recipe_dir, secrets)
        _quiet_ray()
        client.submit_job(
            entrypoint=f"{DRIVER} {submission_id}",
            submission_id=submission_id,
            runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
            metadata={"lepton_run": recipe.name, "lepton_folder": str(Path(recipe.output_dir) / recipe.name)},
        )
        job = next(job for job in list_jobs(client) if job.submission_id == submission_id)
    return job, True


def _quiet_ray() -> None:
    """Ray's client tells of every upload and every closed socket, at a level that its modules set for themselves."""
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)


def follow(client: JobSubmissionClient, submission_id: str, show: Callable[[Event], None]) -> LauncherError | None:
    """Give `show` the run's events, from its start to its end; returns how it ended, None if well. Raises ClusterError.

    Ray's tail may end while the job goes on: it is then taken up where it ended.
    """
    _quiet_ray()
    return asyncio.run(_follow(client, submission_id, show))


async def _follow(client: JobSubmissionClient, submission_id: str, show: Callable[[Event], None]) -> LauncherError | None:
    heard, stray = 0, list[str]()
    lost_at: float | None = None
    while True:
        with contextlib.suppress(ClusterError, DataError):  # a tail that breaks off tells nothing: the job's state does
            async for line in _tail_until_over(client, submission_id):
                event = read_message(line)
                if event is None:
                    stray = [*stray[-20:], line] if not line.startswith(MARK) else stray
                elif event["number"] > heard:
                    heard, lost_at = event["number"], None
                    show(event)
        try:
            job = find_job(client, submission_id)
            events = load_events(client, job) if job.is_over else []
        except (ClusterError, DataError) as error:
            lost_at = lost_at or time.monotonic()
            _check_patience(error, time.monotonic() - lost_at)
        else:
            lost_at = None
            if job.is_over:
                for event in events:  # what came after the tail broke off
                    if event["number"] > heard:
                        show(event)
                return _conclude(job, find_result(events), stray)
        await asyncio.sleep(RECONNECT_S)


def _check_patience(error: LauncherError, lost_s: float) -> None:
    """Raises ClusterError where a cluster has been away, or has not known the run, for too long."""
    forgotten = isinstance(error, DataError)
    if lost_s > (FORGOTTEN_S if forgotten else GIVE_UP_S):
        what = "was started anew and no longer knows the run" if forgotten else f"has not answered for {GIVE_UP_S:.0f} s"
        raise ClusterError(f"the cluster {what}: {error.message}", "the same command continues the run on a cluster that is up") from None


async def _tail_until_over(client: JobSubmissionClient, submission_id: str) -> AsyncIterator[str]:
    """The lines of the job's log. A tail that stays open and silent after its job has ended is at its end, too."""
    lines = _tail(client, submission_id)
    while True:
        coming = asyncio.ensure_future(anext(lines))
        try:
            while not (await asyncio.wait({coming}, timeout=SILENCE_S))[0]:
                if find_job(client, submission_id).is_over:
                    return
            line = coming.result()
        except StopAsyncIteration:
            return
        finally:
            coming.cancel()
        yield line


async def _tail(client: JobSubmissionClient, submission_id: str) -> AsyncIterator[str]:
    """The job's log from its start, line by line, until the connection ends."""
    rest = ""
    with naming_ray_errors(str(client.get_address())):
        async for chunk in client.tail_job_logs(submission_id):
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                yield line
    if rest:
        yield rest


def _conclude(job: Job, result: Event | None, stray: list[str]) -> LauncherError | None:
    """How a job that is over ended, also where its driver had no time to say so."""
    if result is not None:
        return make_error(result)
    if job.state == "SUCCEEDED":
        return None
    again = "the same command continues it"
    if job.state == "STOPPED":
        return Stopped("the job was stopped", again)
    said = next((line for line in reversed(stray) if line.strip()), "")
    if job.exit_code == 127 or "not found" in said and "python" in said:
        return ClusterError(f"the head has no python on its PATH: {said}", "start Ray there with the environment's bin folder on the PATH")
    reason = next(iter(job.message.splitlines()), "") if job.message else "no reason is known"
    return ClusterError(
        f"the run's driver ended without a word: {reason[:300]}" + (f"; it last printed: {said[:200]}" if said else ""), again
    )


def stop(client: JobSubmissionClient, job: Job, grace_s: float | None) -> None:
    """Ask a run to save and end; without `grace_s` its own grace counts."""
    _quiet_ray()
    with naming_ray_errors(str(client.get_address())):
        if grace_s is not None:
            _tell(client, job, grace_s)
        client.stop_job(job.submission_id)


def _tell(client: JobSubmissionClient, job: Job, grace_s: float) -> None:
    """Leave the driver word of how long it may take. Ray's stop carries none, so a small job does, beside the run."""
    import launcher

    with tempfile.TemporaryDirectory(prefix="lepton-tell-") as folder:
        code = Path(folder) / "launcher" / "job"
        code.mkdir(parents=True)
        source = Path(launcher.__file__).parent
        for name in ("__init__.py", "job/__init__.py", "job/tell.py"):
            (Path(folder) / "launcher" / name).write_bytes((source / name).read_bytes())
        told = client.submit_job(entrypoint=f"{TELL} {job.submission_id} {grace_s:g}", runtime_env={"working_dir": folder})
    deadline = time.monotonic() + GIVE_UP_S
    while client.get_job_status(told) not in OVER and time.monotonic() < deadline:
        time.sleep(0.3)
    with contextlib.suppress(RuntimeError):  # it is over, or will be: a line in the cluster's list is all that stays
        client.delete_job(told)


def wait_until_over(client: JobSubmissionClient, job: Job, within_s: float) -> Job:
    """The job once it is over, or as it is after that time."""
    deadline = time.monotonic() + within_s
    while not (job := find_job(client, job.submission_id)).is_over and time.monotonic() < deadline:
        time.sleep(0.5)
    return job


def load_events(client: JobSubmissionClient, job: Job) -> list[Event]:
    """All events of the job's log so far."""
    with naming_ray_errors(str(client.get_address())):
        log = client.get_job_logs(job.submission_id)
    return [event for line in log.split("\n") if (event := read_message(line))]


def load_end(client: JobSubmissionClient, job: Job) -> LauncherError | None:
    """What a job that is over ended with."""
    return _conclude(job, find_result(load_events(client, job)), []) if job.is_over else None


def find_result(events: list[Event]) -> Event | None:
    """The driver's last word, if it had time for one."""
    return next((event for event in reversed(events) if event["event"] == "result"), None)


def load_progress(client: JobSubmissionClient, job: Job) -> dict[str, Any]:
    """How far a run is, from what its driver said: step, loss, newest commit, restarts and how long the last took, phase, how it ended."""
    progress: dict[str, Any] = {
        "folder": job.folder,
        "step": 0,
        "total_steps": None,
        "loss": None,
        "committed": None,
        "restarts": 0,
        "recovery_s": None,
        "recovery_stages_s": {},
        "doing": "",
        "ended_with": "",
    }
    for event in load_events(client, job):
        kind = event["event"]
        if kind == "plan":
            progress["folder"] = event["plan"]["run_dir"]
        elif kind in ("phase", "waiting"):
            progress["doing"] = event["name"] if kind == "phase" else event["text"]
        elif kind == "start":
            progress |= {"total_steps": event["total_steps"], "doing": "training"}
        elif kind == "step":
            progress |= {"step": event["step"], "loss": event["loss"], "total_steps": event["total_steps"], "doing": "training"}
        elif kind == "checkpoint":
            progress |= {"committed": event["step"], "step": max(progress["step"], event["step"])}  # not every step is told
        elif kind == "restart":
            progress["restarts"] += 1
        elif kind == "recovered":
            progress |= {"recovery_s": event["recovery_s"], "recovery_stages_s": event["stages_s"]}
        elif kind == "result" and event["exit_code"]:
            progress["ended_with"] = event["message"]
    return progress
