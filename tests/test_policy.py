"""What follows a failure, without any cluster."""

from __future__ import annotations

import pytest

from launcher.errors import (
    BudgetError,
    CheckpointError,
    ClusterError,
    DataError,
    LauncherError,
    NotFinite,
    OutOfMemory,
    Stopped,
    TrainingError,
)
from launcher.job.policy import (
    LONGEST_PAUSE_S,
    MAX_FAILURES,
    PHASE_STALL_S,
    SHORTEST_STALL_S,
    STALL_STEPS,
    Failure,
    GiveUp,
    Kind,
    Retry,
    count_failure,
    decide,
    find_cause,
    name_kind,
    stall_limit_s,
)


def fail(
    kind: Kind = "worker died", step: int = 5, committed: int = 0, message: str = "it broke", error: type[LauncherError] = TrainingError
) -> Failure:
    return Failure(error=error(message, "mend it"), kind=kind, rank=1, host="node2", step=step, committed=committed)


def test_a_dead_worker_is_retried_at_once_from_the_newest_commit() -> None:
    decision = decide([fail(committed=40)])
    assert isinstance(decision, Retry)
    assert decision.pause_s == 0
    assert "from step 40" in decision.why and "it broke" in decision.why


@pytest.mark.parametrize("error", [OutOfMemory, NotFinite, DataError, BudgetError, CheckpointError, Stopped])
def test_what_would_come_back_is_not_retried(error: type[LauncherError]) -> None:
    decision = decide([fail(kind="error", error=error)])
    assert isinstance(decision, GiveUp)
    assert type(decision.error) is error and decision.error.remedy == "mend it"


def test_the_same_error_at_the_same_step_twice_ends_the_run() -> None:
    assert isinstance(decide([fail(kind="error", step=0)]), Retry)
    decision = decide([fail(kind="error", step=0), fail(kind="error", step=0)])
    assert isinstance(decision, GiveUp)
    assert "second time" in decision.error.message


@pytest.mark.parametrize("other", [fail(step=6), fail(message="something else"), fail(kind="node lost")])
def test_another_step_or_error_is_not_the_same(other: Failure) -> None:
    assert isinstance(decide([fail(), other]), Retry)


def test_ranks_addresses_and_times_do_not_make_an_error_another() -> None:
    decision = decide([fail(message="rank 1: pid 4711 at 10.0.0.3:5000"), fail(message="rank 3: pid 99 at 10.0.0.4:6000")])
    assert isinstance(decision, GiveUp)


def test_lost_nodes_may_come_again_and_again_at_one_step() -> None:
    lost = [fail(kind="node lost", step=0)] * MAX_FAILURES
    assert isinstance(decide(lost), Retry)
    assert isinstance(decide([*lost, lost[0]]), GiveUp)


def test_a_commit_fills_the_budget_up_again() -> None:
    failures = [fail(step=step, committed=step - 1, message=f"failure {step}") for step in range(1, 30)]
    assert isinstance(decide(failures), Retry)
    stuck = [fail(kind="network", step=step, committed=7, message=f"failure {step}") for step in range(MAX_FAILURES + 1)]
    decision = decide(stuck)
    assert isinstance(decision, GiveUp)
    assert f"{MAX_FAILURES + 1} failures" in decision.error.message


def test_pauses_grow_and_end_growing() -> None:
    pauses = []
    for count in range(1, MAX_FAILURES + 1):
        decision = decide([fail(kind="network", step=step) for step in range(count)])
        assert isinstance(decision, Retry)
        pauses.append(decision.pause_s)
    assert pauses == sorted(pauses) and pauses[0] == 0 and pauses[-1] <= LONGEST_PAUSE_S


def test_the_cause_is_what_says_most() -> None:
    broken, dead, named = fail(kind="network"), fail(kind="worker died"), fail(kind="error", error=OutOfMemory)
    assert find_cause([broken, dead, named]) is named
    assert find_cause([broken, dead]) is dead
    assert find_cause([broken, fail(kind="node lost"), dead]).kind == "node lost"


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("rank 0: RuntimeError: [gloo/transport/tcp/pair.cc:525] Connection closed by peer [10.77.0.2]:5000", "network"),
        (
            "rank 0: DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there was a network error",
            "network",
        ),
        ("rank 0: KeyError: 'labels'", "error"),
    ],
)
def test_a_broken_link_is_told_from_an_error(message: str, kind: str) -> None:
    assert name_kind(TrainingError(message)) == kind


def test_a_named_error_is_never_a_broken_link() -> None:
    assert name_kind(DataError("connection reset by the disk")) == "error"
    assert name_kind(ClusterError("rank 2 on node3 did not come to the group")) == "network"


def test_patience_follows_the_steps() -> None:
    assert stall_limit_s([], None) == PHASE_STALL_S
    assert stall_limit_s([0.1, 0.1], None) == SHORTEST_STALL_S
    assert stall_limit_s([30.0, 31.0, 500.0], None) == STALL_STEPS * 31.0
    assert stall_limit_s([30.0], 15.0) == 15.0
    assert stall_limit_s([], 15.0) == PHASE_STALL_S


def test_a_node_found_lost_is_counted_with_what_it_caused() -> None:
    lost = fail(kind="node lost", step=0, committed=10)
    counted = count_failure([fail(kind="network", step=12, committed=10)], lost)
    assert [(failure.kind, failure.step) for failure in counted] == [("node lost", 12)]
    assert len(count_failure(counted, lost)) == 2  # but a node that comes and goes is counted
    assert len(count_failure([], lost)) == 1
