"""A micro-step on the tape: forward, loss, backward. What it holds beside weights and states, phase by phase."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from launcher.plan.decoder import Pass, decoder_layer, layer_type
from launcher.plan.inventory import Config, head_dim
from launcher.plan.losses import chunked_loss, liger_loss, project
from launcher.plan.operators import FP32, cast, cross_entropy, embed, gather_rows, pointwise_of_result, rms_norm, scale
from launcher.plan.shape import read_text_part
from launcher.plan.tape import CHECKPOINTS, LOGITS, Parameter, Sink, Tape, Tensor, backward, checkpoint, counting_as, drop_gradient
from launcher.plan.workload import Workload, build_block

OnLayer = Callable[[Tape, int], Callable[[], None]]
"""Called before a layer is computed, with its number; what it returns is called after. ZeRO-3 gathers there."""


def run_step(
    work: Workload, layers: int | None = None, *, keep_gradients: bool, gradients_exist: bool = False, record: bool = False,
    accumulates_in_place: bool = True, train: bool = True, round_to: int | None = None,
) -> Tape:  # fmt: skip
    """The tape of one micro-step of the first `layers` layers (all unless told); an evaluation where it does not `train`."""
    tape = Tape(record=record, accumulates_in_place=accumulates_in_place, fused=work.fused, reentrant=work.reentrant,
                round_to=round_to or (512 if work.device == "cuda" else 64))  # fmt: skip
    if not keep_gradients or gradients_exist:
        tape.on_gradient = drop_gradient
    tape.grad_enabled = train
    config = read_text_part(work.shape.config)
    model = _build_model(work, config, config["num_hidden_layers"] if layers is None else layers)
    targets, kept = tape.new(work.tokens, 8), tape.new(work.loss_columns, 8)
    loss = _loss(tape, work, config, model, kept)
    del targets, kept
    if train:
        backward(tape, loss)
    return tape


@lru_cache(maxsize=2)
def recorded_step(work: Workload, *, keep_gradients: bool, gradients_exist: bool) -> Tape:
    """The tape of a whole micro-step with its events: both its peaks and the allocator's replay are taken from it."""
    return run_step(work, keep_gradients=keep_gradients, gradients_exist=gradients_exist, record=True)


class _Model:
    __slots__ = ("blocks", "embedding", "head", "norm")

    def __init__(self, blocks: list[dict[str, Any]], embedding: Parameter, norm: Parameter, head: Any) -> None:
        self.blocks, self.embedding, self.norm, self.head = blocks, embedding, norm, head


def _build_model(work: Workload, config: Config, layers: int) -> _Model:
    """The part that reads text: what a tower for images holds is never computed on text alone."""
    outside: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    inventory = work.shape.inventory
    root = "model.language_model." if any(block.prefix.startswith("model.language_model.") for block in inventory) else "model."
    for block in inventory:
        if not block.layers:
            outside |= {block.prefix + name: weight for name, weight in build_block(work, block, 0).items()}
        elif block.prefix == root + "layers.{}.":
            blocks |= {layer: build_block(work, block, layer) for layer in block.layers if layer < layers}
    embedding = outside[root + "embed_tokens"]
    return _Model([blocks[i] for i in range(layers)], embedding, outside[root + "norm"], outside.get("lm_head", embedding))


def _hidden_states(tape: Tape, work: Workload, config: Config, model: _Model) -> Tensor:
    embedded = embed(tape, model.embedding, work.tokens, config["hidden_size"])
    kind = config["model_type"]
    if kind in ("gemma", "gemma2", "gemma3_text"):
        embedded = scale(tape, embedded)
    if embedded.node is None and work.checkpointing != "off" and tape.grad_enabled:
        # activation_checkpointing_enable asks the embedding's output for a gradient
        embedded.node = Sink(embedded.storage)
    if kind == "granite":
        embedded = scale(tape, embedded)
    # Checkpointed layers keep this for their recomputation; otherwise masks and tables end with the last layer.
    run = Pass(tape, work, config)
    run.masks = _make_masks(run)
    run.tables = _make_tables(run)
    hidden = embedded
    for layer, block in enumerate(model.blocks):
        if work.checkpointing == "off" or not tape.grad_enabled:
            hidden = decoder_layer(run, block, layer, hidden)
        else:
            hidden = checkpoint(tape, _layer_function(run.for_layer(layer), block, layer), hidden, offload=work.checkpointing == "offload")
    style = {"gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma", "gpt_oss": "late", "olmo2": "late"}.get(
        config["model_type"], "llama"
    )
    return rms_norm(tape, hidden, model.norm, style=style)


