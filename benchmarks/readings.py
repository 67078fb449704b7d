"""Published readings of GPU memory beside what the plan's arithmetic says: python -m benchmarks.readings [FILE] [--unscored].

FILE is ../shared/data/measured_peaks.jsonl unless told: one JSON object a line, with where each reading is from. It is no part of this repository.
--unscored prints the readings that are left out, rule by rule, in place of the errors.

A reading is scored if its fields meet these rules, whatever the error comes to be; the first that fails is the reason it is not.

1. Its figure is said to be allocated, reserved or nvidia-smi's, and is not rounded to a whole GB.
2. Micro-batch, sequence length, dtype and optimizer are given (a component benchmark gives its tensors' sizes instead), and so are the places
   of adapters.
3. It was made by code that this arithmetic tells: Liger's component benchmarks, LitGPT's LoRA on one GPU (benchmarks/litgpt.py), torchtitan's
   Llama under FSDP2 with selective checkpointing (benchmarks/torchtitan.py: its events, the plan's allocator), or transformers'
   models under DeepSpeed's ZeRO or a plain optimizer (benchmarks/published.py).
4. It uses nothing that a recipe cannot say: no sequence parallelism, no tiled MLP, no torch.compile, no float8, no Muon, no autocast over fp32 weights.
5. The launcher ships the model's geometry.
6. Its fields make a recipe.

No constant is fitted on a row. What differs from a run of this launcher is taken from the reading's own stack.
The cuBLAS workspace, 8.125 MiB a handle, is torch's own default (at::cuda::getChosenWorkspaceSize). All rows were looked at while this was written.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import litgpt, published, torchtitan
from benchmarks.components import COMPONENTS
from launcher.errors import LauncherError
from launcher.plan.known import find_known
from launcher.units import GIB, MIB

READINGS = Path("../shared/data/measured_peaks.jsonl")
UNITS = {"MiB": MIB, "GiB": GIB, "GB": 10**9, "GB (1e9)": 10**9}
FIGURES = {
    "max_memory_allocated": "allocated",
    "memory_allocated": "allocated",
    "max allocated": "allocated",
    "reserved": "reserved",
    "nvidia-smi": "nvidia-smi",
}
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


def load_rows(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row | published.READ_AT_SOURCE.get(row["id"], {}) for row in rows]


def is_component(row: Row) -> bool:
    return str(row["model"]).startswith("component:")


def is_litgpt(row: Row) -> bool:
    return str(row["framework"]).startswith("litgpt")


def is_titan(row: Row) -> bool:
    return str(row["framework"]).startswith("torchtitan")


def figure_of(row: Row) -> str | None:
    """Which of the three figures a reading is, as its metric says."""
    return next((figure for name, figure in FIGURES.items() if name in row["peak_metric"]), None)


RULE_4 = "4: sequence parallelism, tiled MLP, compile, float8 or Muon"


def why_not(row: Row) -> str | None:
    """The first of the rules that a reading does not meet, by its configuration's fields; None for one that is scored."""
    if figure_of(row) is None or "unknown" in row["peak_metric"] or "rounded" in row["peak_metric"]:
        return "1: which figure it is, is not said"
    if is_component(row):
        return None if row["model"].removeprefix("component:") in COMPONENTS else "3: a component that is not told here"
    if any(row[field] is None for field in ("micro_batch", "seq_len", "weight_dtype", "optimizer")):
        return "2: batch, length, dtype or optimizer is not given"
    if is_litgpt(row):
        return _why_not_litgpt(row)
    if row["source"] == "DeepSpeedExamples":
        return None
    if is_titan(row):
        return _why_not_titan(row)
    framework = row["framework"].split()[0]
    if any(name in row["framework"] for name in OTHER_MODELS):
        return f"3: made by {framework}, whose model code or sharding is another"
    if published.stage_of(row) is None and not published.is_plain(row):
        return f"3: {framework} shards by {row['sharding']}, whose buffers and gathering are others"
    told = f"{row['loss_kernel']} {row['notes']} {row['weight_dtype']} {row['sharding']}"
    if any(word in told for word in ("Ulysses", "TiledMLP", "Float8", "NVFP4", "CP")) or row["compile"] or "Muon" in str(row["optimizer"]):
        return RULE_4
    if "AMP" in told and row["method"] == "full":
        return "4: autocast over fp32 weights"
    if row["method"] != "full" and not (row["lora"] or {}).get("r"):
        return "2: the adapters' rank is not given"
    if find_known(published.hub_id(row)) is None:
        return "5: a model whose geometry the launcher does not ship"
    return None


def _why_not_titan(row: Row) -> str | None:
    if row["compile"] or "Float8" in f"{row['notes']} {row['weight_dtype']}" or "CP" in str(row["sharding"]):
        return RULE_4
    told = row["sharding"] == "FSDP2" and "per-op" in str(row["grad_ckpt"]) and "8B" in row["model"]
    return None if told else "3: torchtitan otherwise than Llama 8B under FSDP2 with selective checkpointing"


OTHER_MODELS = ("NeMo", "torchtune", "Unsloth", "Megatron")
"""Frameworks whose models are not transformers', or run on kernels of their own."""


def _why_not_litgpt(row: Row) -> str | None:
    if row["method"] == "full":
        return "3: LitGPT's full fine-tuning, whose optimizer the reading does not tell"
    if not (row["lora"] or {}).get("r"):
        return "3: LitGPT's other methods"
    if row["n_gpus"] > 1:
        return "3: LitGPT shards by FSDP, whose buffers and gathering are others"
    return None if row["model"] in litgpt.MODELS else "5: a model whose geometry the launcher does not ship"


def predict(row: Row) -> float:
    """Bytes of a scored reading."""
    if is_component(row):
        return COMPONENTS[row["model"].removeprefix("component:")](json.loads(row["notes"]), row["framework"])
    if is_litgpt(row):
        return litgpt.predict(litgpt.read(row))
    if is_titan(row):
        return torchtitan.predict(torchtitan.Run(tokens=row["micro_batch"] * row["seq_len"], ranks=row["n_gpus"]))
    return _predict_example(row) if row["source"] == "DeepSpeedExamples" else published.predict(row, str(figure_of(row)))


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


def score(path: Path) -> tuple[list[Score], Counter[str]]:
    """Every reading that the rules let through, and how many each rule leaves out."""
    scores: list[Score] = []
    left_out: Counter[str] = Counter()
    for row in load_rows(path):
        reason = why_not(row)
        if reason is not None:
            left_out[reason] += 1
            continue
        try:
            predicted = predict(row)
        except (LauncherError, LookupError) as problem:
            left_out[f"6: its fields make no recipe ({problem})"] += 1
            continue
        scores.append(Score(id=row["id"], grade=row["grade"], figure=str(figure_of(row)), measured=row["peak"] * UNITS[row["peak_unit"]],
                            predicted=predicted))  # fmt: skip
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


def describe_unscored(path: Path) -> str:
    """The readings that are left out, by the rule that leaves them out."""
    by_reason: dict[str, list[Row]] = {}
    for row in load_rows(path):
        reason = why_not(row)
        if reason is not None:
            by_reason.setdefault(reason, []).append(row)
    lines = []
    for reason, rows in sorted(by_reason.items()):
        lines.append(f"rule {reason}: {len(rows)}")
        lines += [f"    {row['id']:45s} {row['grade']}  {row['peak']:>9} {row['peak_unit']:9s} {row['source']}" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word != "--unscored"]
    place = Path(given[0]) if given else READINGS
    print(describe_unscored(place) if "--unscored" in sys.argv else describe(*score(place)))
