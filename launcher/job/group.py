"""One worker group on a Ray: started, watched and ended. It runs to its end, or raises GroupFailed with what went wrong.

Here things are done; what follows a failure is decided in policy.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import ClusterError, LauncherError, OutOfMemory, TrainingError
from launcher.job.policy import Failure, Kind, find_cause, name_kind, stall_limit_s
from launcher.job.worker import News, Place, Worker, worker_options
from launcher.plan import Plan
from launcher.run import Event

START_TIMEOUT_S = 120.0
POLL_S = 0.25
FELLOW_ERRORS_S = 3.0
"""After the first rank fails, how long the others may still say why: the cause often speaks second."""
SPARES_ANSWER_S = 3.0
OTHERS_EVERY_S = 1.0
SILENT_S = 5.0
"""A worker that does not answer for so long, when the group has stalled, is the one that hangs."""
NODE_GONE = ("node died", "node is dead", "node has been", "node was", "drained", "preempted")
"""How Ray says that a worker went with its node (ray 2.60, exceptions.py and the causes of death in its protocol)."""


class GroupFailed(Exception):
    """A worker group ended before its work was done. `alive_at` (s, monotonic) is when it last gave a sign of life."""

    def __init__(self, failure: Failure, alive_at: float | None = None) -> None:
        super().__init__(failure)
        self.failure, self.alive_at = failure, time.monotonic() if alive_at is None else alive_at


@dataclass
class Group:
    """Workers by rank, where they are, and how far they have come."""

    workers: list[Any]
    places: list[Place]
    step: int = 0
    stepping: bool = False
    step_times_s: list[float] = field(default_factory=list)
    moved_at: float = field(default_factory=time.monotonic)
    stepping_since: float | None = None
    heard_at: dict[int, float] = field(default_factory=dict)

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(place.host for place in self.places)

    def note(self, event: Event) -> None:
        """Count an event as progress."""
        self.moved_at = time.monotonic()
        self.stepping = event["event"] == "step" or (self.stepping and event["event"] != "phase")
        if event["event"] == "step":
            self.step = event["step"]
            self.stepping_since = self.stepping_since or self.moved_at
            self.step_times_s = [*self.step_times_s[-50:], event["step_s"]]


Watch = Callable[[Group], None]
"""Called at each turn of the loop; raises to end the group."""


def start_workers(
    ray: Any,
    plan: Plan,
    seats: list[dict[str, Any]],
    secrets: dict[str, str],
    spares: Sequence[Any] = (),
    still_there: Callable[[], bool] = lambda: True,
) -> Group:
    """An actor a rank; `seats` holds Ray's options that say where each goes. Of `spares`, those that live take over instead.

    Raises GroupFailed where one is lost, or `still_there` says that its node is; ClusterError where one does not start.
    """
    actor = ray.remote(**worker_options(plan))(Worker)
    living = _find_living(ray, spares)
    workers = [living.get(rank) or actor.options(**seat).remote(rank, secrets) for rank, seat in enumerate(seats)]
    group, deadline = Group(workers, []), time.monotonic() + START_TIMEOUT_S
    waiting = asked = [worker.locate.remote() for worker in workers]
    try:
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1.0)
            if waiting and not still_there():
                error = TrainingError("a node was lost before its worker started", "see that the node is up and `ray start` runs on it")
                raise GroupFailed(Failure(error=error, kind="node lost"))
            if waiting and time.monotonic() > deadline:
                raise ClusterError(
                    f"{len(waiting)} of {len(workers)} workers did not start within {START_TIMEOUT_S:.0f} s",
                    "lepton-launch doctor, run there, says what a machine lacks",
                )
        with naming_losses(group):
            group.places = ray.get(asked)
        return group
    except BaseException:
        end_workers(ray, workers)
        raise


def _find_living(ray: Any, spares: Sequence[Any]) -> dict[int, Any]:
    """The spares, by rank, that what ended the group has left; one that does not answer, as on a host that hangs, is ended."""
    asked = {spare.locate.options(concurrency_group="control").remote(): rank for rank, spare in enumerate(spares)}
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=SPARES_ANSWER_S) if asked else ([], [])
    living = {}
    for ref in ready:
        with suppress(ray.exceptions.RayError):
            ray.get(ref)
            living[asked[ref]] = spares[asked[ref]]
    end_workers(ray, [spare for rank, spare in enumerate(spares) if rank not in living])
    return living


def start_spares(ray: Any, plan: Plan, seats: list[dict[str, Any]], secrets: dict[str, str], group: Group) -> list[Any]:
    """A second actor a rank, on the same node and devices, that imports what rank 0 has come to need and waits.

    It takes none of Ray's resources and, until it trains, no memory of a device.
    """
    actor = ray.remote(**{**worker_options(plan), "num_cpus": 0, "num_gpus": 0})(Worker)
    spares = [actor.options(**seat).remote(rank, secrets) for rank, seat in enumerate(seats)]
    modules = group.workers[0].list_modules.options(concurrency_group="control").remote()  # goes from there to the spares: not waited for
    for spare, place in zip(spares, group.places, strict=True):
        spare.warm_up.remote(plan, place.devices, modules)
    return spares


@contextmanager
def naming_losses(group: Group) -> Iterator[None]:
    """Raises GroupFailed for what Ray raises when a worker that is asked something is gone."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise GroupFailed(_failure_of_ray_error(error, None, group)) from error


