"""Encoder-decoders on the tape: T5 1.0 and 1.1, mT5 (transformers 5.23, models/t5/modeling_t5.py).

As in launcher.plan.decoder, locals here live as long as in the code that is mirrored. What the encoder gives is an argument of every
decoder layer: its keys and values are made of it in each, and their gradients meet in it. The relative positions' bias is made in a
stack's first layer, and is an argument of those after it.

Shapes: B rows, S positions of a source, T of a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.plan.attention import Heads, biased_eager, biased_sdpa
from launcher.plan.forward import Block, Pass
from launcher.plan.inventory import Config
from launcher.plan.inventory_others import depth_of_decoder, feed_forward
from launcher.plan.linears import linear
from launcher.plan.losses import chunked_loss, cross_entropy, liger_loss, project
from launcher.plan.operators import (
    FP32,
    add,
    cast,
    dropout,
    embed,
    gelu_new,
    mean,
    mul,
    pointwise,
    pointwise_of_result,
    rsqrt,
    scale,
    shift,
    square,
)  # fmt: skip
from launcher.plan.tape import LOGITS, Parameter, Sink, Tape, Tensor, checkpoint, counting_as
from launcher.plan.workload import Workload, build_block

INT64 = 8


@dataclass(slots=True)
class Stack:
    """An encoder's or a decoder's layers, and what stands beside them."""

    blocks: list[Block]
    bias: Parameter
    """Of relative positions: rows of a head's width one."""
    norm: Parameter


@dataclass(slots=True)
class Pair:
    """The model. `head` is the embedding where the two are tied."""

    shared: Parameter
    encoder: Stack
    decoder: Stack
    head: Any


