"""How long a recovery took, stage by stage; and what a spare has ready."""

from __future__ import annotations

import subprocess
import sys

from launcher.job.recovery import Recovery
from launcher.job.submit import find_job, load_progress
from launcher.progress import describe_event
from launcher.run import Event

TOLD: list[tuple[float, Event]] = [
    (12.0, {"event": "restart", "text": "rank 2 died"}),
    (12.5, {"event": "phase", "name": "starting workers"}),
    (13.0, {"event": "note", "text": "workers: node1 rank 0"}),
    (14.0, {"event": "phase", "name": "loading model"}),
    (17.0, {"event": "start", "total_steps": 50}),
]


def step(number: int) -> Event:
    return {"event": "step", "step": number, "total_steps": 50, "loss": 1.0}


def listen(recovery: Recovery, told: list[tuple[float, Event]]) -> list[Event]:
    return [heard for at, event in told if (heard := recovery.note(event, at))]


def test_the_time_from_the_last_sign_of_life_to_the_next_step_is_split_into_stages() -> None:
    (recovered,) = listen(Recovery(alive_at=10.0, step=29), [*TOLD, (19.0, step(21))])
    assert recovered["recovery_s"] == 9.0 and recovered["steps_again"] == 9
    assert recovered["stages_s"] == {"noticing": 2.5, "starting workers": 1.5, "loading model": 3.0, "first step": 2.0}
    said = "recovered in 9.0 s (noticing 2.5, starting workers 1.5, loading model 3.0, first step 2.0); 9 steps are taken again"
    assert describe_event(recovered) == said


def test_a_failure_on_the_way_belongs_to_the_same_recovery() -> None:
    waiting: Event = {"event": "waiting", "text": "3 of 4 nodes are there", "left_s": 9.0}
    again: list[tuple[float, Event]] = [(20.0, {"event": "restart", "text": "node3 was lost"}), (21.0, waiting), (25.0, waiting),
                                        *((at + 20.0, event) for at, event in TOLD)]  # fmt: skip
    (recovered,) = listen(Recovery(alive_at=10.0, step=20), [*TOLD, *again, (40.0, step(21))])
    assert recovered["recovery_s"] == 30.0 == sum(recovered["stages_s"].values()) and recovered["steps_again"] == 0
    assert recovered["stages_s"]["waiting for nodes"] == 11.5 and recovered["stages_s"]["starting workers"] == 3.0


def test_status_tells_how_long_the_last_took() -> None:
    from test_follow import Jobs, lines_of

    recovered = {"event": "recovered", "step": 21, "steps_again": 9, "recovery_s": 9.0, "stages_s": {"noticing": 9.0}}
    client = Jobs(lines_of({"event": "plan", "plan": {"run_dir": "/mnt/runs/tiny"}}, *(event for _, event in TOLD), recovered))
    progress = load_progress(client, find_job(client, "tiny"))  # type: ignore[arg-type]
    assert (progress["restarts"], progress["recovery_s"], progress["recovery_stages_s"]) == (1, 9.0, {"noticing": 9.0})


WARMED = """
import sys
from types import SimpleNamespace as plan
from launcher.job import worker as module
from launcher.job.worker import Place, Worker
module.TRAINING_SIDE = "wave"
worker = Worker(0, {})
worker.locate = lambda: Place("id", "here", "127.0.0.1", 1, None)
worker.warm_up(plan(layout=plan(threads_per_worker=1, accelerator="cpu")), None, ["json", "colorsys", "made.up.as.it.ran"])
print("colorsys" in worker.list_modules(), "wave" in sys.modules)
"""


def test_a_spare_has_imported_what_the_worker_had_and_leaves_what_was_made_up() -> None:
    done = subprocess.run([sys.executable, "-c", WARMED], capture_output=True, text=True, check=False, timeout=240)
    assert done.stdout.split() == ["True", "True"], done.stderr
