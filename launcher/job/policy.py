"""What to do when a run fails: pure functions of what failed, and of what was saved between failures.

A failure of the machines (a worker, a node, the network, a collective that hangs) restarts the group from the newest
commit. A failure of the run itself (memory, data, a loss that is no number) comes back as surely as it came, and is not
tried again. Retries are counted against progress: a commit since the last failure fills the budget up again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from launcher.errors import (
    BudgetError,
    CapacityTimeout,
    CheckpointError,
    ClusterError,
    DataError,
    Interrupted,
    LauncherError,
    NotFinite,
    OutOfMemory,
    RecipeError,
    Stopped,
    TrainingError,
)

Kind = Literal["worker died", "node lost", "network", "hung", "error"]
NEVER_AGAIN = (OutOfMemory, NotFinite, DataError, RecipeError, BudgetError, CheckpointError, CapacityTimeout, Stopped, Interrupted)
"""What would come back unchanged, or was wanted."""
MAX_FAILURES = 3
"""Failures without a commit between them before a run is given up."""
LONGEST_PAUSE_S = 60.0
SHORTEST_STALL_S = 120.0
STALL_STEPS = 20
"""A step may take this many times the usual before the group counts as hung."""
PHASE_STALL_S = 1800.0
"""Where it does not step: weights are read, data is tokenised, a held-out set is measured, and nothing tells how long that is."""

BROKEN_LINKS = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "connectfullmesh",
    "socket timeout",
    "timed out waiting",
    "store->get",
    "tcpstore",
    "recvvalue failed",
    "sendbytes failed",
    "no route to host",
    "network is unreachable",
    "nccl error",
    "remote process exited",
    "watchdog caught collective operation timeout",
    "application timeout caused pair closure",
    "read timeout",
    "monitoredbarrier",
)
"""How gloo, NCCL and the store say that another rank is gone: a consequence, hardly ever the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What ended a worker group: the error, of which rank and host, at which step, and the newest commit then."""

    error: LauncherError
    kind: Kind
    rank: int | None = None
    host: str = ""
    step: int = 0
    committed: int = 0

    @property
    def signature(self) -> str:
        """The same for the same error, whatever rank, address or time it names."""
        line = self.error.message.splitlines()[0] if self.error.message else ""
        return f"{type(self.error).__name__} {re.sub(r'0x[0-9a-f]+|[0-9][0-9.:]*', '#', line)}"


@dataclass(frozen=True, slots=True)
class Retry:
    """Start again after a pause; `why` is for the user."""

    pause_s: float
    why: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End with this error."""

    error: LauncherError


def decide(failures: Sequence[Failure]) -> Retry | GiveUp:
    """What follows the last of `failures`, which are all of this run in order."""
    last = failures[-1]
    if isinstance(last.error, NEVER_AGAIN):
        return GiveUp(last.error)
    since = _since_progress(failures)
    if last.kind in ("error", "worker died", "hung") and len(since) >= 2 and _same(since[-2], last):
        return GiveUp(_again(last))
    if len(since) > MAX_FAILURES:
        return GiveUp(_too_often(since))
    pause_s = 0.0 if len(since) == 1 else min(LONGEST_PAUSE_S, 2.0 ** len(since))
    start = f"from step {last.committed}" if last.committed else "from the start: nothing was committed yet"
    return Retry(pause_s, f"{last.error.message}; starting again {start} (failure {len(since)} of at most {MAX_FAILURES} without a commit)")


def count_failure(failures: Sequence[Failure], failure: Failure) -> list[Failure]:
    """The failures with one more. A node that is found lost before the next group stepped is what the last failure was about."""
    same_event = failures and failure.kind == "node lost" and failure.step == 0 and failures[-1].kind != "node lost"
    return [*failures[:-1], replace(failure, step=failures[-1].step)] if same_event else [*failures, failure]


def _since_progress(failures: Sequence[Failure]) -> list[Failure]:
    """The last failures between which no commit came."""
    since = [failures[-1]]
    for failure in reversed(failures[:-1]):
        if failure.committed < failures[-1].committed:
            break
        since.insert(0, failure)
    return since


def _same(one: Failure, other: Failure) -> bool:
    """The same error at the same step. A group that never stepped tells nothing by its step, unless its code failed."""
    comparable = one.kind == other.kind and one.step == other.step and one.signature == other.signature
    return comparable and (other.step > 0 or other.kind == "error")


def _again(last: Failure) -> LauncherError:
    message = f"{last.error.message}, for the second time after step {last.step}"
    return TrainingError(message, last.error.remedy or "the full logs of the ranks are in the run's logs/")


def _too_often(since: Sequence[Failure]) -> LauncherError:
    causes = "; ".join(failure.error.message.splitlines()[0] for failure in since)
    return TrainingError(
        f"{len(since)} failures without a commit between them: {causes}",
        "mend the machines, or save more often (save.every_steps); the same command continues from the newest commit",
    )


def find_cause(failures: Sequence[Failure]) -> Failure:
    """Of failures at one time, the one that says most: a named error, a death, an unknown error, a broken link."""

    def says_little(failure: Failure) -> int:
        if isinstance(failure.error, NEVER_AGAIN):
            return 0
        return {"node lost": 1, "worker died": 2, "hung": 3, "error": 4, "network": 5}[failure.kind]

    return min(failures, key=says_little)


def name_kind(error: LauncherError) -> Kind:
    """Whether a worker's error only tells that another one is gone, or did not come."""
    text = error.message.lower()
    broken = isinstance(error, ClusterError) or (type(error) is TrainingError and any(sign in text for sign in BROKEN_LINKS))
    return "network" if broken else "error"


def stall_limit_s(step_times_s: Sequence[float], wanted_s: float | None) -> float:
    """How long a group may go without a sign of progress. `step_times_s` is empty where it does not step; `wanted_s` is
    what the cluster file says, if it does.
    """
    if not step_times_s:
        return max(PHASE_STALL_S, wanted_s or 0.0)
    return wanted_s if wanted_s is not None else max(SHORTEST_STALL_S, STALL_STEPS * median(step_times_s))
