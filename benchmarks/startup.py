"""From the command to the first optimizer step: lepton-launch on its embedded Ray beside torchrun of the same loop.

    python benchmarks/startup.py [--rounds 3] [--out FILE]

Both run the same plan (tiny or the quickstart's model), in turns. The embedded Ray's own start, which torchrun does not
have, is measured apart: from ray.init until two no-op actors have answered.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def seconds_to_first_step(words: list[str], environment: dict[str, str]) -> float:
    """Wall seconds from starting a command until metrics.jsonl of its run holds a step; then it is interrupted."""
    run_dir = Path(environment["BENCH_RUN"])
    began = time.perf_counter()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = run_dir / "metrics.jsonl"
    try:
        while True:
            if metrics.exists() and '"event": "step"' in metrics.read_text():
                return time.perf_counter() - began
            if process.poll() is not None:
                raise RuntimeError(process.stderr.read() if process.stderr else "it ended")
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)


START_OF_RAY = """
import time; began = time.perf_counter()
import contextlib
from launcher.job.local import _own_ray
from launcher.plan import load_plan
from pathlib import Path
import sys
class Noop:
    def answer(self): return 1
with _own_ray(load_plan(Path(sys.argv[1]))) as ray:
    actors = [ray.remote(num_cpus=1)(Noop).remote() for _ in range(2)]
    ray.get([actor.answer.remote() for actor in actors])
    print(time.perf_counter() - began)
"""


def measure_ray(plan: Path) -> float:
    done = subprocess.run([sys.executable, "-c", START_OF_RAY, str(plan)], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def one_round(folder: Path, number: int) -> dict[str, float]:
    recipe = ROOT / "recipes/quickstart.yaml"
    overrides = [f"output_dir={folder}", f"name=ray-{number}", "evaluate.samples=[]", "data.eval=[]", "track.to=[]"]
    launch = [sys.executable, "-m", "launcher.cli", str(recipe), *overrides]
    through_ray = seconds_to_first_step(launch, {**os.environ, "BENCH_RUN": str(folder / f"ray-{number}")})

    ray_run, torch_run = folder / f"ray-{number}", folder / f"torchrun-{number}"
    (torch_run / "logs").mkdir(parents=True)
    plan = json.loads((ray_run / "plan.json").read_text())
    (torch_run / "plan.json").write_text(json.dumps({**plan, "run_dir": str(torch_run)}))
    ranks, threads = plan["layout"]["workers_per_node"], str(plan["layout"]["threads_per_worker"])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--standalone",
        "-m",
        "launcher.train.worker",
        str(torch_run / "plan.json"),
    ]
    through_torchrun = seconds_to_first_step(torchrun, {**os.environ, "OMP_NUM_THREADS": threads, "BENCH_RUN": str(torch_run)})
    return {"lepton_launch_s": through_ray, "torchrun_s": through_torchrun, "ray_start_s": measure_ray(ray_run / "plan.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/startup-cpu.json")
    words = parser.parse_args()
    from launcher.versions import read_versions

    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        one_round(Path(folder), 0)  # fills the caches of tokens, weights and files
        for number in range(1, words.rounds + 1):
            rounds.append(one_round(Path(folder), number))
            print("  ".join(f"{name} {value:.1f}" for name, value in rounds[-1].items()), flush=True)
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    ratio = statistics.median((row["lepton_launch_s"] - row["ray_start_s"]) / row["torchrun_s"] for row in rounds)
    facts = {"benchmark": "startup", "date": time.strftime("%Y-%m-%d"), "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
             "versions": read_versions(), "rounds": rounds, "medians": medians, "over_torchrun_without_ray_start": ratio}  # fmt: skip
    words.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"medians: lepton-launch {medians['lepton_launch_s']:.1f} s, torchrun {medians['torchrun_s']:.1f} s, "
          f"Ray's own start {medians['ray_start_s']:.1f} s; without it ×{ratio:.2f} torchrun")  # fmt: skip


if __name__ == "__main__":
    main()
