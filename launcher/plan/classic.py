"""Models with layer norms, biases and dropout: BERT and RoBERTa, GPT-2, GPT-NeoX, Phi 1 and 2 (transformers 5.23, models/*/modeling_*.py).

As in launcher.plan.decoder, locals here live as long as in the code that is mirrored.
"""

from __future__ import annotations

from typing import Any

from launcher.plan.attention import Heads
from launcher.plan.forward import Block, Pass, attend, rotary_width, rotate_part
from launcher.plan.inventory import Config, head_dim, kv_heads
from launcher.plan.linears import linear
from launcher.plan.operators import (
    add,
    dropout,
    embed,
    gather_rows,
    gelu_new,
    join,
    layer_norm,
        matmul,
    part,
    pointwise,
    pointwise_of_result,
    rotate,
    split,
)  # fmt: skip
from launcher.plan.tape import Parameter, Sink, Tape, Tensor

CLASSIC = frozenset({"bert", "roberta", "gpt2", "gpt_neox", "phi"})
ENCODERS = frozenset({"bert", "roberta"})
"""They look in both directions, and at no positions when they make a mask."""

INT64 = 8


def norm(run: Pass, x: Tensor, weights: dict[str, Any], name: str) -> Tensor:
    return layer_norm(run.tape, x, weights[name], weights[f"{name}.bias"])


def rate(config: Config, *names: str) -> float:
    """A dropout's probability: what config.json says, or the configuration class' own default."""
    for name in names:
        if config.get(name) is not None:
            return float(config[name])
    return 0.1 if config["model_type"] in ("bert", "roberta", "gpt2") else 0.0