def ask_to_stop(group: Group) -> None:
    """Have every worker save and end after the step it is in."""
    for worker in group.workers:
        worker.ask_to_stop.options(concurrency_group="control").remote()


def end_workers(ray: Any, workers: list[Any]) -> None:
    for worker in workers:
        ray.kill(worker)


def run_group(ray: Any, group: Group, plan: Plan, show: Callable[[Event], None], hear: Callable[[int, News], None], watch: Watch) -> None:
    """Train on the group's workers until all are done. Raises GroupFailed, and what `watch` raises.

    `show` is given rank 0's events, `hear` every worker's news.
    """
    with naming_losses(group):
        address = ray.get(group.workers[0].reserve_address.remote(), timeout=START_TIMEOUT_S)
    running = {worker.train.remote(plan, address, group.hosts): rank for rank, worker in enumerate(group.workers)}
    asked: dict[Any, tuple[int, float]] = {}
    while running:
        done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
        _hear_all(ray, group, asked, show, hear)
        watch(group)
        failures = [failure for ref in done if (failure := _failure_of(ray, ref, running.pop(ref), group))]
        if failures:
            alive_at = group.moved_at
            failures = _fellow_failures(ray, running, group, failures)
            _hear_rest(ray, group, asked, show, hear, within_s=1.0)
            raise GroupFailed(find_cause(failures), alive_at)
        _check_moving(group, plan, asked)
    _hear_rest(ray, group, asked, show, hear, within_s=10.0)


def _hear_all(
    ray: Any, group: Group, asked: dict[Any, tuple[int, float]], show: Callable[[Event], None], hear: Callable[[int, News], None]
) -> None:
    """Take what workers have told, and ask again: rank 0 at every turn, the others now and then. Nobody is waited for."""
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
    for ref in ready:
        _take(ray, ref, asked, group, show, hear)
    now, waiting = time.monotonic(), {rank for rank, _ in asked.values()}
    for rank, worker in enumerate(group.workers):
        if rank not in waiting and (rank == 0 or now - group.heard_at.get(rank, 0.0) > OTHERS_EVERY_S):
            asked[worker.take_news.options(concurrency_group="control").remote()] = (rank, now)


