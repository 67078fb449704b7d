"""Published readings of GPU memory beside what the plan's arithmetic says: python -m benchmarks.readings [FILE].

FILE is ../shared/data/measured_peaks.jsonl unless told: one JSON object a line, with where each reading is from. It is no part of this repository.

A reading is scored if its fields meet these rules, whatever the error comes to be; the first that fails is the reason it is not.

1. Its figure is said to be allocated, reserved or nvidia-smi's, and is not rounded to a whole GB.
2. Micro-batch, sequence length, dtype and optimizer are given (a component benchmark gives its tensors' sizes instead).
3. It was made by code that this arithmetic tells: Liger's component benchmarks, or DeepSpeed's ZeRO.
4. It uses nothing that a recipe cannot say: no sequence parallelism, no tiled MLP, no torch.compile, no float8, no Muon.

No constant is fitted on a row. What differs from a run of this launcher is taken from the reading's own stack: reentrant checkpointing
(transformers 4.51's default), expandable segments where the launch line exports them, which of Liger's kernels are on.
The cuBLAS workspace, 8.125 MiB a handle, is torch's own default (at::cuda::getChosenWorkspaceSize). All rows were looked at while this was written.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.components import COMPONENTS
from launcher.units import GIB, MIB

READINGS = Path("../shared/data/measured_peaks.jsonl")
UNITS = {"MiB": MIB, "GiB": GIB, "GB": 10**9, "GB (1e9)": 10**9}
FIGURES = {"max_memory_allocated": "allocated", "memory_allocated": "allocated", "max reserved": "reserved", "nvidia-smi": "nvidia-smi"}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One reading: bytes measured and predicted, what kind of figure it is, and how much of its configuration is known (A: all)."""

    id: str
    grade: str
    figure: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def is_component(row: Row) -> bool:
    return str(row["model"]).startswith("component:")


def figure_of(row: Row) -> str | None:
    """Which of the three figures a reading is, as its metric says."""
    return next((figure for name, figure in FIGURES.items() if name in row["peak_metric"]), None)


def why_not(row: Row) -> str | None:
    """The first of the rules that a reading does not meet, by its configuration's fields; None for one that is scored."""
    if figure_of(row) is None or "unknown" in row["peak_metric"] or "rounded" in row["peak_metric"]:
        return "1: which figure it is, is not said"
    if not is_component(row) and any(row[field] is None for field in ("micro_batch", "seq_len", "weight_dtype", "optimizer")):
        return "2: batch, length, dtype or optimizer is not given"
    if not is_component(row) and "DeepSpeed ZeRO" not in row["framework"]:
        return f"3: made by {row['framework'].split()[0]}, whose model code or sharding is another"
    told = f"{row['loss_kernel']} {row['notes']} {row['weight_dtype']}"
    if any(word in told for word in ("Ulysses", "TiledMLP", "Float8", "NVFP4")) or row["compile"] or "Muon" in str(row["optimizer"]):
        return "4: sequence parallelism, tiled MLP, compile, float8 or Muon"
    return None


def predict(row: Row) -> float:
    """Bytes of a scored reading."""
    if is_component(row):
        return COMPONENTS[row["model"].removeprefix("component:")](json.loads(row["notes"]), row["framework"])
    return _predict_example(row) if row["source"] == "DeepSpeedExamples" else _predict_run(row)


