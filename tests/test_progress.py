"""What a run shows: a few plain lines in a pipe, a bar on a terminal, and what it came to."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from launcher.progress import (
    LiveDisplay,
    PlainDisplay,
    describe_change,
    describe_event,
    format_perplexity,
    make_display,
    make_summary,
    printable,
)

TOTAL = 20


def step(number: int, **changes: Any) -> dict[str, Any]:
    facts = {"event": "step", "step": number, "total_steps": TOTAL, "epoch": 0.1, "loss": 3.0 / number, "lr": 1e-4, "grad_norm": 1.0,
             "tokens_per_s": 1234.5, "samples_seen": 8 * number, "tokens_seen": 800 * number, "memory_bytes": 3 << 29, "step_s": 0.5}  # fmt: skip
    return facts | changes


def evaluation(when: str, at: int, loss: float) -> dict[str, Any]:
    return {"event": "eval", "when": when, "step": at, "loss": loss, "perplexity": math.exp(loss), "tokens": 770}


RUN: list[dict[str, Any]] = [
    {"event": "phase", "name": "loading model"},
    {
        "event": "data",
        "split": "train",
        "examples": 360,
        "samples": 94,
        "tokens": 22442,
        "target_tokens": 7289,
        "fill": 0.93,
        "dropped": 2,
        "truncated": 0,
    },
    {"event": "start", "total_steps": TOTAL, "world_size": 2, "trainable_params": 2_442_240, "num_params": 136_957_248},
    evaluation("before", 0, 4.0),
    {"event": "samples", "when": "before", "answers": [{"prompt": "Who?", "answer": "Nobody."}]},
    *(step(number) for number in range(1, 11)),
    evaluation("during", 10, 3.5),
    *(step(number) for number in range(11, TOTAL + 1)),
    {"event": "note", "text": "back to the weights of step 10"},
    evaluation("after", TOTAL, 3.0),
    {"event": "samples", "when": "after", "answers": [{"prompt": "Who?", "answer": "Ottoline."}]},
    {"event": "saved", "path": "/runs/x/model"},
    {"event": "end", "steps": TOTAL, "train_s": 83.0, "wall_s": 100.0},
]


class Clock:
    """Half a second passes at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def show_plain(events: list[dict[str, Any]]) -> list[str]:
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=Clock())
    for event in events:
        display.show(event)
    display.close()
    return stream.getvalue().splitlines()


def test_a_pipe_gets_plain_lines() -> None:
    stream = io.StringIO()
    display = make_display(stream)
    for event in RUN:
        display.show(event)
    display.close()
    assert isinstance(display, PlainDisplay)
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_plain_steps_are_thinned_but_the_first_and_the_last_are_there() -> None:
    steps = [line for line in show_plain(RUN) if line.startswith("step ")]
    assert steps[0].startswith("step  1/20  loss 3.0000  lr 1.0e-04  1.2k tok/s  1.5 GiB")
    assert steps[-1].startswith("step 20/20")
    assert len(steps) < 10


def test_a_step_held_back_is_shown_before_what_follows_it() -> None:
    lines = show_plain([step(1), step(2), evaluation("during", 2, 3.5)])
    assert [line[:9] for line in lines] == ["step  1/2", "step  2/2", "held-out "]


def test_closing_shows_the_last_step_of_a_run_that_broke() -> None:
    assert show_plain([step(1), step(2), step(3)])[-1].startswith("step  3/20")


def test_eta_is_the_smoothed_step_time_of_the_steps_left() -> None:
    assert show_plain([step(1, step_s=2.0)])[0].endswith("ETA 0:38")


def test_each_event_is_told_and_an_unknown_one_is_not() -> None:
    told = [describe_event(event) for event in RUN]
    assert all(told)
    assert told[1] == "train: 360 examples, 22.4k tokens, 7.3k with loss; 94 sequences, 93% full; 2 dropped"
    assert told[2] == "training: 20 steps on 2 ranks, 2.4M of 137.0M parameters (1.78%)"
    assert told[3] == "held-out (before training): loss 4.0000, perplexity 54.60"
    assert describe_event({"event": "of a later version"}) == ""


def test_a_terminal_gets_a_bar_and_its_cursor_back() -> None:
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=120))
    for event in RUN:
        display.show(event)
    display.close()
    text = stream.getvalue()
    assert "20/20" in text and "ETA 0:00" in text and "1.5 GiB" in text
    assert "held-out (after training)" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_live_display_that_is_closed_early_or_twice_is_no_trouble() -> None:
    display = LiveDisplay(Console(file=io.StringIO(), force_terminal=True))
    display.show(RUN[0])
    display.close()
    display.close()
    display.show(step(1))


def test_the_summary_is_what_the_events_say() -> None:
    summary = make_summary(RUN)
    assert summary.before is not None and summary.before["loss"] == 4.0
    assert summary.after is not None and summary.after["loss"] == 3.0
    assert summary.samples == (("Who?", "Nobody.", "Ottoline."),)
    assert (summary.train_s, summary.tokens_per_s, summary.memory_bytes) == (83.0, 1234.5, 3 << 29)


def test_the_summary_of_nothing_is_empty() -> None:
    summary = make_summary([])
    assert (summary.before, summary.after, summary.last_step, summary.samples, summary.tokens_per_s) == (None, None, None, (), None)


@pytest.mark.parametrize(
    ("before", "after", "told"), [(4.0, 3.0, "↓ 25.0%"), (2.0, 3.0, "↑ 50.0%"), (2.0, 2.0, "= 0.0%"), (0.0, 1.0, ""), (None, 1.0, "")]
)
def test_change(before: float | None, after: float | None, told: str) -> None:
    assert describe_change(before, after) == told


@pytest.mark.parametrize(("value", "told"), [(66.98, "66.98"), (1e9, "1.00e+09"), (math.inf, "inf"), (math.nan, "nan"), (None, "n/a")])
def test_perplexity(value: float | None, told: str) -> None:
    assert format_perplexity(value) == told


def test_what_a_model_writes_cannot_take_over_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x0bc\nd\te é 猫 🙂") == "a\ufffd[2Jb\ufffdc\nd\te é 猫 🙂"
