"""DeepSeek V2 and V3: latent attention, and their routers (transformers 5.23, models/deepseek_v2 and deepseek_v3)."""

from __future__ import annotations

from typing import Any

from launcher.plan.attention import Heads
from launcher.plan.experts import divide_by_sum, gated_mlp, run_experts, take_top
from launcher.plan.forward import Block, Pass, attend
from launcher.plan.inventory import Config, num_experts
from launcher.plan.linears import linear
from launcher.plan.operators import (
    FP32,
    add,
    add_constant,
    cast,
    copy_into_part,
    gather_columns,
    join,
        matmul,
    mul_table,
    part,
    pointwise_of_result,
    rms_norm,
    rotate,
    scale,
    split,
    subtract,
)  # fmt: skip
from launcher.plan.tape import Tape, Tensor


def latent_attention(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    """Queries and a small latent for keys and values, both with a part of their width turned."""
    tape, c = run.tape, run.config
    heads, (nope, rope, value_width, rank) = c["num_attention_heads"], widths(c)
    tokens = hidden.count // c["hidden_size"]
    query = _query(run, block, hidden)
    query_pass, query_turned = split(tape, query, (tokens * heads * nope, tokens * heads * rope))
    compressed = linear(tape, hidden, block["self_attn.kv_a_proj_with_mqa"])
    latent, key_turned = split(tape, compressed, (tokens * rank, tokens * rope))
    latent = rms_norm(tape, latent, block["self_attn.kv_a_layernorm"])
    query_turned, key_turned = _turn(run, query_turned, key_turned)
    states = join(tape, query_pass, query_turned)
    key, value = _expand(tape, block, latent, key_turned, tokens, heads, nope, rope, value_width)
    at = Heads(rows=run.rows, queries=run.columns, keys=run.columns, heads=heads, kv_heads=heads, width=nope + rope, value_width=value_width,
               heads_first=True)  # fmt: skip
    mixed = attend(run, states, key, value, run.masks["full_attention"], at)
    mixed = linear(tape, mixed, block["self_attn.o_proj"])
    del query, compressed
    return mixed


def widths(c: Config) -> tuple[int, int, int, int]:
    """Of a head's plain and turned parts, of its values, and of the latent."""
    return c.get("qk_nope_head_dim", 128), c.get("qk_rope_head_dim", 64), c.get("v_head_dim", 128), c.get("kv_lora_rank", 512)


def _query(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    tape = run.tape
    if "self_attn.q_proj" in block:
        return linear(tape, hidden, block["self_attn.q_proj"])
    return linear(
        tape,
        rms_norm(tape, linear(tape, hidden, block["self_attn.q_a_proj"]), block["self_attn.q_a_layernorm"]),
        block["self_attn.q_b_proj"],
    )


def _turn(run: Pass, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    tape, c = run.tape, run.config
    cos, sin = run.tables[""]
    if c["model_type"] == "deepseek_v2":
        return turn_complex(tape, query, key, cos)
    if c.get("rope_interleave", True):
        return _turn_pairs(tape, query, key, cos, sin)
    turned = rotate(tape, query, cos, sin)
    return turned, rotate(tape, key, cos, sin)


def turn_complex(tape: Tape, query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """As complex numbers in fp32, times a table of them."""
    wide_query, wide_key = cast(tape, query, FP32), cast(tape, key, FP32)
    turned_query, turned_key = mul_table(tape, wide_query, table), mul_table(tape, wide_key, table)
    return cast(tape, turned_query, query.width), cast(tape, turned_key, key.width)


def _turn_pairs(tape: Tape, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Every second column against the others; the tables' first halves are views."""
    even_query, odd_query = part(tape, query, query.count // 2), part(tape, query, query.count // 2)
    even_key, odd_key = part(tape, key, key.count // 2), part(tape, key, key.count // 2)
    turned = _turn_pair(tape, even_query, odd_query, cos, sin)
    return turned, _turn_pair(tape, even_key, odd_key, cos, sin)


def _turn_pair(tape: Tape, even: Tensor, odd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first = subtract(tape, mul_table(tape, even, cos), mul_table(tape, odd, sin))
    return join(tape, first, add(tape, mul_table(tape, odd, cos), mul_table(tape, even, sin)))


def _expand(
    tape: Tape, block: Block, latent: Tensor, turned: Tensor, tokens: int, heads: int, nope: int, rope: int, value_width: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys and values from the latent; the keys' two parts are copied into one tensor."""
    both = linear(tape, latent, block["self_attn.kv_b_proj"])
    plain, value = split(tape, both, (tokens * heads * nope, tokens * heads * value_width))
    empty = tape.new(tokens * heads * (nope + rope), latent.width)
    key = copy_into_part(tape, empty, plain)
    key = copy_into_part(tape, key, turned, expanded=tokens * heads * rope)
    return key, value


# ------------------------------------------------------------------------------------------------- experts


def latent_mixture(tape: Tape, config: Config, block: dict[str, Any], hidden: Tensor) -> Tensor:
    """Experts of groups, and experts that every token takes."""
    experts, chosen_each, width = num_experts(config), config["num_experts_per_tok"], config["hidden_size"]
    route = _route_softmax if config["model_type"] == "deepseek_v2" else _route_sigmoid
    logits, weights, chosen = route(tape, config, hidden, block, experts, chosen_each)
    states = run_experts(tape, block, hidden, chosen, weights, experts, chosen_each, width)
    if "mlp.shared_experts.gate_proj" in block:
        states = add(tape, states, gated_mlp(tape, block, "mlp.shared_experts", hidden))
    del logits
    return states


def _wide_logits(tape: Tape, hidden: Tensor, block: dict[str, Any], width: int) -> Tensor:
    return matmul(tape, cast(tape, hidden, FP32), cast(tape, block["mlp.gate"], FP32), width)


def _route_sigmoid(
    tape: Tape, c: Config, hidden: Tensor, block: dict[str, Any], experts: int, chosen_each: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """V3: the best of the best groups; a correction that is no parameter is added for the choice."""
    tokens, groups = hidden.count // c["hidden_size"], c.get("n_group", 8)
    logits = _wide_logits(tape, hidden, block, c["hidden_size"])
    scores = pointwise_of_result(tape, logits)
    choosing = add_constant(tape, scores)
    best, _ = take_top(tape, choosing, tokens * groups * 2)
    group_scores = add_up(tape, best, tokens * groups)
    del best, _
    choosing = _mask_groups(tape, c, choosing, group_scores, tokens, groups, experts)
    _, chosen = take_top(tape, choosing, tokens * chosen_each)
    del _
    weights = gather_columns(tape, scores, chosen)
    total = None
    if c.get("norm_topk_prob", True):
        weights, total = divide_by_sum(tape, weights, tokens, shifted=True)
    weights = scale(tape, weights)
    del group_scores, total
    return logits, weights, chosen


def _mask_groups(tape: Tape, c: Config, choosing: Tensor, group_scores: Tensor, tokens: int, groups: int, experts: int) -> Tensor:
    _, group = take_top(tape, group_scores, tokens * c.get("topk_group", 4))
    del _
    group_mask = tape.new(tokens * groups, group_scores.width)
    score_mask = tape.new(tokens * experts, group_scores.width)
    is_chosen = tape.new(tokens * experts, 1)
    others = tape.new(tokens * experts, 1)
    del is_chosen
    kept = tape.save(others) if choosing.node is not None else None
    size = choosing.count * choosing.width

    def run(grad: Any) -> tuple[Any]:
        assert kept is not None
        kept.fetch()
        return (tape.make(size),)

    out = tape.record(choosing.count, choosing.width, run, choosing)
    del group, group_mask, score_mask
    return out


def _route_softmax(
    tape: Tape, c: Config, hidden: Tensor, block: dict[str, Any], experts: int, chosen_each: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """V2: the best, or the best of the best groups."""
    tokens, groups = hidden.count // c["hidden_size"], c.get("n_group") or 1
    logits = _wide_logits(tape, hidden, block, c["hidden_size"])
    scores = pointwise_of_result(tape, logits)
    group_scores = None
    if c.get("topk_method", "greedy") == "group_limited_greedy":
        group_scores, places = take_top(tape, scores, tokens * groups)
        del places
        scores = _mask_groups(tape, c, scores, group_scores, tokens, groups, experts)
    weights, chosen = take_top(tape, scores, tokens * chosen_each)
    weights = scale(tape, weights)
    del group_scores
    return logits, weights, chosen


def add_up(tape: Tape, x: Tensor, count: int) -> Tensor:
    """sum over the last dimension: the gradient is an expanded view."""
    return tape.record(count, x.width, lambda grad: (grad,), x)