def build_pair(work: Workload, config: Config, layers: int | None) -> Pair:
    """The model's weights; the first `layers` of each stack, all unless told."""
    blocks: dict[str, list[Block]] = {"encoder": [], "decoder": []}
    outside: dict[str, Any] = {}
    for block in work.shape.inventory:
        if not block.layers:
            outside |= {block.prefix + name: weight for name, weight in build_block(work, block, 0).items()}
            continue
        depth = config["num_layers"] if block.prefix.startswith("encoder.") else depth_of_decoder(config)
        blocks[block.prefix.partition(".")[0]] += [
            build_block(work, block, layer) for layer in block.layers if layer < min(depth, layers or depth)
        ]

    def stack(name: str) -> Stack:
        return Stack(
            blocks[name], outside[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias"], outside[f"{name}.final_layer_norm"]
        )

    return Pair(outside["shared"], stack("encoder"), stack("decoder"), outside.get("lm_head", outside["shared"]))


def pair_loss(run: Pass, model: Pair) -> Tensor:
    """launcher.train.loss.sum_pair_loss: the model, and cross-entropy in fp32 over all of the targets."""
    rows = run.work.micro_batch_size * run.work.target_len
    given = _forward(run, model, rows)
    if run.work.loss != "plain":
        return given
    with counting_as(run.tape, LOGITS):
        return cross_entropy(run.tape, cast(run.tape, given, FP32), rows, Tensor(None, rows, INT64))


def _forward(run: Pass, model: Pair, rows: int) -> Tensor:
    """Logits, or the loss where the head gives it."""
    tape, width = run.tape, run.config["d_model"]
    encoded = _stack(run, model, model.encoder, None)
    decoded = _stack(run, model, model.decoder, encoded)
    tape.enter("loss")
    with counting_as(tape, LOGITS):
        states = _scaled(run, decoded)
        tape.enter_module("head")
        states = tape.mark_backward(states, "head", ends=True)
        if run.work.loss == "chunked":
            given = chunked_loss(tape, states, model.head, width, Tensor(None, rows, INT64))
        elif run.work.loss == "liger":
            given = liger_loss(tape, states, model.head, width, sums_in_place=run.work.sums_in_place)
        else:
            given = project(tape, states, model.head, width)
        tape.leave_module("head")
        return tape.mark_backward(given, "head")


def _scaled(run: Pass, states: Tensor) -> Tensor:
    """T5 1.0 scales what its head is given; 1.1, which says that its head is not tied, does not, nor does mT5."""
    scales = run.config["model_type"] == "t5" and run.config.get("tie_word_embeddings") is not False
    return scale(run.tape, states) if scales else states


def _stack(run: Pass, model: Pair, stack: Stack, encoded: Tensor | None) -> Tensor:
    """T5Stack.forward."""
    tape, work, config = run.tape, run.work, run.config
    p, columns = _rate(config), work.seq_len if encoded is None else work.target_len
    tape.enter_module("embedding")
    embedded = embed(tape, model.shared, work.micro_batch_size * columns, config["d_model"])
    tape.leave_module("embedding")
    if work.checkpointing != "off" and tape.grad_enabled and embedded.node is None:  # it is asked for a gradient
        embedded.node = Sink(embedded.storage)
    mask, cross_mask = _make_masks(run, encoded is not None)
    bias: Tensor | None = None
    cross: Tensor | None = None
    hidden = dropout(tape, embedded, p)
    first = 0 if encoded is None else len(model.encoder.blocks)
    for number, block in enumerate(stack.blocks):
        tape.enter_module(first + number)
        hidden = tape.mark_backward(hidden, first + number, ends=True)
        layer = _Layer(run, block, stack.bias if number == 0 else None, encoded is not None)
        if work.checkpointing == "off" or not tape.grad_enabled:
            hidden, bias, cross = layer(hidden, mask, bias, encoded, cross_mask, cross)
        else:
            offload = work.checkpointing == "offload"
            hidden, bias, cross = checkpoint(tape, layer, hidden, mask, bias, encoded, cross_mask, cross, offload=offload)
        hidden = tape.mark_backward(hidden, first + number)
        tape.leave_module(first + number)
    normed = t5_norm(tape, hidden, stack.norm)
    hidden = normed
    del normed
    hidden = dropout(tape, hidden, p)
    return hidden


def _rate(config: Config) -> float:
    told = config.get("dropout_rate")
    return 0.1 if told is None else float(told)


def _make_masks(run: Pass, decodes: bool) -> tuple[Tensor | None, Tensor | None]:
    """A stack's own mask, and that of what it sees of the source. A padded source has one; a target's padding is behind all that is learned."""
    work, tape = run.work, run.tape
    own, cross = None, None
    if decodes:
        if work.attention == "eager":
            own = tape.new(work.target_len**2, 1)
            own = tape.new(work.micro_batch_size * work.target_len**2, work.width)
        if work.packed:
            cross = _make_padding_mask(run, work.target_len)
    elif work.packed:
        own = _make_padding_mask(run, work.seq_len)
    return own, cross


def _make_padding_mask(run: Pass, queries: int) -> Tensor:
    work, tape = run.work, run.tape
    count = work.micro_batch_size * queries * work.seq_len
    mask = tape.new(count, 1)
    return tape.new(count, work.width) if work.attention == "eager" else mask


@dataclass(slots=True)
class _Layer:
    """T5Block.forward: what it gives are the hidden state and the biases that later layers are handed."""

    run: Pass
    block: Block
    table: Parameter | None
    decodes: bool

    def __call__(
        self, hidden: Tensor, mask: Tensor | None, bias: Tensor | None, encoded: Tensor | None, cross_mask: Tensor | None, cross: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        run, block = self.run, self.block
        states, own_bias, weights = _attend(run, block, "layer.0.SelfAttention", self.table, hidden, None, mask, bias, self.decodes)
        cross_bias = None
        if self.decodes:
            states, cross_bias, weights = _attend(run, block, "layer.1.EncDecAttention", None, states, encoded, cross_mask, cross, False)
        states = _feed_forward(run, block, states, 2 if self.decodes else 1)
        del weights
        return states, own_bias, cross_bias


def _attend(
    run: Pass, block: Block, place: str, table: Parameter | None, hidden: Tensor, encoded: Tensor | None, mask: Tensor | None,
    bias: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """T5LayerSelfAttention's forward, and T5LayerCrossAttention's."""
    normed = t5_norm(run.tape, hidden, block[f"{place.rpartition('.')[0]}.layer_norm"])
    output, made, weights = _attention(run, block, place, table, normed, encoded, mask, bias, causal)
    output = add(run.tape, hidden, dropout(run.tape, output, _rate(run.config)))
    return output, made, weights


def _attention(
    run: Pass, block: Block, place: str, table: Parameter | None, hidden: Tensor, encoded: Tensor | None, mask: Tensor | None,
    bias: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """T5Attention.forward, over the hidden state itself or what the encoder gave."""
    tape, work, config = run.tape, run.work, run.config
    query = linear(tape, hidden, block[f"{place}.q"])
    source = hidden if encoded is None else encoded
    key = linear(tape, source, block[f"{place}.k"])
    value = linear(tape, source, block[f"{place}.v"])
    queries, keys = hidden.count // (work.micro_batch_size * config["d_model"]), source.count // (work.micro_batch_size * config["d_model"])
    own = bias if bias is not None else _make_bias(run, table, queries, keys, causal)
    at = Heads(rows=work.micro_batch_size, queries=queries, keys=keys, heads=config["num_heads"], kv_heads=config["num_heads"],
               width=config["d_kv"], value_width=config["d_kv"], causal=causal)  # fmt: skip
    lies_by_heads = encoded is not None or at.heads == 1  # zeros do; what comes of a table lies position by position
    weights: Tensor | None = None
    if work.attention == "eager":
        mixed, weights = biased_eager(tape, query, key, value, mask, own, at, p=_rate(config))
    else:
        mixed = biased_sdpa(tape, query, key, value, mask, own, at, by_heads=lies_by_heads, device=work.device,
                            workspace=work.kernel_workspace, p=_rate(config))  # fmt: skip
    mixed = linear(tape, mixed, block[f"{place}.o"])
    return mixed, own, weights


def _make_bias(run: Pass, table: Parameter | None, queries: int, keys: int, causal: bool) -> Tensor:
    """The relative positions' bias, a number a head for every query and key; zeros without a table, which checkpointing asks for a gradient."""
    tape, heads = run.tape, run.config["num_heads"]
    if table is not None:
        return _look_up(tape, table, queries, keys, heads, causal)
    zeros = tape.new(heads * queries * keys, run.work.width)
    if run.work.checkpointing != "off" and tape.training:
        zeros.node = Sink(zeros.storage)
    return zeros


def _look_up(tape: Tape, table: Parameter, queries: int, keys: int, heads: int, causal: bool) -> Tensor:
    """T5Attention.compute_bias."""
    context = tape.new(queries, INT64)
    context = tape.new(queries, INT64)
    memory = tape.new(keys, INT64)
    relative = tape.new(queries * keys, INT64)
    buckets = _find_buckets(tape, queries * keys, causal)
    values = embed(tape, table, queries * keys, heads, buckets)
    del context, memory, relative
    return values


def _find_buckets(tape: Tape, count: int, causal: bool) -> Tensor:
    """T5Attention._relative_position_bucket, in int64 and fp32."""

    def long() -> Tensor:
        return tape.new(count, INT64)

    buckets: Tensor | None = None
    if causal:
        zeros = long()
        least = long()
        del zeros
        position = long()
        del least
    else:
        positive = tape.new(count, 1)
        buckets = long()
        del positive
        buckets = long()
        buckets = long()
        position = long()
    small = tape.new(count, 1)
    part = tape.new(count, FP32)
    for _ in range(4):  # over the exact ones, its logarithm, over the range's, times the buckets'
        part = tape.new(count, FP32)
    whole = long()
    del part
    whole = long()
    most = long()
    whole = long()
    del most
    chosen = long()
    if buckets is None:
        buckets = long()
    del chosen, position, small, whole
    return buckets


def _feed_forward(run: Pass, block: Block, hidden: Tensor, number: int) -> Tensor:
    """T5LayerFF.forward."""
    tape, place = run.tape, f"layer.{number}"
    forwarded = t5_norm(tape, hidden, block[f"{place}.layer_norm"])
    gated = f"{place}.DenseReluDense.wi_0" in block
    forwarded = (_gated if gated else _plain)(run, block, f"{place}.DenseReluDense", forwarded)
    states = add(tape, hidden, dropout(tape, forwarded, _rate(run.config)))
    return states


def _plain(run: Pass, block: Block, place: str, hidden: Tensor) -> Tensor:
    states = linear(run.tape, hidden, block[f"{place}.wi"])
    states = _activate(run, states)
    states = dropout(run.tape, states, _rate(run.config))
    states = linear(run.tape, states, block[f"{place}.wo"])
    return states


def _gated(run: Pass, block: Block, place: str, hidden: Tensor) -> Tensor:
    gate = _activate(run, linear(run.tape, hidden, block[f"{place}.wi_0"]))
    straight = linear(run.tape, hidden, block[f"{place}.wi_1"])
    states = mul(run.tape, gate, straight)
    states = dropout(run.tape, states, _rate(run.config))
    states = linear(run.tape, states, block[f"{place}.wo"])
    del gate, straight
    return states


def _activate(run: Pass, x: Tensor) -> Tensor:
    told = feed_forward(run.config)
    named = "gelu_new" if told == "gated-gelu" else told.rpartition("-")[2]
    if named in ("gelu_new", "gelu_fast"):
        return gelu_new(run.tape, x)
    return (pointwise_of_result if named in ("relu", "tanh", "sigmoid") else pointwise)(run.tape, x)


def t5_norm(tape: Tape, x: Tensor, weight: Parameter) -> Tensor:
    """T5LayerNorm: the mean square in fp32, x in its own dtype times its root's reciprocal, cast back, times the weight."""
    variance = mean(tape, square(tape, cast(tape, x, FP32)), x.count // weight.count)
    states = mul(tape, x, rsqrt(tape, shift(tape, variance)))
    states = cast(tape, states, weight.width)
    out = mul(tape, weight, states)
    del variance
    return out