def embed_tokens(run: Pass, outside: dict[str, Any], leaf: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What masks are made after, and what the model's forward holds on to. `leaf`: the table's rows are asked for a gradient."""
    tape, config, kind = run.tape, run.config, run.config["model_type"]
    hidden, tokens = config["hidden_size"], run.work.tokens
    if kind in ENCODERS:
        embedded = _embed_pair(run, outside, leaf)
        return embedded, (embedded,)
    rows = embed(tape, outside[{"gpt2": "wte", "gpt_neox": "embed_in"}.get(kind, "embed_tokens")], tokens, hidden)
    _make_leaf(rows, leaf)
    if kind != "gpt2":
        return rows, (rows,) if kind == "gpt_neox" else ()
    positions = embed(tape, outside["wpe"], tokens, hidden)
    return add(tape, rows, positions), (rows, positions)


def drop_embedded(run: Pass, embedded: Tensor) -> Tensor:
    """What the first layer is given."""
    if run.config["model_type"] in ENCODERS:
        return embedded
    return dropout(run.tape, embedded, rate(run.config, "embd_pdrop", "hidden_dropout"))


def _make_leaf(rows: Tensor, leaf: bool) -> None:
    if leaf and rows.node is None:
        rows.node = Sink(rows.storage)


def _embed_pair(run: Pass, outside: dict[str, Any], leaf: bool) -> Tensor:
    """BertEmbeddings: words, kinds of token (their numbers are gathered for this batch) and positions."""
    tape, hidden, tokens = run.tape, run.config["hidden_size"], run.work.tokens
    kinds = tape.new(tokens, INT64)
    words = embed(tape, outside["embeddings.word_embeddings"], tokens, hidden)
    _make_leaf(words, leaf)
    of_kind = embed(tape, outside["embeddings.token_type_embeddings"], tokens, hidden, kinds)
    embeddings = add(tape, words, of_kind)
    positions = embed(tape, outside["embeddings.position_embeddings"], tokens, hidden)
    embeddings = add(tape, embeddings, positions)
    embeddings = norm(run, embeddings, outside, "embeddings.LayerNorm")
    return dropout(tape, embeddings, rate(run.config, "hidden_dropout_prob"))


def classic_layer(run: Pass, block: Block, layer: int, hidden: Tensor) -> Tensor:
    """One transformer layer."""
    kind = run.config["model_type"]
    if kind in ENCODERS:
        return _bert_layer(run, block, hidden)
    if kind == "gpt2":
        return _gpt2_layer(run, block, hidden)
    return _neox_layer(run, block, hidden) if kind == "gpt_neox" else _phi_layer(run, block, hidden)


def _activate(run: Pass, x: Tensor) -> Tensor:
    named = run.config.get("activation_function") or run.config.get("hidden_act") or ACTIVATIONS[run.config["model_type"]]
    if named in ("gelu_new", "gelu_fast"):
        return gelu_new(run.tape, x)
    return (pointwise_of_result if named in ("relu", "tanh", "sigmoid") else pointwise)(run.tape, x)


ACTIVATIONS = {"bert": "gelu", "roberta": "gelu", "gpt2": "gelu_new", "gpt_neox": "gelu", "phi": "gelu_new"}


# ------------------------------------------------------------------------------------------------- BERT


def _bert_layer(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    attended = _bert_attention(run, block, hidden)
    return _bert_mlp(run, block, attended)


def _bert_attention(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    mixed = _bert_heads(run, block, hidden)
    return _bert_output(run, block, "attention.output", mixed, hidden)


def _bert_heads(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    query, key, value = (linear(run.tape, hidden, block[f"attention.self.{name}"]) for name in ("query", "key", "value"))
    return attend(
        run,
        query,
        key,
        value,
        run.masks["full_attention"],
        _heads(run, causal=bool(run.config.get("is_decoder"))),
        p=rate(run.config, "attention_probs_dropout_prob"),
    )


def _bert_mlp(run: Pass, block: Block, attended: Tensor) -> Tensor:
    inner = _bert_inner(run, block, attended)
    return _bert_output(run, block, "output", inner, attended)


def _bert_inner(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    states = linear(run.tape, hidden, block["intermediate.dense"])
    states = _activate(run, states)
    return states


def _bert_output(run: Pass, block: Block, name: str, hidden: Tensor, residual: Tensor) -> Tensor:
    states = linear(run.tape, hidden, block[f"{name}.dense"])
    states = dropout(run.tape, states, rate(run.config, "hidden_dropout_prob"))
    states = norm(run, add(run.tape, states, residual), block, f"{name}.LayerNorm")
    return states


def _heads(run: Pass, **more: Any) -> Heads:
    heads, width = run.config["num_attention_heads"], head_dim(run.config)
    keys = kv_heads(run.config) if run.config["model_type"] == "phi" else heads
    return Heads(rows=run.rows, queries=run.columns, keys=run.columns, heads=heads, kv_heads=keys, width=width, value_width=width, **more)


def encoder_logits(run: Pass, outside: dict[str, Any], hidden: Tensor, count: int, kept: Tensor) -> Tensor:
    """BERT's and RoBERTa's head on the columns that carry loss: a layer, an activation, a norm, the words."""
    tape, bert = run.tape, run.config["model_type"] == "bert"
    chosen = gather_rows(tape, hidden, count, kept)
    states = linear(tape, chosen, outside["cls.predictions.transform.dense" if bert else "lm_head.dense"])
    states = _activate(run, states)
    states = norm(run, states, outside, "cls.predictions.transform.LayerNorm" if bert else "lm_head.layer_norm")
    if "head" in outside:
        return linear(tape, states, outside["head"])
    words: Parameter = outside["embeddings.word_embeddings"]
    return matmul(tape, states, words, run.config["hidden_size"], outside["cls.predictions.bias" if bert else "lm_head.bias"])


# ------------------------------------------------------------------------------------------------- GPT-2 and GPT-NeoX


def _gpt2_layer(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    tape = run.tape
    residual = hidden
    states = norm(run, hidden, block, "ln_1")
    attended = _gpt2_attention(run, block, states)
    states = add(tape, attended, residual)
    residual = states
    states = norm(run, states, block, "ln_2")
    inner = _gpt2_mlp(run, block, states)
    states = add(tape, residual, inner)
    return states


def _gpt2_attention(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    tape = run.tape
    fused = linear(tape, hidden, block["attn.c_attn"])
    query, key, value = split(tape, fused, (hidden.count,) * 3)
    del fused
    mixed = attend(run, query, key, value, run.masks["full_attention"], _heads(run), p=rate(run.config, "attn_pdrop"))
    mixed = linear(tape, mixed, block["attn.c_proj"])
    return dropout(tape, mixed, rate(run.config, "resid_pdrop"))


def _gpt2_mlp(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    states = linear(run.tape, hidden, block["mlp.c_fc"])
    states = _activate(run, states)
    states = linear(run.tape, states, block["mlp.c_proj"])
    return dropout(run.tape, states, rate(run.config, "resid_pdrop"))


def _neox_layer(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    tape, p = run.tape, rate(run.config, "hidden_dropout")
    attended = dropout(tape, _neox_attention(run, block, norm(run, hidden, block, "input_layernorm")), p)
    if run.config.get("use_parallel_residual", True):
        inner = dropout(
            tape, _plain_mlp(run, block, norm(run, hidden, block, "post_attention_layernorm"), "dense_h_to_4h", "dense_4h_to_h"), p
        )
        return add(tape, add(tape, inner, attended), hidden)
    attended = add(tape, attended, hidden)
    inner = dropout(
        tape, _plain_mlp(run, block, norm(run, attended, block, "post_attention_layernorm"), "dense_h_to_4h", "dense_4h_to_h"), p
    )
    return add(tape, inner, attended)


def _neox_attention(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    tape, config = run.tape, run.config
    qkv = linear(tape, hidden, block["attention.query_key_value"])
    query, key, value = split(tape, qkv, (hidden.count,) * 3)
    cos, sin = run.tables[""]
    width = head_dim(config)
    query, key = (
        rotate_part(tape, query, cos, sin, width, rotary_width(config)),
        rotate_part(tape, key, cos, sin, width, rotary_width(config)),
    )
    mixed = attend(run, query, key, value, run.masks["full_attention"], _heads(run, heads_first=True))
    return linear(tape, mixed, block["attention.dense"])


def _plain_mlp(run: Pass, block: Block, hidden: Tensor, first: str, second: str) -> Tensor:
    states = linear(run.tape, hidden, block[f"mlp.{first}"])
    states = _activate(run, states)
    return linear(run.tape, states, block[f"mlp.{second}"])


# ------------------------------------------------------------------------------------------------- Phi 1 and 2


def _phi_layer(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    tape, p = run.tape, rate(run.config, "resid_pdrop")
    residual = hidden
    states = norm(run, hidden, block, "input_layernorm")
    attended = _phi_attention(run, block, states)
    attended = dropout(tape, attended, p)
    inner = dropout(tape, _plain_mlp(run, block, states, "fc1", "fc2"), p)
    states = add(tape, add(tape, attended, inner), residual)
    return states


def _phi_attention(run: Pass, block: Block, hidden: Tensor) -> Tensor:
    tape, width, turning = run.tape, head_dim(run.config), rotary_width(run.config)
    query, key, value = (linear(tape, hidden, block[f"self_attn.{name}_proj"]) for name in ("q", "k", "v"))
    if run.config.get("qk_layernorm"):
        query, key = norm(run, query, block, "self_attn.q_layernorm"), norm(run, key, block, "self_attn.k_layernorm")
    cos, sin = run.tables[""]
    turned_query, passed_query = _cut(tape, query, width, turning)
    turned_key, passed_key = _cut(tape, key, width, turning)
    turned_query, turned_key = rotate(tape, turned_query, cos, sin), rotate(tape, turned_key, cos, sin)
    query = join(tape, turned_query, passed_query)
    key = join(tape, turned_key, passed_key)
    mixed = attend(run, query, key, value, run.masks["full_attention"], _heads(run, heads_first=True))
    mixed = linear(tape, mixed, block["self_attn.dense"])
    del passed_query, passed_key, turned_query, turned_key
    return mixed


def _cut(tape: Tape, x: Tensor, width: int, at: int) -> tuple[Tensor, Tensor]:
    count = x.count // width * at
    return part(tape, x, count), part(tape, x, x.count - count)