def _layer_function(run: Pass, block: dict[str, Any], layer: int) -> Callable[[Tensor], Tensor]:
    return lambda hidden: decoder_layer(run, block, layer, hidden)


def _make_masks(run: Pass) -> dict[str, Tensor | None]:
    """One a kind of layer: bool for SDPA (none where causality says it all), a bias in the model's dtype for eager attention."""
    work, tape, config = run.work, run.tape, run.config
    kinds = {layer_type(config, layer) for layer in range(config["num_hidden_layers"])}
    if config["model_type"] in ("gemma2", "gemma3_text", "gpt_oss"):
        kinds = {"full_attention", "sliding_attention"}  # both are made, whether a layer uses them or not
    count = work.micro_batch_size * work.seq_len**2
    masks: dict[str, Tensor | None] = {}
    for kind in sorted(kinds):
        slides = kind == "sliding_attention" and work.seq_len > (config.get("sliding_window") or work.seq_len)
        if work.attention == "flash_attention_2" or (work.attention == "sdpa" and not work.packed and not slides):
            masks[kind] = None
        else:
            masks[kind] = _make_mask(tape, count, work)
    return masks


def _make_mask(tape: Tape, count: int, work: Workload) -> Tensor:
    """masking_utils.sdpa_mask: a bool for causality and one for the packs, and both; eager_mask makes a bias of it."""
    if not work.packed:
        mask = tape.new(count, 1)
    else:
        packs = tape.new(count, 1)
        causal = tape.new(count, 1)
        mask = tape.new(count, 1)
        del packs, causal
    return tape.new(count, work.width) if work.attention == "eager" else mask


def _make_tables(run: Pass) -> dict[str, tuple[Tensor, Tensor]]:
    """cos and sin of every position, in the model's dtype (OLMo 2: in fp32)."""
    config, work, tape = run.config, run.work, run.tape
    count = work.tokens * head_dim(config)
    names = sorted({layer_type(config, i) for i in range(config["num_hidden_layers"])}) if config["model_type"] == "gemma3_text" else [""]
    width = FP32 if config["model_type"] == "olmo2" else work.width
    return {name: (tape.new(count, width), tape.new(count, width)) for name in names}


def _loss(tape: Tape, work: Workload, config: Config, model: _Model, kept: Tensor) -> Tensor:
    """launcher.train.loss: the head on the columns that carry loss, cross-entropy in fp32, summed."""
    if work.loss != "plain":
        return _loss_of_head(tape, work, config, model, kept)
    logits = _logits(tape, work, config, model, kept)
    with counting_as(tape, LOGITS):
        rows = logits.count // config["vocab_size"]
        return cross_entropy(tape, cast(tape, logits, FP32), rows, tape.new(rows, 8))


def _loss_of_head(tape: Tape, work: Workload, config: Config, model: _Model, kept: Tensor) -> Tensor:
    """launcher.train.head: the head gives the loss in place of logits."""
    targets = tape.new(work.loss_rows, 8)
    hidden = _hidden_states(tape, work, config, model)
    tape.enter("loss")
    with counting_as(tape, LOGITS):
        chosen = gather_rows(tape, hidden, work.loss_rows * config["hidden_size"], kept)
        if work.loss == "chunked":
            return chunked_loss(tape, chosen, model.head, config["hidden_size"], targets)
        weight = model.head if isinstance(model.head, Parameter) else model.head.weight
        return liger_loss(tape, chosen, weight, config["hidden_size"])


def _logits(tape: Tape, work: Workload, config: Config, model: _Model, kept: Tensor) -> Tensor:
    hidden = _hidden_states(tape, work, config, model)
    tape.enter("loss")
    with counting_as(tape, LOGITS):
        chosen = gather_rows(tape, hidden, work.loss_rows * config["hidden_size"], kept)
        logits = project(tape, chosen, model.head, config["hidden_size"])
        if config["model_type"] == "granite":
            return scale(tape, logits)
        if config.get("final_logit_softcapping") is not None:
            logits = scale(tape, logits)
            logits = pointwise_of_result(tape, logits)
            logits = scale(tape, logits)
        return logits


__all__ = ["CHECKPOINTS", "run_step"]
