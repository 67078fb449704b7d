"""Forward passes of decoders on the tape, in the order of transformers' code (5.23, models/*/modeling_*.py).

What is written here decides what is live when: locals live until their function returns, as in the code that is mirrored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launcher.plan.attention import Heads, eager, flash, sdpa
from launcher.plan.experts import mixture
from launcher.plan.fused import fused_gate
from launcher.plan.inventory import Config, head_dim, is_sparse, kv_heads, num_experts
from launcher.plan.operators import (
    FP32,
    add,
    cast,
    copy,
    join,
    layer_norm,
    linear,
    mul,
    part,
    pointwise,
    pointwise_of_result,
    rms_norm,
    rotate,
    scale,
    split,
)  # fmt: skip
from launcher.plan.tape import Tape, Tensor
from launcher.plan.workload import Workload

CLOSED_FORMS = frozenset({"llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite",
                          "mixtral", "qwen3_moe"})  # fmt: skip
"""Model types whose forward and backward are told exactly here; tests/test_referee.py holds each to a trace."""

Block = dict[str, Any]


@dataclass(slots=True)
class Pass:
    """One forward pass: the tape, and what all layers are handed."""

    tape: Tape
    work: Workload
    config: Config
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[str, Tensor | None] = field(default_factory=dict)

    def for_layer(self, layer: int) -> Pass:
        """With the layer's own mask and tables alone: what a checkpoint of it keeps."""
        kind = layer_type(self.config, layer)
        tables = {name: pair for name, pair in self.tables.items() if name in ("", kind)}
        return Pass(self.tape, self.work, self.config, tables, {kind: self.masks[kind]})

    @property
    def rows(self) -> int:
        return 1 if self.is_flat else self.work.micro_batch_size

    @property
    def columns(self) -> int:
        return self.work.tokens if self.is_flat else self.work.seq_len

    @property
    def is_flat(self) -> bool:
        return self.work.attention == "flash_attention_2"


def layer_type(config: Config, layer: int) -> str:
    """full_attention or sliding_attention (configuration_*.py where config.json does not list them)."""
    listed = config.get("layer_types")
    if listed:
        return str(listed[layer])
    kind = config["model_type"]
    if kind == "gemma2" or kind == "gpt_oss":
        return "sliding_attention" if (layer + 1) % 2 else "full_attention"
    if kind == "gemma3_text":
        return "sliding_attention" if (layer + 1) % config.get("sliding_window_pattern", 6) else "full_attention"
    return "full_attention"


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
    states = add(tape, residual, _scaled(run, states))
    residual = states
    states = _norm(run, states, block["post_attention_layernorm"])
    states = _mlp_of(run, block, layer, states)
    states = add(tape, residual, _scaled(run, states))
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


NORM_STYLES = {"gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma", "gpt_oss": "late", "olmo2": "late"}


def _norm(run: Pass, x: Tensor, weight: Any) -> Tensor:
    return rms_norm(run.tape, x, weight, style=NORM_STYLES.get(run.config["model_type"], "llama"))


def attention(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    """Self-attention with grouped heads, for all but latent attention."""
    tape, config = run.tape, run.config
    kind, width = config["model_type"], head_dim(config)
    heads, keys = config["num_attention_heads"], kv_heads(config)
    if kind == "phi3":
        qkv = linear(tape, hidden, block["self_attn.qkv_proj"])
        tokens = qkv.count // ((heads + 2 * keys) * width)
        query, key, value = (part(tape, qkv, tokens * n * width) for n in (heads, keys, keys))
    else:
        query, key, value = _project(run, block, hidden)
    cos, sin = run.tables[layer_type(config, layer) if kind == "gemma3_text" else ""]
    if not (kind == "smollm3" and not _uses_rope(config, layer)):
        if kind == "phi3":
            query, key = _rotate_part(tape, query, cos, sin), _rotate_part(tape, key, cos, sin)
        else:
            turned = rotate(tape, query, cos, sin)
            query, key = cast(tape, turned, query.width), cast(tape, rotate(tape, key, cos, sin), key.width)
            del turned
    at = Heads(rows=run.rows, queries=run.columns, keys=run.columns, heads=heads, kv_heads=keys, width=width, value_width=width,
               heads_first=kind == "phi3")  # fmt: skip
    mixed = attend(run, query, key, value, run.masks[layer_type(config, layer)], at)
    return linear(tape, mixed, block["self_attn.o_proj"])


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


def _uses_rope(config: Config, layer: int) -> bool:
    listed = config.get("no_rope_layers")
    return bool(listed[layer]) if listed else (layer + 1) % config.get("no_rope_layer_interval", 4) != 0


def _rotate_part(tape: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Phi-3: part of a head's width is turned, the rest joined to it (also where there is no rest)."""
    turned_count = x.count
    turned, passed = part(tape, x, turned_count), part(tape, x, 0)
    return join(tape, rotate(tape, turned, cos, sin), passed)


def attend(run: Pass, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, at: Heads) -> Tensor:
    """The attention kernel of the run."""
    work = run.work
    if work.attention == "eager":
        softcap = run.config.get("attn_logit_softcapping") is not None and run.config["model_type"] == "gemma2"
        return eager(run.tape, query, key, value, mask, at, p=float(run.config.get("attention_dropout") or 0.0), softcap=softcap)
    if work.attention == "flash_attention_2":
        return flash(run.tape, query, key, value, at, workspace=work.kernel_workspace)
    return sdpa(run.tape, query, key, value, mask, at, device=work.device, workspace=work.kernel_workspace)


def _mlp_of(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    if is_sparse(run.config, layer):
        c = run.config
        mixtral = c["model_type"] == "mixtral"
        return mixture(run.tape, block, hidden, experts=num_experts(c), top_k=c["num_experts_per_tok"], width=c["hidden_size"],
                       normalised=mixtral or bool(c.get("norm_topk_prob")), wide=mixtral)  # fmt: skip
    tape = run.tape
    if run.config["model_type"] == "phi3":
        both = linear(tape, hidden, block["mlp.gate_up_proj"])
        gate, up = split(tape, both, (both.count // 2, both.count // 2))
        up = mul(tape, up, pointwise(tape, gate))
        return linear(tape, up, block["mlp.down_proj"])
    return gated_mlp(tape, block, "mlp", hidden)


def gated_mlp(tape: Tape, block: Block, name: str, hidden: Tensor) -> Tensor:
    if tape.fused:
        gate, up = linear(tape, hidden, block[f"{name}.gate_proj"]), linear(tape, hidden, block[f"{name}.up_proj"])
        mixed = fused_gate(tape, gate, up)
        del gate, up
        return linear(tape, mixed, block[f"{name}.down_proj"])
    return linear(
        tape, mul(tape, pointwise(tape, linear(tape, hidden, block[f"{name}.gate_proj"])), linear(tape, hidden, block[f"{name}.up_proj"])),
        block[f"{name}.down_proj"],
    )  # fmt: skip


__all__ = ["CLOSED_FORMS", "FP32", "Pass", "attend", "attention", "cast", "copy", "decoder_layer", "gated_mlp", "layer_norm", "layer_type",
           "pointwise_of_result"]  # fmt: skip
