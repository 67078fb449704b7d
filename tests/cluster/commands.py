"""The command as a user outside the cluster types it, and what its runs leave on the shared storage."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hosts import STORAGE

from launcher.run import Event, RunFolder, read_events

TOKEN = "a-token-that-only-the-tests-know-0123456789"
RECIPE = """
name: {name}
model: {{name_or_path: {storage}/tiny/model, dtype: fp32}}
method: {{kind: lora, r: 4}}
data: {{train: {storage}/tiny/train.jsonl, eval: {storage}/tiny/eval.jsonl, seq_len: 64}}
batch: {{global_batch_size: 8, micro_batch_size: 1}}
optim: {{lr: 3.0e-3}}
schedule: {{kind: constant, warmup_steps: 2, max_steps: {steps}, epochs: 1000}}
parallel: {{zero_stage: 2}}
track: {{to: []}}
"""


def write_recipe(folder: Path, name: str, steps: int = 6, more: str = "") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name, steps=steps, storage=STORAGE) + more)
    return path


def environment(token: str | None = TOKEN) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**own, "COLUMNS": "200", **({"RAY_AUTH_TOKEN": token} if token else {})}


def lepton(address: str, *words: str, token: str | None = TOKEN, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words, "--cluster", address],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment(token),
    )


class Attached:
    """A command that is attached to a run, its output read as it comes."""

    def __init__(self, address: str, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", *words, "--cluster", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=environment(),
        )
        self.lines: list[str] = []
        self.queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.queue.put(line)
        self.queue.put(None)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, within_s: float = 150) -> None:
        """Return once a line holds `text`."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                line = self.queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {text!r} within {within_s} s:\n{self.output}") from None
            if line is None:
                raise AssertionError(f"it ended without {text!r}:\n{self.output}")
            self.lines.append(line)
            if text in line:
                return

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self, within_s: float = 240) -> int:
        """The exit code, once it has ended by itself."""
        code = self.process.wait(within_s)
        while (line := self.queue.get(timeout=10)) is not None:
            self.lines.append(line)
        return code


def run_folder(storage: Path, name: str) -> RunFolder:
    """The run's folder, as this machine sees it."""
    return RunFolder(storage / "runs" / name)


def events_of(folder: RunFolder) -> list[Event]:
    return list(read_events(folder)) if folder.metrics.exists() else []


def last_step(folder: RunFolder) -> int:
    return max((event["step"] for event in events_of(folder) if event["event"] == "step"), default=0)


def losses_of(folder: RunFolder) -> dict[int, float]:
    """The loss of each step; of a step that was taken twice, the later one."""
    return {event["step"]: event["loss"] for event in events_of(folder) if event["event"] == "step"}


def wait_until(what: Callable[[], Any], within_s: float, why: str) -> None:
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, f"not within {within_s} s: {why}"
        time.sleep(0.1)


def wait_for_step(folder: RunFolder, step: int, within_s: float = 150) -> None:
    wait_until(lambda: last_step(folder) >= step, within_s, f"step {step} of {folder.path.name}, which is at {last_step(folder)}")


def status_of(folder: RunFolder) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(folder.status.read_text())
    return facts