def _predict_example(row: Row) -> float:
    """Steady state and step of the bf16_master_weight example, ZeRO-3. Its model (nn.MultiheadAttention) is not on the tape: the step alone."""
    width, layers, words, positions, ranks = 4096, 32, 50257, 512, row["n_gpus"]
    block = [3 * width**2, 3 * width, width**2, *[width] * 5, 4 * width**2, 4 * width, 4 * width**2, width]
    sizes = [words * width, positions * width, *block * layers, words * width, words]
    groups = [0]
    for part in (-(-size // ranks) for size in sizes):
        groups[-1] += part
        if groups[-1] >= 1_000_000_000:
            groups.append(0)
    low = "bf16" in row["id"]
    steady = (10 if low else 16) * sum(-(-size // ranks) for size in sizes) + 2 * 50_000_000 + 2 * positions * words + 32 * MIB
    return float(steady if "steady" in row["peak_metric"] else steady + (2 if low else 6) * max(groups))


def _predict_run(row: Row) -> float:
    """A fine-tuning under ZeRO-3 of a model that the launcher knows, on one GPU."""
    from launcher.cluster import Cluster
    from launcher.plan import memory
    from launcher.plan.batch import BatchPlan
    from launcher.plan.deepspeed import make_deepspeed_config
    from launcher.plan.layout import Layout
    from launcher.plan.shape import load_shape
    from launcher.plan.source import locate_model
    from launcher.recipe import Recipe

    offload, kernels = str(row["offload"]), str(row["loss_kernel"])
    places = {"offload_optimizer": "optimizer=cpu" in offload, "offload_param": "param=cpu" in offload}
    loss: Any = "liger" if "Liger" in kernels else "plain"
    recipe = Recipe.model_validate_json(json.dumps({
        "name": "reading", "model": {"name_or_path": row["model"], "dtype": "bf16", "loss": loss}, "data": {"train": "x", "seq_len": row["seq_len"]},
        "batch": {"global_batch_size": row["n_gpus"], "micro_batch_size": row["micro_batch"]}, "parallel": {"zero_stage": 3, **places},
    }))  # fmt: skip
    shape = load_shape(locate_model(row["model"], "/"), None)
    layout = Layout(nodes=1, workers_per_node=row["n_gpus"], accelerator="cuda", backend="nccl", threads_per_worker=1, dtype="bf16",
                    attn_implementation="flash_attention_2", liger_kernel=loss == "liger", zero_stage=3, zero_init=True, leaf_modules=True,
                    gradient_checkpointing=bool(row["grad_ckpt"]), checkpoints_on_host="activation" in offload, loss=loss, **places)  # fmt: skip
    batch = BatchPlan(global_batch_size=row["n_gpus"], micro_batch_size=row["micro_batch"], gradient_accumulation_steps=1,
                      data_parallel_size=row["n_gpus"], seq_len=row["seq_len"])  # fmt: skip
    cluster = Cluster(accelerator="cuda", device_memory=(141 if row["gpu"] == "H200" else 80) * GIB)
    deepspeed = make_deepspeed_config(layout, batch, max_grad_norm=1.0, bucket=500_000_000, hidden_size=shape.hidden_size)
    work = replace(memory.make_workload(recipe, shape, layout, batch), reentrant="transformers 4" in row["framework"])
    plan = memory.predict_memory(recipe, shape, layout, batch, cluster, deepspeed=deepspeed, work=work,
                                 expandable_segments="expandable_segments:True" in str(row["stack"]))  # fmt: skip
    return float(plan.device("total" if figure_of(row) == "nvidia-smi" else figure_of(row)).p50)  # type: ignore[arg-type]


def score(path: Path) -> tuple[list[Score], Counter[str]]:
    """Every reading that the rules let through, and how many each rule leaves out."""
    scores: list[Score] = []
    left_out: Counter[str] = Counter()
    for row in (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()):
        reason = why_not(row)
        if reason is not None:
            left_out[reason] += 1
            continue
        scores.append(Score(id=row["id"], grade=row["grade"], figure=str(figure_of(row)), measured=row["peak"] * UNITS[row["peak_unit"]],
                            predicted=predict(row)))  # fmt: skip
    return scores, left_out


def sum_up(scores: list[Score]) -> list[dict[str, Any]]:
    """By grade and figure: how many, the median and the worst error."""
    table = []
    for grade, figure in sorted({(s.grade, s.figure) for s in scores}):
        errors = sorted(abs(s.error) for s in scores if (s.grade, s.figure) == (grade, figure))
        table.append({"grade": grade, "figure": figure, "readings": len(errors), "median": statistics.median(errors), "worst": errors[-1],
                      "within_2_percent": sum(error <= 0.02 for error in errors)})  # fmt: skip
    return table


def describe(scores: list[Score], left_out: Counter[str]) -> str:
    """The table of errors, their median and worst by grade and figure, and what is not scored."""
    lines = [f"{'reading':55s} {'figure':>11s} {'measured':>12s} {'predicted':>12s} {'error':>8s}"]
    lines += [f"{s.id:55s} {s.figure:>11s} {s.measured / MIB:8.1f} MiB {s.predicted / MIB:8.1f} MiB {s.error:+8.2%}" for s in scores]
    lines += [f"grade {e['grade']}, {e['figure']}: {e['readings']} readings, median {e['median']:.2%}, worst {e['worst']:.2%}, {e['within_2_percent']} within 2%"
              for e in sum_up(scores)]  # fmt: skip
    lines += [f"not scored, rule {reason}: {count}" for reason, count in sorted(left_out.items())]
    lines.append(f"{len(scores)} of {len(scores) + left_out.total()} readings are scored")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe(*score(Path(sys.argv[1]) if len(sys.argv) > 1 else READINGS)))
