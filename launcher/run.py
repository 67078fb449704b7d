"""The run folder: what a run leaves behind, and where each thing in it is. No torch, no ray.

RUN/
  recipe.yaml        the recipe as it was given        plan.json      what was decided from it
  metrics.jsonl      one event a line                  status.json    running, finished, failed or stopped
  model/             the adapter or the model, in the PEFT or transformers layout, with its card
  report.md          before and after, with loss.png   logs/          one file a rank
  trackers/          TensorBoard and the like
  checkpoints/       what a killed run goes on from, unless the recipe keeps them elsewhere (save.storage)
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.errors import CheckpointError, DataError, Fault, RecipeError

State = Literal["running", "finished", "failed", "stopped"]
Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def loss_picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers"

    def log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank-{rank:05d}.log"


def next_run_path(output_dir: Path, name: str) -> Path:
    """output_dir/name, or name-2, name-3 ... if that is taken: no run writes over another."""
    taken = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return output_dir.absolute() / next(n for n in names if n not in taken)


def make_run_folder(output_dir: Path, name: str, wanted: Path | None = None) -> RunFolder:
    """A new folder at `wanted`, or at `next_run_path` where that is taken. Raises RecipeError where none can be made."""
    while True:
        path = wanted if wanted is not None and not wanted.exists() else next_run_path(output_dir, name)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            (path / "logs").mkdir()
            return RunFolder(path.resolve())
        except FileExistsError as error:
            if not output_dir.is_dir():
                raise _no_folder(output_dir, error) from None
        except OSError as error:
            raise _no_folder(output_dir, error) from None


def _no_folder(output_dir: Path, error: OSError) -> RecipeError:
    problem = f"no folder can be made in {output_dir.absolute()}: {error.strerror}"
    return RecipeError([Fault("plan", "output_dir", problem, "set output_dir to a folder that can be written")])


@contextmanager
def hold_run(folder: RunFolder) -> Iterator[None]:
    """Inside, no second command on this machine works in the folder; the kernel lets go when the process ends, however it ends.

    Raises CheckpointError where another holds it.
    """
    handle = os.open(folder.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            facts = read_status(folder)
            who = f"process {facts['pid']} on {facts['host']}" if "pid" in facts else "another process"
            raise CheckpointError(
                f"{folder.path} is at work: {who} runs it", "wait for it or stop it; --fresh starts another beside it"
            ) from None
        except OSError:
            pass  # a file system without locks; the lease on the checkpoints stands
        yield
    finally:
        os.close(handle)


def read_status(folder: RunFolder) -> dict[str, Any]:
    """What status.json says; empty where there is none."""
    try:
        facts = json.loads(folder.status.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def find_run(name_or_path: str, output_dir: str = "runs") -> RunFolder:
    """The run folder of a path, or of a name under `output_dir`. Raises DataError."""
    for path in (Path(name_or_path), Path(output_dir) / name_or_path):
        if (path / "plan.json").is_file():
            return RunFolder(path.resolve())
    there = sorted(p.parent.name for p in Path(output_dir).glob("*/plan.json"))
    raise DataError(f"no run {name_or_path}", f"runs in {output_dir}/: {', '.join(there)}" if there else f"{output_dir}/ holds no run")


def write_status(folder: RunFolder, state: State, **facts: Any) -> None:
    """Replace status.json in one move, so that a reader never sees half of it."""
    temporary = folder.status.with_suffix(".tmp")
    temporary.write_text(json.dumps({"state": state, "time": time.time(), **facts}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder.status)


def read_events(folder: RunFolder) -> Iterator[Event]:
    """The events of metrics.jsonl in order; a last line that a kill cut short is left out."""
    with folder.metrics.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def cache_dir() -> Path:
    """Where what can be made again is kept: tokens, converted weights. $XDG_CACHE_HOME/lepton-launch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lepton-launch"
