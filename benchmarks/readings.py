"""Published readings of GPU memory beside what the plan's arithmetic says: python -m benchmarks.readings [FILE].

FILE is ../shared/data/measured_peaks.jsonl unless told: one JSON object a line, with where each reading is from. It is no part
of this repository. Scored are readings whose configuration is known and whose code the arithmetic covers; others are counted.

Split: the 16.25 MiB of cuBLAS workspace was fitted on the Liger readings that hold a matrix product (MEMORY.md), and is used
for those alone as 16.25 MiB, so they are development data, as are the DeepSpeedExamples and Arctic readings, which were
looked at while the models of states and allocator were written. No other constant is fitted on a row that is scored here.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.plan.operators import Linear, cross_entropy, gather_rows, linear, matmul, mul, pointwise, rms_norm, rotate
from launcher.plan.tape import Parameter, Storage, Tape, Tensor, backward
from launcher.units import GIB, MIB

READINGS = Path("../shared/data/measured_peaks.jsonl")
CUBLAS = 16.25 * MIB
UNITS = {"MiB": MIB, "GiB": GIB, "GB": 10**9, "GB (1e9)": 10**9}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One reading: bytes measured and predicted, and what kind of figure it is."""

    id: str
    figure: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def leaf(tape: Tape, count: int, width: int) -> tuple[Tensor, list[Any]]:
    """A tensor that needs a gradient and has one from the iteration before."""
    sink = Parameter(count, width, trained=True)
    tensor = tape.new(count, width)
    tensor.node = sink.node
    return tensor, [sink, tape.new(count, width)]


def peak(program: Callable[[Tape], list[Tensor]], held: float = 0.0) -> float:
    """The most that is live over forward and `backward(retain_graph=True)`, gradients added to those that are there."""
    tape = Tape(accumulates_in_place=False)
    tape.on_gradient = lambda sink, grad: None
    outputs = program(tape)
    for output in outputs:
        backward(tape, output, retain=True)
    return max(top for top, _ in tape.peaks.values()) + held


def _rms_norm(row: Row, notes: Row) -> float:
    rows, width = notes["M"], int(notes["H"])

    def program(tape: Tape) -> list[Tensor]:
        x, keep = leaf(tape, rows * width, 2)
        gradient = tape.new(rows * width, 2)
        y = rms_norm(tape, x, Parameter(width, 2, trained=True))
        return [hold(y, keep, gradient, x)]

    return peak(program)


def hold(output: Tensor, *others: Any) -> Tensor:
    """The output, with what the benchmark's own variables keep alive beside it."""
    node = output.node
    run = node.run  # type: ignore[union-attr]
    node.run = lambda grad: (run(grad), others)[0]  # type: ignore[union-attr]
    return output


def _cross_entropy(row: Row, notes: Row) -> float:
    rows, words = notes["B"] * notes["T"], int(notes["V"])

    def program(tape: Tape) -> list[Tensor]:
        x, keep = leaf(tape, rows * words, 4)
        return [hold(cross_entropy(tape, x, rows, tape.new(rows, 8)), keep, x)]

    return peak(program)


def _head_and_cross_entropy(row: Row, notes: Row) -> float:
    rows, width, words = int(notes["BT"]), notes["H"], notes["V"]

    def program(tape: Tape) -> list[Tensor]:
        x, keep = leaf(tape, rows * width, 2)
        weight, keep_weight = leaf(tape, words * width, 2)
        logits = matmul(tape, x, weight, width)  # type: ignore[arg-type]
        loss = _narrow_cross_entropy(tape, logits, rows)
        return [hold(loss, keep, keep_weight, x, weight)]

    return peak(program, CUBLAS)


def _narrow_cross_entropy(tape: Tape, logits: Tensor, rows: int) -> Tensor:
    """In the logits' own dtype."""
    targets = tape.new(rows, 8)
    logged = tape.new(logits.count, logits.width)
    kept, size = tape.save(logged), logits.count * logits.width
    tape.attach(logged, lambda grad: (kept, tape.make(size))[1:], logits)
    loss = tape.new(1, logits.width)
    return tape.attach(loss, lambda grad: (targets, tape.make(size))[1:], logged)


def _swiglu(row: Row, notes: Row) -> float:
    tokens, width, inner = notes["B"] * int(notes["T"]), notes["hidden_size"], notes["intermediate_size"]

    def program(tape: Tape) -> list[Tensor]:
        x, keep = leaf(tape, tokens * width, 2)
        weights = [leaf(tape, width * inner, 2) for _ in range(3)]
        gradient = tape.new(tokens * width, 2)
        gate, up, down = (_layer(weight[0], width, inner, index) for index, weight in enumerate(weights))
        y = linear(tape, mul(tape, pointwise(tape, linear(tape, x, gate)), linear(tape, x, up)), down)
        return [hold(y, keep, weights, gradient, x)]

    return peak(program, CUBLAS)


def _layer(weight: Tensor, width: int, inner: int, index: int) -> Linear:
    n_in, n_out = (width, inner) if index < 2 else (inner, width)
    layer = Linear(n_in, n_out, 2, trained=True)
    layer.weight.node = weight.node
    return layer


def _rope(row: Row, notes: Row) -> float:
    tokens, hidden = int(notes.get("T") or notes["seq_len"]), int(notes.get("hidden_size") or notes["H"])
    width = hidden // notes["num_q_heads"]
    queries, keys = tokens * hidden, tokens * width * notes["num_kv_heads"]

    def program(tape: Tape) -> list[Tensor]:
        q, keep_q = leaf(tape, queries, 2)
        k, keep_k = leaf(tape, keys, 2)
        gradients = (tape.new(queries, 2), tape.new(keys, 2))
        cos, sin = tape.new(tokens * width, 2), tape.new(tokens * width, 2)
        positions = tape.new(tokens, 8)
        turned_q, turned_k = rotate(tape, q, cos, sin), rotate(tape, k, cos, sin)
        turned_q, turned_k = hold(turned_q, turned_k, keep_q, q), hold(turned_k, keep_k, gradients, k, positions)
        return [turned_q, turned_k]

    return peak(program)


