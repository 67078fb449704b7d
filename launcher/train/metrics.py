"""Where events go on rank 0: metrics.jsonl, the trackers, and whoever watches."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.plan import Plan
from launcher.run import Event, RunFolder
from launcher.train.budget import read_peak_resident


def open_report(
    plan: Plan, folder: RunFolder, rank: int, show: Callable[[Event], None]
) -> tuple[Callable[[Event], None], Callable[[], None]]:
    """`report(event)` and `close()`; both do nothing on other ranks than 0.

    The event `start` says after which step this session goes on: what an earlier one reported beyond it is dropped then,
    so that the file, and TensorBoard, tell of one run without a break.
    """
    if rank != 0:
        return (lambda event: None), (lambda: None)
    trackers: list[Any] = []
    session_begins = _cut_unfinished_line(folder.metrics)
    planned = plan.memory.device("allocated" if plan.layout.accelerator == "cuda" else "total").p50
    # Line-buffered: an event is on disk when report returns.
    file = folder.metrics.open("a", buffering=1, encoding="utf-8")

    def report(event: Event) -> None:
        nonlocal file
        event = {**event, "time": time.time()}
        if event["event"] == "start":
            if session_begins:
                file.close()
                rewind_metrics(folder.metrics, session_begins, event["step"])
                file = folder.metrics.open("a", buffering=1, encoding="utf-8")
            purge_step = event["step"] + 1 if session_begins else None
            trackers.extend(_open_tracker(name, plan, folder, purge_step) for name in plan.recipe.track.to)
        if event["event"] == "step":
            event["memory_bytes"] = read_peak_memory()
            event["memory_planned_bytes"] = planned
            last = event["step"] == event["total_steps"]
            if event["step"] % plan.recipe.track.every_steps and not last:
                show(event)
                return
        file.write(json.dumps(event) + "\n")
        for tracker in trackers:
            values = _tracked(event)
            if values:
                tracker.log(values, step=event["step"])
        show(event)

    def close() -> None:
        file.close()
        for tracker in trackers:
            tracker.finish()

    return report, close


def _cut_unfinished_line(path: Path) -> int:
    """Drop a last line that a kill cut short; returns the bytes that are left."""
    if not path.exists():
        return 0
    whole = path.read_bytes().rfind(b"\n") + 1
    os.truncate(path, whole)
    return whole


def rewind_metrics(path: Path, session_begins: int, step: int) -> None:
    """Drop from earlier sessions, which end at byte `session_begins`, all that came after `step` was done; in one move.

    Nothing of them stays where the run starts over. A save is told of some steps late: that of `step` stays, wherever it stands.
    A line that a power cut garbled is dropped.
    """
    with path.open("rb") as file:
        earlier, current = file.read(session_begins), file.read()
    kept: list[bytes] = []
    beyond = step == 0
    for line in earlier.splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        beyond = beyond or event.get("step", 0) > step or event.get("when") == "after" or event["event"] in ("saved", "end")
        if not beyond or (event["event"] == "checkpoint" and event["step"] <= step):
            kept.append(line)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(b"".join(kept) + current)
    unfinished.replace(path)


def _tracked(event: Event) -> dict[str, float]:
    """What of an event trackers plot."""
    if event["event"] == "step":
        names = ("loss", "lr", "grad_norm", "tokens_per_s", "epoch", "memory_bytes")
        return {f"train/{name}": event[name] for name in names if event[name] is not None}
    if event["event"] == "eval":
        return {"eval/loss": event["loss"], "eval/perplexity": event["perplexity"]}
    return {}


def _open_tracker(name: str, plan: Plan, folder: RunFolder, purge_step: int | None) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    check_trackers((name,))
    PartialState(cpu=plan.layout.accelerator == "cpu")  # accelerate's trackers log through it; it takes over the group there is
    project, run = plan.recipe.track.project, Path(plan.run_dir).name
    if name == "tensorboard":
        # Hides what an earlier session wrote from this step on.
        tracker: Any = TensorBoardTracker(run, folder.trackers, purge_step=purge_step)
    elif name == "wandb":
        tracker = WandBTracker(project, name=run, dir=str(folder.path))
    else:
        import mlflow

        if not mlflow.is_tracking_uri_set():  # its own default is a database in whatever folder the command was typed in
            folder.trackers.mkdir(exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder.trackers / 'mlflow.db'}")
        tracker = MLflowTracker(project, run_name=run)
    # Only rank 0 gets here; accelerate need not find that out again.
    tracker.main_process_only = False
    tracker.start()
    return tracker


def check_trackers(names: Sequence[str]) -> None:
    """Raises DataError for a tracker whose package is not installed. Imports nothing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise DataError(f"track.to: {name} is not installed", f"pip install {name}, or take it out of track.to")


def read_peak_memory() -> int:
    """Peak bytes so far: what torch allocated on the GPU, or this process's resident memory on CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else read_peak_resident()
