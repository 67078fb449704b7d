"""metrics.jsonl and TensorBoard tell of one run, however often it was broken off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import plan_tiny

from launcher.run import Event, RunFolder
from launcher.train.metrics import open_report


def step(number: int, loss: float) -> Event:
    return {"event": "step", "step": number, "total_steps": 9, "loss": loss, "lr": 1.0, "grad_norm": 1.0, "tokens_per_s": 1.0, "epoch": 0.1}


def report_session(tiny: Path, run_dir: Path, start: int, events: list[Event], trackers: tuple[str, ...] = ()) -> None:
    report, close = open_report(plan_tiny(tiny, run_dir, track={"to": list(trackers)}), RunFolder(run_dir), 0, lambda event: None)
    report({"event": "phase", "name": "reading data"})
    report({"event": "start", "step": start})
    for event in events:
        report(event)
    close()


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def told(run_dir: Path) -> list[tuple[str, int | None]]:
    return [(event["event"], event.get("step")) for event in read_lines(run_dir) if event["event"] != "phase"]


FIRST = [step(1, 0.1), step(2, 0.2), {"event": "eval", "when": "during", "step": 2, "loss": 1.0, "perplexity": 2.7}, step(3, 0.3),
         {"event": "checkpoint", "step": 2}, {"event": "note", "text": "late"}, step(4, 0.4), {"event": "checkpoint", "step": 4}]  # fmt: skip


def test_what_came_after_the_checkpoint_is_dropped_and_its_own_save_is_kept(tiny: Path, tmp_path: Path) -> None:
    report_session(tiny, tmp_path, 0, FIRST)
    report_session(tiny, tmp_path, 2, [step(3, 0.33), step(4, 0.44)])
    assert told(tmp_path) == [
        ("start", 0),
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("checkpoint", 2),
        ("start", 2),
        ("step", 3),
        ("step", 4),
    ]
    assert [event["loss"] for event in read_lines(tmp_path) if event["event"] == "step"] == [0.1, 0.2, 0.33, 0.44]
    report_session(tiny, tmp_path, 4, [step(5, 0.5)])  # nothing beyond: nothing is lost
    assert [event["step"] for event in read_lines(tmp_path) if event["event"] == "step"] == [1, 2, 3, 4, 5]


def test_a_run_that_starts_over_tells_nothing_of_before(tiny: Path, tmp_path: Path) -> None:
    report_session(tiny, tmp_path, 0, FIRST[:1])
    report_session(tiny, tmp_path, 0, [step(1, 0.11)])
    assert told(tmp_path) == [("start", 0), ("step", 1)]
    assert read_lines(tmp_path)[-1]["loss"] == 0.11


@pytest.mark.parametrize("garbage", [b'{"event": "step", "ste', b"\0" * 40 + b"\n", b"\xff\xfe\n"])
def test_lines_that_a_power_cut_garbled_are_dropped(garbage: bytes, tiny: Path, tmp_path: Path) -> None:
    report_session(tiny, tmp_path, 0, FIRST)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(garbage)
    report_session(tiny, tmp_path, 4, [step(5, 0.5)])
    assert [event["step"] for event in read_lines(tmp_path) if event["event"] == "step"] == [1, 2, 3, 4, 5]


def test_the_evaluation_after_training_is_measured_again(tiny: Path, tmp_path: Path) -> None:
    """Killed between the last step and the end: the last save stands, what followed it comes again."""
    after = {"event": "eval", "when": "after", "step": 4, "loss": 0.9, "perplexity": 2.5}
    report_session(tiny, tmp_path, 0, [*FIRST, after, {"event": "saved", "path": "model"}])
    report_session(tiny, tmp_path, 4, [after])
    assert [event["event"] for event in read_lines(tmp_path)].count("eval") == 2
    assert not any(event["event"] == "saved" for event in read_lines(tmp_path))


@pytest.mark.parametrize("start", [0, 2])
def test_tensorboard_hides_what_was_broken_off(start: int, tiny: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report_session(tiny, tmp_path, 0, FIRST, ("tensorboard",))
    report_session(tiny, tmp_path, start, [step(number, number / 100) for number in range(start + 1, 6)], ("tensorboard",))
    (folder,) = {path.parent for path in (tmp_path / "trackers").rglob("events.out.tfevents.*")}
    assert len(list(folder.iterdir())) == 2
    shown = EventAccumulator(str(folder))
    shown.Reload()
    points = {scalar.step: round(scalar.value, 3) for scalar in shown.Scalars("train/loss")}
    assert len(shown.Scalars("train/loss")) == 5
    assert points == {number: (number / 10 if number <= start else number / 100) for number in range(1, 6)}
