"""Forward passes of decoders on the tape, in the order of transformers' code (5.23, models/*/modeling_*.py).

What is written here decides what is live when: locals live until their function returns, as in the code that is mirrored.
"""

from __future__ import annotations

from typing import Any

from launcher.plan.attention import Heads, eager_with_sinks, flash
from launcher.plan.experts import gated_mlp, mixture
from launcher.plan.forward import Block, Pass, attend, layer_type, rotary_width, rotate_part, uses_rope
from launcher.plan.inventory import head_dim, is_sparse, kv_heads
from launcher.plan.latent import latent_attention, latent_mixture
from launcher.plan.linears import linear
from launcher.plan.llama4 import llama4_attention, llama4_mixture, llama4_mlp
from launcher.plan.operators import (
    add,
    cast,
    join,
    mul,
    mul_table,
    part,
    pointwise,
    rms_norm,
    rotate,
    scale,
    split,
    subtract,
)  # fmt: skip
from launcher.plan.tape import Tape, Tensor

CLOSED_FORMS = frozenset({"llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite",
                          "mixtral", "qwen3_moe", "bert", "roberta", "gpt2", "gpt_neox", "phi", "qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "llama4_text"})  # fmt: skip
"""Model types whose forward and backward are told exactly here; tests/test_referee.py holds each to a trace."""


def decoder_layer(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    """One transformer layer."""
    kind, tape = run.config["model_type"], run.tape
    if kind in ("gemma2", "gemma3_text"):
        return _sandwich_layer(run, block, layer, hidden)
    if kind == "olmo2":
        return _post_norm_layer(run, block, layer, hidden)
    residual = hidden
    states = _norm(run, hidden, block["input_layernorm"])
    states = attention(run, block, layer, states)
    attended = states if kind == "llama4_text" else None  # a name of its own there
    states = add(tape, residual, _scaled(run, states))
    residual = states
    states = _norm(run, states, block["post_attention_layernorm"])
    states = _mlp_of(run, block, layer, states)
    states = add(tape, residual, _scaled(run, states))
    del attended
    return states


def _scaled(run: Pass, states: Tensor) -> Tensor:
    return scale(run.tape, states) if run.config["model_type"] == "granite" else states


def _sandwich_layer(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    """Gemma 2 and 3: a norm before and after each half."""
    tape = run.tape
    residual = hidden
    states = _norm(run, hidden, block["input_layernorm"])
    states = attention(run, block, layer, states)
    states = _norm(run, states, block["post_attention_layernorm"])
    states = add(tape, residual, states)
    residual = states
    states = _norm(run, states, block["pre_feedforward_layernorm"])
    states = _mlp_of(run, block, layer, states)
    states = _norm(run, states, block["post_feedforward_layernorm"])
    states = add(tape, residual, states)
    return states


def _post_norm_layer(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    """OLMo 2: a norm after each half."""
    tape = run.tape
    residual = hidden
    states = attention(run, block, layer, hidden)
    states = _norm(run, states, block["post_attention_layernorm"])
    states = add(tape, residual, states)
    residual = states
    states = _mlp_of(run, block, layer, states)
    states = _norm(run, states, block["post_feedforward_layernorm"])
    states = add(tape, residual, states)
    return states


LATENT = frozenset({"deepseek_v2", "deepseek_v3"})
NORM_STYLES = {"gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma", "gpt_oss": "late", "olmo2": "late", "llama4_text": "l2"}


def _norm(run: Pass, x: Tensor, weight: Any) -> Tensor:
    return rms_norm(run.tape, x, weight, style=NORM_STYLES.get(run.config["model_type"], "llama"))


def attention(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    """Self-attention with grouped heads, for all but latent attention."""
    tape, config = run.tape, run.config
    kind, width = config["model_type"], head_dim(config)
    heads, keys = config["num_attention_heads"], kv_heads(config)
    if kind == "llama4_text":
        return llama4_attention(run, block, layer, hidden)
    if kind in LATENT:
        return latent_attention(run, block, hidden)
    if kind == "gpt_oss":
        return _gpt_oss_attention(run, block, layer, hidden)
    if kind == "phi3":
        qkv = linear(tape, hidden, block["self_attn.qkv_proj"])
        tokens = qkv.count // ((heads + 2 * keys) * width)
        query, key, value = (part(tape, qkv, tokens * n * width) for n in (heads, keys, keys))
    else:
        query, key, value = _project(run, block, hidden)
    cos, sin = run.tables[layer_type(config, layer) if kind == "gemma3_text" else ""]
    if not (kind == "smollm3" and not uses_rope(config, layer)):
        if kind == "phi3":
            turning = rotary_width(config)
            query, key = rotate_part(tape, query, cos, sin, width, turning), rotate_part(tape, key, cos, sin, width, turning)
        else:
            turned, turned_key = rotate(tape, query, cos, sin), rotate(tape, key, cos, sin)
            query, key = cast(tape, turned, query.width), cast(tape, turned_key, key.width)
            del turned, turned_key
    at = Heads(rows=run.rows, queries=run.columns, keys=run.columns, heads=heads, kv_heads=keys, width=width, value_width=width,
               heads_first=kind == "phi3")  # fmt: skip
    mixed = attend(run, query, key, value, run.masks[layer_type(config, layer)], at)
    return linear(tape, mixed, block["self_attn.o_proj"])


def _gpt_oss_attention(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    """Halves of a head turned by tables of half its width; a sink for each head beside the scores."""
    tape, config = run.tape, run.config
    query, key, value = (linear(tape, hidden, block[f"self_attn.{name}_proj"]) for name in ("q", "k", "v"))
    cos, sin = run.tables[""]
    turned = _rotate_halves(tape, query, cos, sin)
    query, key = turned, _rotate_halves(tape, key, cos, sin)
    del turned
    at = Heads(rows=run.rows, queries=run.columns, keys=run.columns, heads=config["num_attention_heads"], kv_heads=kv_heads(config),
               width=head_dim(config), value_width=head_dim(config), heads_first=True)  # fmt: skip
    if run.work.attention == "flash_attention_2":
        mixed = flash(tape, query, key, value, at, workspace=run.work.kernel_workspace)
    else:
        mixed, run.weights = eager_with_sinks(tape, query, key, value, run.masks[layer_type(config, layer)], block["self_attn.sinks"], at)
    return linear(tape, mixed, block["self_attn.o_proj"])


def _rotate_halves(tape: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = split(tape, x, (x.count // 2, x.count // 2))
    lower = subtract(tape, mul_table(tape, first, cos), mul_table(tape, second, sin))
    upper = add(tape, mul_table(tape, second, cos), mul_table(tape, first, sin))
    return join(tape, lower, upper)


def _project(run: Pass, block: Block, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tape, kind = run.tape, run.config["model_type"]
    if kind in ("qwen3", "qwen3_moe", "olmo2"):
        query = _norm(run, linear(tape, hidden, block["self_attn.q_proj"]), block["self_attn.q_norm"])
        key = _norm(run, linear(tape, hidden, block["self_attn.k_proj"]), block["self_attn.k_norm"])
        return query, key, linear(tape, hidden, block["self_attn.v_proj"])
    query, key = linear(tape, hidden, block["self_attn.q_proj"]), linear(tape, hidden, block["self_attn.k_proj"])
    value = linear(tape, hidden, block["self_attn.v_proj"])
    if kind == "gemma3_text":
        query = _norm(run, query, block["self_attn.q_norm"])
        key = _norm(run, key, block["self_attn.k_norm"])
    return query, key, value


def _mlp_of(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    if run.config["model_type"] == "llama4_text":
        return llama4_mixture(run, block, hidden) if is_sparse(run.config, layer) else llama4_mlp(run.tape, block, "feed_forward", hidden)
    if is_sparse(run.config, layer):
        latent = run.config["model_type"] in LATENT
        return (latent_mixture if latent else mixture)(run.tape, run.config, block, hidden)
    tape = run.tape
    if run.config["model_type"] == "phi3":
        both = linear(tape, hidden, block["mlp.gate_up_proj"])
        gate, up = split(tape, both, (both.count // 2, both.count // 2))
        up = mul(tape, up, pointwise(tape, gate))
        return linear(tape, up, block["mlp.down_proj"])
    return gated_mlp(tape, block, "mlp", hidden)
