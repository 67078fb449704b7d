"""The loop on a real GPU: `make gpu-check`. Under torchrun, since the machines that have a GPU here have no Ray.

Each run is the one that the CPU tests make, on the GPU that is found: it must learn, and lose what a CPU run loses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from ranks import evaluations, losses
from tiny import make_recipe

from launcher.cluster import find_gpus, find_local_cluster
from launcher.plan import make_plan
from launcher.run import Event, RunFolder, read_events

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not find_gpus(), reason="nvidia-smi shows no GPU")]

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "r": 8},
    "qlora-4": {"kind": "qlora", "r": 8},
    "qlora-8": {"kind": "qlora", "r": 8, "bits": 8},
}


def run_under_torchrun(tiny: Path, folder: Path, accelerator: Any, **sections: Any) -> list[Event]:
    """The events of a run of one rank, planned for this machine."""
    (folder / "logs").mkdir(parents=True)
    plan = make_plan(make_recipe(tiny, **sections), find_local_cluster(1, accelerator), base_dir=str(tiny), run_dir=str(folder))
    plan.save(folder / "plan.json")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone", "-m", "launcher.train.worker"]
    done = subprocess.run([*words, str(folder / "plan.json")], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(read_events(RunFolder(folder)))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_in_the_dtype_of_the_gpu(method: str, stage: int, tiny: Path, tmp_path: Path) -> None:
    """bf16 over NCCL, SDPA or flash attention, Liger's kernels where they are installed: what a recipe gets unasked."""
    sections = {"method": METHODS[method], "parallel": {"zero_stage": stage}, "schedule": {"max_steps": 20}}
    events = run_under_torchrun(tiny, tmp_path / "run", "cuda", **sections)
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["layout"]["backend"] == "nccl" and plan["layout"]["dtype"] in ("bf16", "fp16")
    assert evaluations(events, "after")[0] < evaluations(events, "before")[0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_in_fp32_it_loses_what_a_cpu_loses(method: str, tiny: Path, tmp_path: Path) -> None:
    sections = {"model": {"dtype": "fp32", "liger_kernel": False}, "method": METHODS[method]}
    there = run_under_torchrun(tiny, tmp_path / "gpu", "cuda", **sections)
    here = run_under_torchrun(tiny, tmp_path / "cpu", "cpu", **sections)
    assert losses(there) == pytest.approx(losses(here), abs=2e-3)


@pytest.mark.timeout(7200)
def test_memory_is_what_was_predicted(tmp_path: Path) -> None:
    """The whole matrix in benchmarks/results/memory-gpu.json, of which what is missing is run here: allocated within 2 % median and 5 % at worst,
    reserved and the device within 5 % and 12 %."""
    from statistics import median

    from benchmarks.memory_gpu import CASES, run_all
    from benchmarks.memory_matrix import RESULTS

    names = {case.name for case in CASES}
    rows = [row for row in run_all(CASES, tmp_path, RESULTS / "memory-gpu.json") if row["name"] in names]
    done = [row["figures"] for row in rows if "figures" in row]
    assert len(done) >= len(CASES) // 2, [row["failed"][:300] for row in rows if "failed" in row]
    for figure, usual, worst in (("allocated", 0.02, 0.05), ("reserved", 0.05, 0.12), ("device total", 0.05, 0.12)):
        errors = [abs(row[figure]["error"]) for row in done]
        assert median(errors) <= usual and max(errors) <= worst, (figure, sorted(errors)[-3:])
