"""Llama 4's text model (transformers 5.23, models/llama4): complex rotation, chunks, and experts that are handed every token."""

from __future__ import annotations

from typing import Any

from launcher.plan.attention import Heads, batched_matmul
from launcher.plan.experts import take_top
from launcher.plan.forward import Block, Pass, attend, layer_type, uses_rope
from launcher.plan.inventory import head_dim, kv_heads, num_experts
from launcher.plan.latent import turn_complex
from launcher.plan.linears import linear
from launcher.plan.operators import FP32, cast, copy, mul, mul_table, pointwise, pointwise_of_result, rms_norm, split
from launcher.plan.tape import Storage, Tape, Tensor


def llama4_attention(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    """Some layers turn queries and keys and norm them; the others scale queries by position."""
    tape, c = run.tape, run.config
    query, key, value = (linear(tape, hidden, block[f"self_attn.{name}_proj"]) for name in ("q", "k", "v"))
    positions = scales = None
    if uses_rope(c, layer):
        query, key = turn_complex(tape, query, key, run.tables[""][0])
        if c.get("use_qk_norm", True):
            query = rms_norm(tape, query, None, style="l2", width=head_dim(c))
            key = rms_norm(tape, key, None, style="l2", width=head_dim(c))
    elif c.get("attn_temperature_tuning", True):
        positions = tape.new(run.columns, 8)
        scales = tape.new(run.columns, FP32)
        query = cast(tape, mul_table(tape, query, scales), query.width)
    at = Heads(rows=run.rows, queries=run.columns, keys=run.columns, heads=c["num_attention_heads"], kv_heads=kv_heads(c), width=head_dim(c),
               value_width=head_dim(c))  # fmt: skip
    mixed = attend(run, query, key, value, run.masks[layer_type(c, layer)], at)
    mixed = linear(tape, mixed, block["self_attn.o_proj"])
    del positions, scales
    return mixed


def llama4_mlp(tape: Tape, block: Block, name: str, hidden: Tensor) -> Tensor:
    """A dense layer's, or the expert's that every token takes. The product is a local here."""
    inner = mul(tape, pointwise(tape, linear(tape, hidden, block[f"{name}.gate_proj"])), linear(tape, hidden, block[f"{name}.up_proj"]))
    return linear(tape, inner, block[f"{name}.down_proj"])


def llama4_mixture(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    """Every expert is given every token, most of them times zero."""
    tape, c = run.tape, run.config
    experts, width = num_experts(c), c["hidden_size"]
    scores, logits = _route(tape, hidden, block["feed_forward.router"], experts, c["num_experts_per_tok"])
    routed = _repeat(tape, hidden, experts)
    routed = mul(tape, routed, copy(tape, scores))
    outputs = _run_all(tape, block, routed, experts, width)
    out = llama4_mlp(tape, block, "feed_forward.shared_expert", hidden)
    summed = _sum_experts(tape, outputs, hidden.count)
    out = tape.attach(Tensor(out.storage, out.count, out.width), lambda grad: (grad, grad), out, summed)
    del logits
    return out


def _route(tape: Tape, hidden: Tensor, router: Any, experts: int, chosen_each: int) -> tuple[Tensor, Tensor]:
    logits = linear(tape, hidden, router)
    values, chosen = take_top(tape, logits, logits.count // experts * chosen_each)
    scores = _scatter(tape, values, chosen, logits.count)
    scores = cast(tape, pointwise_of_result(tape, cast(tape, scores, FP32)), scores.width)
    return scores, logits


def _scatter(tape: Tape, values: Tensor, chosen: Tensor, count: int) -> Tensor:
    """full_like().scatter_(): the gradient is gathered from where the values went."""
    kept = tape.save(chosen) if values.node is not None else None
    size = values.count * values.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        return (tape.make(size),)

    return tape.record(count, values.width, run, values)


def _repeat(tape: Tape, x: Tensor, times: int) -> Tensor:
    size = x.count * x.width
    return tape.record(x.count * times, x.width, lambda grad: (tape.make(size),), x)


def _run_all(tape: Tape, block: Block, routed: Tensor, experts: int, width: int) -> Tensor:
    up, down = block["feed_forward.experts.gate_up_proj"], block["feed_forward.experts.down_proj"]
    both = batched_matmul(tape, routed, up, routed.count // width * (up.count // experts // width))
    gate, lifted = split(tape, both, (both.count // 2, both.count // 2))
    return batched_matmul(tape, mul(tape, lifted, pointwise(tape, gate)), down, routed.count)


def _sum_experts(tape: Tape, x: Tensor, count: int) -> Tensor:
    size = x.count * x.width
    return tape.record(count, x.width, lambda grad: (tape.make(size),), x)
