"""A client that is attached to a run, through a tail that breaks off. Ray's tail cannot be made to break off at will, so a
stand-in for its Jobs API does; the rest is ours.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.errors import ClusterError, DataError, NotFinite, Stopped
from launcher.job import submit
from launcher.job.messages import MARK, make_result
from launcher.job.submit import find_job, follow, list_jobs, load_end, load_progress
from launcher.run import Event


def lines_of(*events: Event) -> list[str]:
    return [MARK + json.dumps({**event, "number": number}) + "\n" for number, event in enumerate(events, start=1)]


@dataclass
class Jobs:
    """Ray's Jobs API with one job, whose log is served in pieces: each tail starts at the log's beginning and ends at one of `cuts`."""

    log: list[str]
    cuts: list[int] = field(default_factory=list)
    ends_as: str = "SUCCEEDED"
    known: bool = True
    message: str = ""
    exit_code: int | None = None

    def get_address(self) -> str:
        return "http://127.0.0.1:1"

    def list_jobs(self) -> list[Any]:
        if not self.known:
            return []
        state = "RUNNING" if self.cuts else self.ends_as
        job = SimpleNamespace(
            metadata={"lepton_run": "tiny", "lepton_folder": "/mnt/runs/tiny"}, submission_id="lepton-tiny-1", status=SimpleNamespace(value=state),
            start_time=1000, end_time=None, message=self.message, driver_exit_code=self.exit_code,
        )  # fmt: skip
        foreign = SimpleNamespace(metadata={}, submission_id="raysubmit_x", status=SimpleNamespace(value="RUNNING"))
        return [job, foreign]

    def get_job_logs(self, submission_id: str) -> str:
        return "".join(self.log)

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        if not self.known:
            raise RuntimeError(f"Job '{submission_id}' does not exist.")
        text = "".join(self.log[: self.cuts.pop(0)] if self.cuts else self.log)
        if self.cuts and self.cuts[0] == -1:
            self.cuts.pop(0)
            yield text[: len(text) // 2]
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        middle = len(text) // 2  # chunks do not end where lines do
        yield text[:middle]
        yield text[middle:]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "RECONNECT_S", 0.01)
    monkeypatch.setattr(submit, "FORGOTTEN_S", 0.1)


STEPS: list[Event] = [{"event": "step", "step": step, "total_steps": 5, "loss": 1.0 / step} for step in range(1, 6)]


def test_a_tail_that_breaks_off_is_taken_up_where_it_was() -> None:
    heard: list[Event] = []
    client = Jobs(["Running entrypoint for job\n", *lines_of(*STEPS, make_result(None))], cuts=[3, 4, -1, 5])
    assert follow(client, "lepton-tiny-1", heard.append) is None  # type: ignore[arg-type]
    assert [event["step"] for event in heard if event["event"] == "step"] == [1, 2, 3, 4, 5]


def test_a_tail_that_stays_open_after_the_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "SILENCE_S", 0.01)

    class Silent(Jobs):
        async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
            yield self.log[0]
            await asyncio.sleep(3600)

    heard: list[Event] = []
    client = Silent(lines_of(*STEPS, make_result(None)))
    assert follow(client, "lepton-tiny-1", heard.append) is None  # type: ignore[arg-type]
    assert [event["step"] for event in heard if event["event"] == "step"] == [1, 2, 3, 4, 5]


def test_the_end_is_the_runs() -> None:
    error = NotFinite("the loss is nan at step 3", "lower optim.lr")
    client = Jobs(lines_of(*STEPS[:3], make_result(error)), ends_as="FAILED", exit_code=4)
    ended = follow(client, "lepton-tiny-1", lambda event: None)  # type: ignore[arg-type]
    assert type(ended) is NotFinite and ended.args == error.args


@pytest.mark.parametrize(
    ("client", "kind", "said"),
    [
        (Jobs(lines_of(*STEPS), ends_as="STOPPED"), Stopped, "stopped"),
        (
            Jobs(lines_of(*STEPS), ends_as="FAILED", message="Unexpected error: the driver's node died"),
            ClusterError,
            "without a word: Unexpected",
        ),
        (Jobs(["sh: 1: python: not found\n"], ends_as="FAILED", exit_code=127), ClusterError, "no python on its PATH"),
    ],
)
def test_a_driver_that_said_nothing(client: Jobs, kind: type[Exception], said: str) -> None:
    ended = follow(client, "lepton-tiny-1", lambda event: None)  # type: ignore[arg-type]
    assert type(ended) is kind and said in ended.message and ended.remedy


def test_a_cluster_that_was_started_anew_knows_no_run() -> None:
    with pytest.raises(ClusterError, match="started anew"):
        follow(Jobs(lines_of(*STEPS), known=False), "lepton-tiny-1", lambda event: None)  # type: ignore[arg-type]


def test_runs_are_told_from_other_jobs_and_found_by_name_or_id() -> None:
    client: Any = Jobs([])
    assert [job.run for job in list_jobs(client)] == ["tiny"]
    for name in ("tiny", "lepton-tiny-1", "tiny-1", "/mnt/runs/tiny"):
        assert find_job(client, name).submission_id == "lepton-tiny-1"
    with pytest.raises(DataError, match="knows no run tin"):  # a part of a name could be another run's: stop must not guess
        find_job(client, "tin")


def test_a_run_whose_driver_has_said_nothing_yet_has_a_status() -> None:
    client: Any = Jobs([], cuts=[1])
    progress = load_progress(client, find_job(client, "tiny"))
    assert (progress["folder"], progress["step"], progress["committed"]) == ("/mnt/runs/tiny", 0, None)


def test_a_commit_tells_of_steps_that_were_not_told() -> None:
    client: Any = Jobs(lines_of(*STEPS[:3], {"event": "checkpoint", "step": 4}), cuts=[1])
    assert load_progress(client, find_job(client, "tiny"))["step"] == 4


def test_progress_is_what_the_driver_said() -> None:
    events: list[Event] = [
        {"event": "plan", "plan": {"run_dir": "/mnt/runs/tiny-2"}}, {"event": "waiting", "text": "3 of 4 nodes", "left_s": 9.0},
        {"event": "start", "total_steps": 5}, *STEPS[:3], {"event": "checkpoint", "step": 2}, {"event": "restart", "text": "lost"},
        {"event": "phase", "name": "starting workers"},
    ]  # fmt: skip
    client: Any = Jobs(lines_of(*events), cuts=[1])
    progress = load_progress(client, find_job(client, "tiny"))
    assert progress == {"folder": "/mnt/runs/tiny-2", "step": 3, "total_steps": 5, "loss": STEPS[2]["loss"], "committed": 2, "restarts": 1,
                        "recovery_s": None, "recovery_stages_s": {}, "doing": "starting workers", "ended_with": ""}  # fmt: skip
    assert load_end(client, find_job(client, "tiny")) is None