def _take(
    ray: Any, ref: Any, asked: dict[Any, tuple[int, float]], group: Group, show: Callable[[Event], None], hear: Callable[[int, News], None]
) -> None:
    rank, _ = asked.pop(ref)
    group.heard_at[rank] = time.monotonic()
    try:
        news = ray.get(ref, timeout=SILENT_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return  # its train() call tells why
    for event in news.events:
        group.note(event)
        show(event)
    hear(rank, news)


def _hear_rest(
    ray: Any,
    group: Group,
    asked: dict[Any, tuple[int, float]],
    show: Callable[[Event], None],
    hear: Callable[[int, News], None],
    within_s: float,
) -> None:
    """What workers still have to tell when the group is over: what they were asked before, then once more."""
    deadline = time.monotonic() + within_s
    last = {worker.take_news.options(concurrency_group="control").remote(): (rank, deadline) for rank, worker in enumerate(group.workers)}
    for some in (asked, last):
        ready, _ = ray.wait(list(some), num_returns=len(some), timeout=max(0.1, deadline - time.monotonic())) if some else ([], [])
        for ref in ready:
            _take(ray, ref, some, group, show, hear)


def _check_moving(group: Group, plan: Plan, asked: dict[Any, tuple[int, float]]) -> None:
    """The watchdog. Raises GroupFailed where nothing has moved for too long, naming the workers that do not answer."""
    now = time.monotonic()
    limit_s = stall_limit_s(group.step_times_s if group.stepping else [], plan.cluster.ray.stall_timeout_s)
    if now - group.moved_at < limit_s:
        return
    silent = sorted(rank for rank, since in asked.values() if now - since > SILENT_S)
    for rank, worker in enumerate(group.workers):
        if rank not in silent:
            worker.dump_stacks.options(concurrency_group="control").remote()
    time.sleep(1.0 if len(silent) < len(group.workers) else 0.0)  # for the stacks to reach the logs
    who = ", ".join(f"rank {rank} on {group.hosts[rank]}" for rank in silent)
    what = f"{who} does not answer" if silent else "all ranks answer, and wait for each other in a collective"
    error = TrainingError(
        f"no progress for {limit_s:.0f} s after step {group.step}: {what}",
        "where each rank was is in the run's logs/; ray.stall_timeout_s in the cluster file sets the patience",
    )
    first = silent[0] if silent else None
    host = "" if first is None else group.hosts[first]
    raise GroupFailed(Failure(error=error, kind="hung", rank=first, host=host, step=group.step), group.moved_at)


def _failure_of(ray: Any, ref: Any, rank: int, group: Group) -> Failure | None:
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return _failure_of_ray_error(error, rank, group)
    return None


def _failure_of_ray_error(error: Any, rank: int | None, group: Group) -> Failure:
    host = group.hosts[rank] if rank is not None and rank < len(group.hosts) else ""
    where = f"rank {rank}" + (f" on {host}" if host else "") if rank is not None else "a worker"
    ours, kind = _name_ray_error(error, where)
    return Failure(error=_with_place(ours, rank, host, group.step), kind=kind, rank=rank, host=host, step=group.step)


def _name_ray_error(error: Any, where: str) -> tuple[LauncherError, Kind]:
    """Our words for what Ray says about a worker."""
    from ray import exceptions

    cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
    if isinstance(cause, LauncherError):
        return cause, name_kind(cause)
    if isinstance(cause, exceptions.OutOfMemoryError):
        message = f"{where}: the node ran out of memory, and Ray ended the worker"
        return OutOfMemory(message, "use more nodes, a smaller micro-batch or a shorter seq_len"), "error"
    if isinstance(cause, exceptions.ActorUnavailableError):
        return TrainingError(f"the connection to {where} broke", "see that its node is up and `ray start` runs on it"), "worker died"
    if isinstance(cause, exceptions.RayActorError):
        reason = " ".join(str(cause).split())
        if any(sign in reason for sign in NODE_GONE):
            return TrainingError(f"{where} was lost with its node", "see that the node is up and `ray start` runs on it"), "node lost"
        remedy = "see the end of its file in the run's logs/; a kill by the kernel (out of memory) leaves no trace there"
        return TrainingError(f"the process of {where} died", remedy), "worker died"
    if isinstance(cause, exceptions.RayError):
        return ClusterError(f"{where}: {_first_line(cause)}", "Ray's dashboard and its logs on that node say more"), "node lost"
    return TrainingError(f"{where}: {cause!r}", "the traceback is in the run's logs/"), "error"


def _with_place(error: LauncherError, rank: int | None, host: str, step: int) -> LauncherError:
    """The error of a worker with its host beside the rank it names, and how far the run was."""
    named = f"rank {rank}:"
    if not host or not error.message.startswith(named):
        return error
    after = f" (after step {step})" if step else ""
    return type(error)(error.message.replace(named, f"rank {rank} on {host}:", 1) + after, error.remedy)


def _first_line(error: Any) -> str:
    return " ".join(str(error).split("\n")[0].split())[:300]


def _fellow_failures(ray: Any, running: dict[Any, int], group: Group, known: list[Failure]) -> list[Failure]:
    """Wait a little for the others to fail too, until one says more than that its connection broke."""
    deadline, failures = time.monotonic() + FELLOW_ERRORS_S, list(known)
    while running and time.monotonic() < deadline and all(failure.kind == "network" for failure in failures):
        done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
        failures += [failure for ref in done if (failure := _failure_of(ray, ref, running.pop(ref), group))]
    return failures
