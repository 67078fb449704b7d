"""The dry run beside other estimators, each as a whole process on the same config.json: python -m benchmarks.dry_run [--rounds 5] [--out FILE]

    lepton-launch --dry-run    all that docs/dry-run.md tells, for 405B on 64 GPUs and 8B on 8
    accelerate estimate-memory weights, gradients and Adam of one device (its question to the hub is answered at once: it takes no folder)
    deepspeed                  estimate_zero2/3_model_states_mem_needs_all_cold, given the parameters' number, so that it builds no model

They take turns, round by round; medians of wall seconds, of seconds of a core (which other work on the machine does not lengthen) and of peak
resident memory are reported. Then `auto` over all candidates of a recipe
that leaves everything open, and the table of errors on ../shared/data/measured_peaks.jsonl (benchmarks/readings.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.readings import READINGS, describe, score, sum_up
from launcher.plan.known import find_known

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "405B": ("meta-llama/Llama-3.1-405B-Instruct", 8, "llama-3.1-405b-qlora"),
    "8B": ("meta-llama/Llama-3.1-8B-Instruct", 1, "llama-3.1-8b-full"),
}
PACKAGES = ("lepton-launch", "accelerate", "deepspeed", "torch", "transformers")
ACCELERATE = """
import sys, types
from accelerate.commands import estimate
estimate.verify_on_hub = lambda repo, token=None: types.SimpleNamespace(config={}, library_name="transformers")
sys.argv = ["accelerate-estimate-memory", sys.argv[1], "--library_name", "transformers"]
estimate.main()
"""
DEEPSPEED = """
import sys
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs_all_cold as zero3
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs_all_cold as zero2
params, largest, nodes = map(int, sys.argv[1:])
zero2(total_params=params, num_gpus_per_node=8, num_nodes=nodes)
zero3(total_params=params, largest_layer_params=largest, num_gpus_per_node=8, num_nodes=nodes)
"""
ALL_AUTO = ("method.kind=lora", "method.quantization=auto", "model.loss=auto", "parallel.zero_stage=auto", "parallel.offload=auto",
            "parallel.reduce_bucket_size=auto", "memory.gradient_checkpointing=auto", "batch.global_batch_size=5760", "data.seq_len=1024")  # fmt: skip
AUTO_ON = {"8B": ("rtx-4090", 1), "405B": ("h100-80gb", 8)}


def measure(words: list[str]) -> tuple[dict[str, Any], str]:
    """Wall seconds, seconds of a core, peak resident bytes, and the output of a command."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode not in (0, 3):  # 3: it does not fit, which is an answer
        raise RuntimeError(f"{' '.join(words[:3])} ended with {process.returncode}:\n{text[-2000:]}")
    facts = {"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime, "peak_resident_bytes": used.ru_maxrss * 1024}
    return facts, text


def write_folder(place: Path, hub_id: str) -> Path:
    """A model's folder with its config.json, a chat template, and nothing in its weights."""
    known = find_known(hub_id)
    assert known is not None, hub_id
    folder = place / hub_id.rpartition("/")[2]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(known.config))
    (folder / "tokenizer_config.json").write_text('{"chat_template": ""}')
    (folder / "model.safetensors").touch()
    return folder


def list_commands(name: str, folder: Path) -> dict[str, list[str]]:
    """What is timed for one model."""
    hub_id, nodes, recipe = MODELS[name]
    known = find_known(hub_id)
    assert known is not None
    largest = known.config["vocab_size"] * known.config["hidden_size"]
    launch = [sys.executable, "-m", "launcher.cli", recipe, f"model.name_or_path={folder}"]
    return {
        "lepton-launch": [*launch, "--gpu", "h100-80gb", "--nodes", str(nodes), "--gpus-per-node", "8", "--dry-run"],
        "accelerate": [sys.executable, "-c", ACCELERATE, str(folder)],
        "deepspeed": [sys.executable, "-c", DEEPSPEED, str(known.params), str(largest), str(nodes)],
    }


def list_auto(name: str, folder: Path) -> list[str]:
    """A dry run that chooses everything."""
    gpu, nodes = AUTO_ON[name]
    words = [sys.executable, "-m", "launcher.cli", "llama-3.1-8b-lora", f"model.name_or_path={folder}", *ALL_AUTO]
    return [*words, "--gpu", gpu, "--nodes", str(nodes), "--gpus-per-node", "8", "--dry-run"]


def count_candidates(words: list[str]) -> dict[str, Any]:
    """How many there were to choose from, and how many were looked at: not timed, because --explain searches once more."""
    facts = json.loads(measure([*words, "--explain", "--json"])[1])
    return {"candidates": facts["candidates_total"], "considered": facts["candidates_considered"], "verdict": facts["verdict"]}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "median_s": statistics.median(run["seconds"] for run in runs),
        "median_cpu_s": statistics.median(run["cpu_s"] for run in runs),
        "all_s": [round(run["seconds"], 3) for run in runs],
        "peak_resident_mib": round(statistics.median(run["peak_resident_bytes"] for run in runs) / 2**20, 1),
    }


def run_benchmark(rounds: int) -> dict[str, Any]:
    commands: dict[tuple[str, str], list[str]] = {}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    counts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, (hub_id, _, _) in MODELS.items():
            folder = write_folder(Path(place), hub_id)
            commands |= {(name, tool): words for tool, words in list_commands(name, folder).items()}
            commands[name, "auto"] = list_auto(name, folder)
            counts[name] = count_candidates(commands[name, "auto"])
        for number in range(rounds + 1):  # the first fills caches, and is not counted
            for key, words in commands.items():
                facts, _ = measure(words)
                if number:
                    found.setdefault(key, []).append(facts)
    scores, left_out = score(READINGS)
    print(describe(scores, left_out), file=sys.stderr)
    return {
        "benchmark": "dry-run",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "load_before": os.getloadavg()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "rounds": rounds,
        "processes": {
            name: {tool: summarise(runs) for (model, tool), runs in found.items() if model == name and tool != "auto"} for name in MODELS
        },
        "auto": {name: summarise(found[name, "auto"]) | counts[name] for name in MODELS},
        "readings": {"errors": sum_up(scores), "scored": len(scores), "left_out": dict(left_out)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "dry-run-cpu.json")
    options = parser.parse_args()
    result = run_benchmark(options.rounds)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, tools in result["processes"].items():
        for tool, facts in tools.items():
            print(
                f"{name:5s} {tool:14s} {facts['median_s']:7.2f} s ({facts['median_cpu_s']:.2f} s of a core) {facts['peak_resident_mib']:8.1f} MiB"
            )
    for name, facts in result["auto"].items():
        print(
            f"{name:5s} auto over {facts['candidates']} candidates ({facts['considered']} looked at): {facts['median_s']:.2f} s ({facts['median_cpu_s']:.2f} s of a core)"
        )


if __name__ == "__main__":
    main()
