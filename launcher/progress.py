"""What a run shows while it goes, and what it came to: a live bar on a terminal, plain lines elsewhere. No torch, no ray.

The run's events (launcher.run.Event) are the input; what is shown is never more than they say.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from launcher.run import Event
from launcher.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL_S = 2.0
PACE_WEIGHT = 0.1
"""Weight of the newest step in the smoothed step time that the ETA stands on."""


class Display(Protocol):
    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


def make_display(stream: TextIO | None = None) -> Display:
    """A live display where `stream` (stdout) is a terminal that can move its cursor, else plain lines."""
    from rich.console import Console

    stream = stream or sys.stdout
    console = Console(file=stream, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console)
    return PlainDisplay(stream)


class PlainDisplay:
    """A line an event; of the steps the first, the last, and one every `interval_s` seconds."""

    def __init__(self, stream: TextIO, interval_s: float = PLAIN_INTERVAL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._interval_s, self._clock = stream, interval_s, clock
        self._pace = Pace()
        self._shown_at: float | None = None
        self._held: str | None = None

    def show(self, event: Event) -> None:
        if event.get("event") == "step":
            self._show_step(event)
            return
        line = describe_event(event)
        if line:
            self._release()
            self._print(line)

    def close(self) -> None:
        self._release()

    def _show_step(self, event: Event) -> None:
        self._pace.add(event)
        self._held = f"{describe_event(event)}  ETA {format_duration(self._pace.left_s)}"
        now = self._clock()
        last = event["step"] >= event["total_steps"]
        if self._shown_at is None or last or now - self._shown_at >= self._interval_s:
            self._shown_at = now
            self._release()

    def _release(self) -> None:
        if self._held is not None:
            self._print(self._held)
        self._held = None

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class LiveDisplay:
    """A spinner that names the phase, then a bar with loss, learning rate, tokens/s, ETA and memory."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._pace = Pace()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def show(self, event: Event) -> None:
        kind = event.get("event")
        if kind == "phase":
            self._start_phase(str(event["name"]))
        elif kind == "waiting":
            self._start_phase(describe_event(event))
        elif kind == "start":
            self._print(event)
            self._start_steps(event["total_steps"])
        elif kind == "step":
            self._show_step(event)
        else:
            self._print(event)
            if kind == "end":
                self._start_phase("trained")
                self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def _start_phase(self, name: str) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=name)
            return
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=self._console, transient=True
        )
        self._task = self._progress.add_task(name, total=None)
        self._progress.start()

    def _start_steps(self, total_steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.close()
        name, facts = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[facts]}", markup=False)
        self._progress = Progress(name, BarColumn(bar_width=None), MofNCompleteColumn(), facts, console=self._console, expand=True)
        self._task = self._progress.add_task("train", total=total_steps, facts="")
        self._progress.start()

    def _show_step(self, event: Event) -> None:
        self._pace.add(event)
        facts = f"{_step_facts(event)}  ETA {format_duration(self._pace.left_s)}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description="train", completed=event["step"], facts=facts)

    def _print(self, event: Event) -> None:
        line = describe_event(event)
        if line:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Pace:
    """Smoothed seconds a step, and from it the seconds that are left."""

    def __init__(self) -> None:
        self._step_s: float | None = None
        self.left_s = 0.0

    def add(self, event: Event) -> None:
        step_s = float(event.get("step_s") or 0.0)
        self._step_s = step_s if self._step_s is None else (1 - PACE_WEIGHT) * self._step_s + PACE_WEIGHT * step_s
        self.left_s = self._step_s * (event["total_steps"] - event["step"])


def describe_event(event: Event) -> str:
    """One line that says what happened; empty for an event there is nothing to say about."""
    describe = _DESCRIBE.get(str(event.get("event")))
    return describe(event) if describe else ""


def _describe_data(event: Event) -> str:
    line = f"{event['split']}: {event['examples']} examples, {format_count(event['tokens'])} tokens, {format_count(event['target_tokens'])} with loss"
    if event.get("fill") is not None:
        line += f"; {event['samples']} sequences, {event['fill']:.0%} full"
    left_out = [f"{event[key]} {key}" for key in ("dropped", "truncated") if event.get(key)]
    return "; ".join([line, *left_out])


def _describe_start(event: Event) -> str:
    share = event["trainable_params"] / max(1, event["num_params"])
    parameters = f"{format_count(event['trainable_params'])} of {format_count(event['num_params'])} parameters ({share:.2%})"
    line = f"training: {event['total_steps']} steps on {event['world_size']} rank{'s' if event['world_size'] != 1 else ''}, {parameters}"
    return f"{line}\ngoing on after step {event['step']}, from {event['from']}" if event.get("step") else line


def _describe_eval(event: Event) -> str:
    when = {"before": "before training", "after": "after training"}.get(event.get("when", ""), f"step {event.get('step')}")
    return f"held-out ({when}): loss {format_loss(event['loss'])}, perplexity {format_perplexity(event['perplexity'])}"