COMPONENTS: dict[str, Callable[[Row, Row], float]] = {
    "rms_norm": _rms_norm, "cross_entropy": _cross_entropy, "fused_linear_cross_entropy": _head_and_cross_entropy, "swiglu": _swiglu, "rope": _rope,
}  # fmt: skip


def _deepspeed_example(row: Row) -> float | None:
    """Steady state and peak of the bf16_master_weight example: ZeRO-3, the step decides."""
    width, layers, words, positions, ranks = 4096, 32, 50257, 512, row["n_gpus"]
    sizes = [words * width, positions * width]
    for _ in range(layers):
        sizes += [
            3 * width * width,
            3 * width,
            width * width,
            width,
            width,
            width,
            width,
            width,
            4 * width * width,
            4 * width,
            4 * width * width,
            width,
        ]
    sizes += [words * width, words]
    parts = [-(-size // ranks) for size in sizes]
    groups, held = [0], 0
    for part in parts:
        held += part
        groups[-1] = held
        if held >= 1_000_000_000:
            groups.append(0)
            held = 0
    n, low = sum(parts), "bf16" in row["id"]
    steady = (10 if low else 16) * n + 2 * 50_000_000 + 2 * positions * words + 32 * MIB
    if "steady" in row["peak_metric"]:
        return float(steady)
    return None if low else float(steady + 6 * max(groups))


def score(path: Path) -> tuple[list[Score], int]:
    """Every reading the arithmetic covers, scored; and how many there are in the file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scores: list[Score] = []
    for row in rows:
        predicted: float | None = None
        figure = "allocated"
        if row["source"] == "Liger-Kernel component benchmark" and row["framework"] == "huggingface":
            predicted = COMPONENTS[row["model"].removeprefix("component:")](row, json.loads(row["notes"]))
        elif row["source"] == "DeepSpeedExamples":
            predicted = _deepspeed_example(row)
        elif row["id"] in ("arctic-h100-8b-32k-base", "arctic-h200-8b-65k-base"):
            predicted, figure = _arctic(row), "nvidia-smi"
        if predicted is not None:
            scores.append(Score(id=row["id"], figure=figure, measured=row["peak"] * UNITS[row["peak_unit"]], predicted=predicted))
    return scores, len(rows)


def _arctic(row: Row) -> float:
    """Llama-3.1-8B, ZeRO-3 with optimizer and weights on the host, flash attention, expandable segments, one GPU."""
    from launcher.cluster import Cluster
    from launcher.plan.batch import BatchPlan
    from launcher.plan.deepspeed import make_deepspeed_config
    from launcher.plan.layout import Layout
    from launcher.plan.memory import predict_memory
    from launcher.plan.shape import shape_of_config
    from launcher.recipe import Recipe

    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}  # fmt: skip
    recipe = Recipe.model_validate_json(json.dumps({
        "name": "arctic", "model": {"name_or_path": "x", "dtype": "bf16"}, "data": {"train": "x.jsonl", "seq_len": row["seq_len"]},
        "batch": {"global_batch_size": 1, "micro_batch_size": 1}, "parallel": {"zero_stage": 3, "offload_optimizer": True, "offload_param": True},
    }))  # fmt: skip
    layout = Layout(nodes=1, workers_per_node=1, accelerator="cuda", backend="nccl", threads_per_worker=1, dtype="bf16",
                    attn_implementation="flash_attention_2", liger_kernel=False, zero_stage=3, offload_optimizer=True, offload_param=True,
                    zero_init=True, leaf_modules=True, gradient_checkpointing=True)  # fmt: skip
    batch = BatchPlan(global_batch_size=1, micro_batch_size=1, gradient_accumulation_steps=1, data_parallel_size=1, seq_len=row["seq_len"])
    cluster = Cluster(accelerator="cuda", device_memory=(80 if "h100" in row["id"] else 141) * GIB)
    deepspeed = make_deepspeed_config(layout, batch, max_grad_norm=1.0, bucket=500_000_000, hidden_size=4096)
    shape = shape_of_config(config, Path("config.json"))
    memory = predict_memory(recipe, shape, layout, batch, cluster, deepspeed=deepspeed, expandable_segments=True)
    return float(memory.device("total").p50)


def describe(scores: list[Score], total: int) -> str:
    """The table of errors, and their median and worst by figure."""
    lines = [f"{'reading':55s} {'figure':>11s} {'measured':>12s} {'predicted':>12s} {'error':>8s}"]
    lines += [f"{s.id:55s} {s.figure:>11s} {s.measured / MIB:8.1f} MiB {s.predicted / MIB:8.1f} MiB {s.error:+8.2%}" for s in scores]
    for figure in sorted({s.figure for s in scores}):
        errors = [abs(s.error) for s in scores if s.figure == figure]
        lines.append(f"{figure}: {len(errors)} readings, median {statistics.median(errors):.2%}, worst {max(errors):.2%}")
    lines.append(
        f"{total - len(scores)} of {total} readings are of code that the arithmetic does not cover (other frameworks, Liger's kernels)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe(*score(Path(sys.argv[1]) if len(sys.argv) > 1 else READINGS)))


__all__ = ["Score", "Storage", "describe", "gather_rows", "score"]
