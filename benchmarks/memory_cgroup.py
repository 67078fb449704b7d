"""A 1.1B-parameter model in a memory cgroup set to what its plan says and a tenth more: QLoRA trains there, full fine-tuning is killed.

    python benchmarks/memory_cgroup.py [--out FILE]      (as root, cgroup v1)

TinyLlama's geometry, random weights, one rank of launcher.train.worker. benchmarks/results/memory-cgroup.json has the last run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory_matrix import RESULTS, ROOT, Case, case_facts, make_plan_of, read_events, save_results

CGROUPS = Path("/sys/fs/cgroup/memory")
QLORA = Case(model="1.1b", method={"kind": "qlora", "r": 16}, seq_len=64)
FULL = Case(model="1.1b", method={"kind": "full"}, seq_len=64)


def why_not() -> str:
    """Why this machine cannot do it; nothing where it can."""
    if os.geteuid():
        return "only root may make a cgroup"
    return "" if (CGROUPS / "memory.limit_in_bytes").exists() else "there is no cgroup v1 for memory"


def run_within(plan: Any, limit: int, timeout: float) -> dict[str, Any]:
    """The plan's one rank in a cgroup of `limit` bytes: how it ended and the most that the kernel counted."""
    group = CGROUPS / f"lepton-launch-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(limit))
    env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": str(plan.layout.threads_per_worker)}  # fmt: skip
    join = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -m launcher.train.worker {plan.run_dir}/plan.json"
    began = time.perf_counter()
    try:
        done = subprocess.run(["sh", "-c", join], capture_output=True, text=True, timeout=timeout, check=False, env=env)
        return {"ended": done.returncode, "said": done.stderr[-500:], "seconds": time.perf_counter() - began,
                "peak": int((group / "memory.max_usage_in_bytes").read_text()), "refused": int((group / "memory.failcnt").read_text())}  # fmt: skip
    finally:
        group.rmdir()


def measure(folder: Path, timeout: float = 900) -> dict[str, Any]:
    from launcher.plan.budget import judge

    small, large = (make_plan_of(case, folder, "cpu") for case in (QLORA, FULL))
    needs = {name: plan.memory.device("total") for name, plan in (("qlora", small), ("full", large))}
    limit = int(1.1 * needs["qlora"].p50)
    found: dict[str, Any] = {"limit": limit}
    for name, case, plan in (("qlora", QLORA, small), ("full", FULL, large)):
        ended = run_within(plan, limit, timeout)
        steps = [event["step"] for event in read_events(plan.run_dir) if event["event"] == "step"]
        found[name] = {**case_facts(case), "predicted": needs[name].p50, "predicted_p95": needs[name].p95, "verdict": judge(needs[name], limit),
                       "steps": max(steps, default=0), **ended}  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory-cgroup.json")
    parser.add_argument("--folder", type=Path, help="where models and runs are kept; a temporary folder unless told")
    args = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(args.folder or Path(temporary))
    for name in ("qlora", "full"):
        row = found[name]
        print(f"{name}: predicted {row['predicted'] / 2**30:.2f} GiB, {row['verdict']} {found['limit'] / 2**30:.2f} GiB; ended with {row['ended']}"
              f" after {row['steps']} steps and at most {row['peak'] / 2**30:.2f} GiB")  # fmt: skip
    save_results(args.out, [found["qlora"], found["full"]], benchmark="a memory cgroup", limit=found["limit"])


if __name__ == "__main__":
    main()
