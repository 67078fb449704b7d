"""calibrate: this machine's constants, measured once, for every later dry run."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launcher.cli.app import JsonOption, app, print_json
from launcher.errors import ClusterError, LauncherError

if TYPE_CHECKING:
    from launcher.plan.calibration import Calibration

TRAINING_SIDE = "launcher.train.calibrate"
TIMEOUT_S = 300


@app.command()
def calibrate(
    accelerator: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="What to measure; the GPUs where there are some.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what libraries, driver and network take of this machine's memory, and keep it for later dry runs."""
    from launcher.cluster import find_gpus
    from launcher.plan.calibration import save_calibration
    from launcher.view import show_path
    from launcher.view_plan import print_calibration

    gpus = find_gpus()
    if accelerator == "cuda" and not gpus:
        raise ClusterError("no GPU was found", "calibrate the CPU: lepton-launch calibrate --accelerator cpu")
    chosen = accelerator or ("cuda" if gpus else "cpu")
    print("measuring: about half a minute ...", file=sys.stderr)
    calibration = _measure(chosen)
    path = save_calibration(calibration)
    if as_json:
        print_json(dataclasses.asdict(calibration) | {"path": str(path)})
    else:
        print_calibration(calibration, sys.stdout)
        print(f"kept in {show_path(path)}; dry runs for this machine use it from now on")


def _measure(accelerator: str) -> Calibration:
    """In a process of its own: what this one has loaded must not count."""
    from launcher.plan.calibration import Calibration
    from launcher.versions import read_versions

    command = [sys.executable, "-m", TRAINING_SIDE, accelerator]
    environment = {**os.environ, "DS_ACCELERATOR": accelerator, "TOKENIZERS_PARALLELISM": "false"}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise LauncherError(f"measuring took more than {TIMEOUT_S} s", "try again when the machine is idle") from None
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LauncherError(f"measuring failed: {last}", f"see why: {' '.join(command)}")
    facts: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return Calibration(measured_at=now, versions=read_versions(), **facts)
