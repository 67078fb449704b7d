"""Where events go on rank 0: metrics.jsonl, the trackers, and whoever watches."""

from __future__ import annotations

import importlib.util
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.plan import Plan
from launcher.run import Event, RunFolder


def open_report(
    plan: Plan, folder: RunFolder, rank: int, show: Callable[[Event], None]
) -> tuple[Callable[[Event], None], Callable[[], None]]:
    """`report(event)` and `close()`; both do nothing on other ranks than 0."""
    if rank != 0:
        return (lambda event: None), (lambda: None)
    trackers = [_open_tracker(name, plan, folder) for name in plan.recipe.track.to]
    # Line-buffered: an event is on disk when report returns.
    file = folder.metrics.open("a", buffering=1, encoding="utf-8")

    def report(event: Event) -> None:
        event = {**event, "time": time.time()}
        if event["event"] == "step":
            event["memory_bytes"] = read_peak_memory()
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


def _tracked(event: Event) -> dict[str, float]:
    """What of an event trackers plot."""
    if event["event"] == "step":
        names = ("loss", "lr", "grad_norm", "tokens_per_s", "epoch", "memory_bytes")
        return {f"train/{name}": event[name] for name in names if event[name] is not None}
    if event["event"] == "eval":
        return {"eval/loss": event["loss"], "eval/perplexity": event["perplexity"]}
    return {}


def _open_tracker(name: str, plan: Plan, folder: RunFolder) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    check_trackers((name,))
    PartialState(cpu=plan.layout.accelerator == "cpu")  # accelerate's trackers log through it; it takes over the group there is
    project, run = plan.recipe.track.project, Path(plan.run_dir).name
    if name == "tensorboard":
        tracker: Any = TensorBoardTracker(run, folder.trackers)
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

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
