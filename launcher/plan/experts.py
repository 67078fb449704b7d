"""Mixtures of experts on the tape (transformers 5.23, integrations/moe.py: grouped_mm, which is what it picks where it can)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.plan.fused import fused_gate
from launcher.plan.inventory import Config, num_experts
from launcher.plan.linears import linear
from launcher.plan.operators import (
    FP32,
    add,
    cast,
    clamp,
    gather_rows,
        matmul,
    mul,
    part,
    pointwise,
    pointwise_of_result,
    scale,
    shift,
    split,
)  # fmt: skip
from launcher.plan.tape import Parameter, Storage, Tape, Tensor

INT64, INT32 = 8, 4


def mixture(tape: Tape, config: Config, block: dict[str, Any], hidden: Tensor) -> Tensor:
    """Router and experts of a layer."""
    kind = config["model_type"]
    experts, top_k, width = num_experts(config), config["num_experts_per_tok"], config["hidden_size"]
    if kind == "gpt_oss":
        logits, weights, chosen = _route_gpt_oss(tape, hidden, block, experts, top_k, width)
        out = run_experts(tape, block, hidden, chosen, weights, experts, top_k, width, gate=_gate_gpt_oss)
        del logits
        return out
    shared = gated_mlp(tape, block, "mlp.shared_expert", hidden) if kind == "qwen2_moe" else None
    normalised = kind == "mixtral" or bool(config.get("norm_topk_prob"))
    logits, weights, chosen = _route(tape, hidden, block["mlp.gate"], experts, top_k, width, normalised, wide=kind == "mixtral")
    out = run_experts(tape, block, hidden, chosen, weights, experts, top_k, width)
    if shared is not None:
        shared = mul(tape, pointwise_of_result(tape, linear(tape, hidden, block["mlp.shared_expert_gate"])), shared)
        out = add(tape, out, shared)
    del logits
    return out


def gated_mlp(tape: Tape, block: dict[str, Any], name: str, hidden: Tensor) -> Tensor:
    if tape.fused:
        gate, up = linear(tape, hidden, block[f"{name}.gate_proj"]), linear(tape, hidden, block[f"{name}.up_proj"])
        mixed = fused_gate(tape, gate, up)
        del gate, up
        return linear(tape, mixed, block[f"{name}.down_proj"])
    return linear(
        tape, mul(tape, pointwise(tape, linear(tape, hidden, block[f"{name}.gate_proj"])), linear(tape, hidden, block[f"{name}.up_proj"])),
        block[f"{name}.down_proj"],
    )  # fmt: skip


def _route_gpt_oss(
    tape: Tape, hidden: Tensor, block: dict[str, Any], experts: int, top_k: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    logits = matmul(tape, hidden, block["mlp.router"], width, block["mlp.router.bias"])
    values, chosen = take_top(tape, logits, logits.count // experts * top_k)
    return logits, pointwise_of_result(tape, values), chosen


def _gate_gpt_oss(tape: Tape, both: Tensor) -> Tensor:
    gate, up = part(tape, both, both.count // 2), part(tape, both, both.count // 2)
    gate = clamp(tape, gate, sides=1)
    up = clamp(tape, up, sides=2)
    glu = mul(tape, gate, pointwise_of_result(tape, scale(tape, gate)))
    return mul(tape, shift(tape, up), glu)


def _route(
    tape: Tape, hidden: Tensor, gate: Parameter, experts: int, top_k: int, width: int, normalised: bool, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits = matmul(tape, hidden, gate, width)
    probabilities = pointwise_of_result(tape, cast(tape, logits, FP32))
    values, chosen = take_top(tape, probabilities, logits.count // experts * top_k)
    if normalised:
        values, _ = divide_by_sum(tape, values, logits.count // experts)
    if not wide:
        values = cast(tape, values, hidden.width)
    return logits, values, chosen


def divide_by_sum(tape: Tape, values: Tensor, tokens: int, *, shifted: bool = False) -> tuple[Tensor, Tensor]:
    """`values /= values.sum()`: in place, so that what was there is copied for the backward. The sum too (`shifted`: plus a little)."""
    total = tape.record(tokens, FP32, lambda grad: (grad,), values)
    if shifted:
        total = shift(tape, total)
    kept_total = tape.save(total) if values.node is not None else None
    kept_values = tape.save(tape.new(values.count, FP32)) if values.node is not None else None
    size, small = values.count * FP32, tokens * FP32

    def run(grad: Storage) -> tuple[Storage, Storage]:
        assert kept_total is not None and kept_values is not None
        kept_total.fetch(), kept_values.fetch()
        quotients = (tape.make(size), tape.make(size), tape.make(size))
        of_total = tape.make(size)
        del quotients
        made = tape.make(size)
        summed = tape.make(small)
        del of_total
        return made, summed

    return tape.attach(Tensor(values.storage, values.count, FP32), run, values, total), total


def take_top(tape: Tape, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    out = tape.new(count, x.width)
    chosen = tape.new(count, INT64)
    kept = tape.save(chosen) if x.node is not None else None
    size = x.count * x.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        zeros = tape.make(size)
        made = tape.make(size)
        del zeros
        return (made,)

    return tape.attach(out, run, x), chosen


def _gate(tape: Tape, both: Tensor) -> Tensor:
    gate, up = split(tape, both, (both.count // 2, both.count // 2))
    return mul(tape, pointwise(tape, gate), up)


def run_experts(
    tape: Tape, block: dict[str, Any], hidden: Tensor, chosen: Tensor, weights: Tensor, experts: int, top_k: int, width: int,
    gate: Callable[[Tape, Tensor], Tensor] = _gate,
) -> Tensor:  # fmt: skip
    """Tokens sorted by expert, two grouped products, weighed, put back in order and summed."""
    up, down = _fold(tape, block, "mlp.experts.gate_up_proj", experts), _fold(tape, block, "mlp.experts.down_proj", experts)
    pairs = chosen.count
    sorted_ids, order = tape.new(pairs, INT64), tape.new(pairs, INT64)
    rows = tape.new(pairs, INT64)
    selected = gather_rows(tape, hidden, pairs * width, rows)
    del rows
    weighing = gather_rows(tape, weights, pairs, order)
    ids, counted = tape.new(pairs, INT32), tape.new(experts, INT32)
    offsets = tape.new(experts, INT32)
    inner = pairs * (up.count // experts // width)
    bias = _pick_biases(tape, block, "mlp.experts.gate_up_proj_bias", inner, sorted_ids)
    made = _add_biases(tape, _grouped(tape, selected, up, offsets, inner), bias)
    made = gate(tape, made)
    bias = _pick_biases(tape, block, "mlp.experts.down_proj_bias", pairs * width, sorted_ids)
    made = _add_biases(tape, _grouped(tape, made, down, offsets, pairs * width), bias)
    weighed = mul(tape, made, weighing)
    back = tape.new(pairs, INT64)
    tape.new(pairs, INT64)
    weighed = gather_rows(tape, weighed, pairs * width, back)
    total = _sum_chosen(tape, weighed, pairs // top_k * width)
    out = cast(tape, total, hidden.width)
    del sorted_ids, ids, counted
    return out


def _pick_biases(tape: Tape, block: dict[str, Any], name: str, count: int, ids: Tensor) -> Tensor | None:
    """A row for each token and expert, where experts have biases."""
    return gather_rows(tape, block[name], count, ids) if name in block else None


def _add_biases(tape: Tape, x: Tensor, bias: Tensor | None) -> Tensor:
    """In place."""
    if bias is None:
        return x
    return tape.attach(Tensor(x.storage, x.count, x.width), lambda grad: (grad, grad), x, bias)


def _fold(tape: Tape, block: dict[str, Any], name: str, experts: int) -> Tensor:
    """The weight itself, or, under peft, all experts' weights with their adapters' products added to them (baddbmm)."""
    weight: Parameter = block[name]
    rank = block.get(f"{name}.adapter", 0)
    if not rank:
        return weight
    inner = block[f"{name}.fan"]
    first = Parameter(experts * rank * inner[0], weight.width, trained=True)
    second = Parameter(experts * rank * inner[1], weight.width, trained=True)
    tape.save(first), tape.save(second)
    sizes = [p.count * p.width for p in (first, second)]

    def run(grad: Storage) -> tuple[Storage, Storage]:
        return tape.make(sizes[0]), tape.make(sizes[1])

    return tape.record(weight.count, weight.width, run, first, second)


def _grouped(tape: Tape, x: Tensor, weight: Tensor, offsets: Tensor, count: int) -> Tensor:
    """torch's grouped_mm."""
    kept_x = tape.save(x) if weight.node is not None else None
    kept_weight = tape.save(weight) if x.node is not None else None
    kept_offsets = tape.save(offsets) if x.node is not None or weight.node is not None else None
    sizes = (x.count * x.width, weight.count * weight.width)

    def run(grad: Storage) -> tuple[Storage | None, Storage | None]:
        if kept_offsets is not None:
            kept_offsets.fetch()
        grad_weight = None
        if kept_x is not None:
            kept_x.fetch()
            grad_weight = tape.make(sizes[1])
        grad_x = None
        if kept_weight is not None:
            kept_weight.fetch()
            grad_x = tape.make(sizes[0])
        return grad_x, grad_weight

    return tape.record(count, x.width, run, x, weight)


def _sum_chosen(tape: Tape, x: Tensor, count: int) -> Tensor:
    size = x.count * x.width
    return tape.record(count, x.width, lambda grad: (tape.make(size),), x)