def describe_memory(figures: dict[str, dict[str, float]]) -> str:
    """What was measured beside what was planned: "memory: allocated 10.1 GiB (planned 10.0 GiB, +1%)"."""
    told = [
        f"{name} {format_bytes(figure['measured'])} (planned {format_bytes(figure['predicted'])}, {figure['error']:+.0%})"
        for name, figure in figures.items()
    ]
    return "memory: " + ", ".join(told)


def _describe_step(event: Event) -> str:
    width = len(str(event["total_steps"]))
    return f"step {event['step']:>{width}}/{event['total_steps']}  {_step_facts(event)}"


def _step_facts(event: Event) -> str:
    facts = [f"loss {format_loss(event['loss'])}", f"lr {event['lr']:.1e}", f"{format_count(round(event['tokens_per_s']))} tok/s"]
    if event.get("memory_bytes"):
        planned = f" of {format_bytes(event['memory_planned_bytes'])} planned" if event.get("memory_planned_bytes") else ""
        facts.append(format_bytes(event["memory_bytes"]) + planned)
    return "  ".join(facts)


def _describe_recovery(event: Event) -> str:
    again = f"{event['steps_again']} steps are taken again" if event["steps_again"] != 1 else "one step is taken again"
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in event["stages_s"].items() if seconds >= 0.05)
    return f"recovered in {event['recovery_s']:.1f} s ({stages}); {again}"


_DESCRIBE: dict[str, Callable[[Event], str]] = {
    "phase": lambda event: f"{event['name']} ...",
    "data": _describe_data,
    "start": _describe_start,
    "eval": _describe_eval,
    "samples": lambda event: f"answered the sample prompts, {event['when']} training",
    "step": _describe_step,
    "memory": lambda event: describe_memory(event["figures"]),
    "early_stop": lambda event: (
        f"stopped early at step {event['step']}: best held-out loss {format_loss(event['best_loss'])} at step {event['best_step']}"
    ),
    "saved": lambda event: f"saved {event['path']}",
    "checkpoint": lambda event: (
        f"checkpoint of step {event['step']}: {format_bytes(event['bytes'])} written in {event['write_s']:.1f} s, training waited {event['stall_s']:.2f} s"
    ),
    "checkpoint_failed": lambda event: f"NO CHECKPOINT of step {event['step']}: {event['why']}; training goes on",
    "end": lambda event: f"trained {event['steps']} steps in {format_duration(event['train_s'])}",
    "note": lambda event: str(event["text"]),
    "waiting": lambda event: f"waiting for nodes: {event['text']} ({format_duration(event['left_s'])} left)",
    "restart": lambda event: f"restarting: {event['text']}",
    "recovered": _describe_recovery,
    "log": lambda event: "" if event.get("quiet") else f"[{event['origin']}] {event['text']}",
}


def format_loss(loss: float | None) -> str:
    """Four decimals: 2.1034; "n/a" where there is none (a number that is not finite is null in JSON)."""
    return "n/a" if loss is None else f"{loss:.4f}"


def format_perplexity(perplexity: float | None) -> str:
    """Two decimals, or powers of ten once nobody reads the digits."""
    if perplexity is None:
        return "n/a"
    return f"{perplexity:.2f}" if not math.isfinite(perplexity) or perplexity < 1e4 else f"{perplexity:.2e}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run came to, from its events. `samples` are (prompt, answer before, answer after)."""

    before: Event | None
    after: Event | None
    first_step: Event | None
    last_step: Event | None
    samples: tuple[tuple[str, str, str], ...]
    train_s: float | None
    tokens_per_s: float | None
    memory_bytes: int | None


def make_summary(events: Iterable[Event]) -> Summary:
    """The summary of a run's events; what a broken run did not reach is None."""
    evals: dict[str, Event] = {}
    answers: dict[str, dict[str, str]] = {"before": {}, "after": {}}
    steps: list[Event] = []
    train_s = None
    for event in events:
        kind = event.get("event")
        if kind == "eval":
            evals[event["when"]] = event
        elif kind == "samples":
            answers[event["when"]] = {pair["prompt"]: pair["answer"] for pair in event["answers"]}
        elif kind == "step":
            steps.append(event)
        elif kind == "end":
            train_s = float(event["train_s"])
    prompts = dict.fromkeys([*answers["before"], *answers["after"]])
    return Summary(
        before=evals.get("before"),
        after=evals.get("after"),
        first_step=steps[0] if steps else None,
        last_step=steps[-1] if steps else None,
        samples=tuple((prompt, answers["before"].get(prompt, ""), answers["after"].get(prompt, "")) for prompt in prompts),
        train_s=train_s,
        tokens_per_s=_median([float(step["tokens_per_s"]) for step in steps[1:] or steps]),
        memory_bytes=max((int(step.get("memory_bytes") or 0) for step in steps), default=0) or None,
    )


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def describe_change(before: float | None, after: float | None) -> str:
    """The relative change with its direction: 4.0, 3.0 → "↓ 25.0%"."""
    if before is None or after is None or not before:
        return ""
    share = (after - before) / abs(before)
    return f"{'↓' if share < 0 else '↑' if share > 0 else '='} {abs(share):.1%}"


def printable(text: str) -> str:
    """Text without the control characters that would move a terminal's cursor or change its state: a model may write any."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
