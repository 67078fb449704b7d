"""A micro-step on the tape: forward, loss, backward. What it holds beside weights and states, phase by phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from launcher.plan.classic import CLASSIC, ENCODERS, classic_layer, drop_embedded, embed_tokens, encoder_logits, norm
from launcher.plan.decoder import LATENT, NORM_STYLES, decoder_layer
from launcher.plan.forward import Pass, layer_type, rotary_width, sliding_window
from launcher.plan.inventory import Config
from launcher.plan.inventory_others import PAIRS
from launcher.plan.latent import widths
from launcher.plan.losses import chunked_loss, cross_entropy, liger_loss, project
from launcher.plan.operators import FP32, cast, embed, gather_rows, pointwise_of_result, rms_norm, scale
from launcher.plan.pairs import build_pair, pair_loss
from launcher.plan.shape import name_alike, read_text_part
from launcher.plan.tape import CHECKPOINTS, LOGITS, Sink, Tape, Tensor, backward, checkpoint, counting_as, drop_gradient
from launcher.plan.workload import Workload, build_block

OnLayer = Callable[[Tape, int], Callable[[], None]]
"""Called before a layer is computed, with its number; what it returns is called after. ZeRO-3 gathers there."""


def run_step(
    work: Workload, layers: int | None = None, *, keep_gradients: bool, gradients_exist: bool = False, record: bool = False,
    accumulates_in_place: bool = True, train: bool = True, round_to: int | None = None,
) -> Tape:  # fmt: skip
    """The tape of one micro-step of the first `layers` layers (all unless told); an evaluation where it does not `train`."""
    tape = Tape(record=record, accumulates_in_place=accumulates_in_place, round_to=round_to or (512 if work.device == "cuda" else 64),
                on_cuda=work.device == "cuda", counts_workspace=work.kernel_workspace, training=train, fused=work.fused, reentrant=work.reentrant,
                notes_graph=record and work.device == "cpu")  # fmt: skip
    if not keep_gradients or gradients_exist:
        tape.on_gradient = drop_gradient
    config = name_alike(read_text_part(work.shape.config))
    # Whoever holds the weights holds their gradients.
    pair = build_pair(work, config, layers) if config["model_type"] in PAIRS else None
    if pair is not None:
        loss = pair_loss(Pass(tape, work, config), pair)
    else:
        model = _build_model(work, config, config["num_hidden_layers"] if layers is None else layers)
        targets, kept = tape.new(work.tokens, 8), tape.new(work.loss_columns, 8)
        loss = _loss(Pass(tape, work, config), model, kept)
        del targets, kept
    if train:
        backward(tape, loss)
    return tape


@lru_cache(maxsize=2)
def recorded_step(work: Workload, *, keep_gradients: bool, gradients_exist: bool) -> Tape:
    """The tape of a whole micro-step with its events: both its peaks and the allocator's replay are taken from it."""
    return run_step(work, keep_gradients=keep_gradients, gradients_exist=gradients_exist, record=True)


@dataclass(slots=True)
class _Model:
    """The part of a model that reads text. `outside` are the weights outside of layers, by their names within the part."""

    blocks: list[dict[str, Any]]
    outside: dict[str, Any]


ROOTS = {"gpt2": ("transformer.", "h.{}."), "gpt_neox": ("gpt_neox.", "layers.{}."), "bert": ("bert.", "encoder.layer.{}."),
         "roberta": ("roberta.", "encoder.layer.{}.")}  # fmt: skip
"""Where the part that reads text hangs in its model, and where its layers do; the others have theirs in model.layers."""
HEADS = ("lm_head", "cls.predictions.decoder", "lm_head.decoder")


def _build_model(work: Workload, config: Config, layers: int) -> _Model:
    """What a tower for images holds is never computed on text alone."""
    outside: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    inventory = work.shape.inventory
    root, each = ROOTS.get(config["model_type"], ("model.", "layers.{}."))
    if any(block.prefix.startswith("model.language_model.") for block in inventory):
        root = "model.language_model."
    for block in inventory:
        if not block.layers:
            outside |= {(block.prefix + name).removeprefix(root): weight for name, weight in build_block(work, block, 0).items()}
        elif block.prefix == root + each:
            blocks |= {layer: build_block(work, block, layer) for layer in block.layers if layer < layers}
    head = next((outside[name] for name in HEADS if name in outside), None)
    if head is not None:
        outside["head"] = head
    return _Model([blocks[i] for i in range(layers)], outside)


def _hidden_states(run: Pass, model: _Model) -> Tensor:
    work, tape, kind = run.work, run.tape, run.config["model_type"]
    # activation_checkpointing_enable asks the embedding's output for a gradient
    leaf = work.checkpointing != "off" and tape.grad_enabled
    beside: tuple[Tensor, ...] = ()
    tape.enter_module("embedding")
    if kind in CLASSIC:
        embedded, beside = embed_tokens(run, model.outside, leaf)
    else:
        embedded = _embed(run, model, leaf)
    tape.leave_module("embedding")
    # Checkpointed layers keep this for their recomputation; otherwise masks and tables end with the last layer.
    run.masks = _make_masks(run)
    run.tables = _make_tables(run)
    if kind in CLASSIC:
        hidden = drop_embedded(run, embedded)
        if kind == "phi":
            beside = (hidden,)
        del embedded
    else:
        hidden = embedded
    for layer, block in enumerate(model.blocks):
        tape.enter_module(layer)
        hidden = tape.mark_backward(hidden, layer, ends=True)
        if work.checkpointing == "off" or not tape.grad_enabled:
            hidden = _layer(run, block, layer, hidden)
        else:
            hidden = checkpoint(tape, _layer_function(run.for_layer(layer), block, layer), hidden, offload=work.checkpointing == "offload")
        hidden = tape.mark_backward(hidden, layer)
        tape.leave_module(layer)
    hidden = _last_norm(run, model, hidden)
    del beside
    return hidden


def _embed(run: Pass, model: _Model, leaf: bool) -> Tensor:
    tape, kind = run.tape, run.config["model_type"]
    embedded = embed(tape, model.outside["embed_tokens"], run.work.tokens, run.config["hidden_size"])
    if kind in ("gemma", "gemma2", "gemma3_text"):
        embedded = scale(tape, embedded)
    if embedded.node is None and leaf:
        embedded.node = Sink(embedded.storage)
    return scale(tape, embedded) if kind == "granite" else embedded


def _last_norm(run: Pass, model: _Model, hidden: Tensor) -> Tensor:
    kind = run.config["model_type"]
    if kind in ENCODERS:
        return hidden
    name = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "phi": "final_layernorm"}.get(kind, "norm")
    if kind in CLASSIC:
        return norm(run, hidden, model.outside, name)
    return rms_norm(run.tape, hidden, model.outside[name], style=NORM_STYLES.get(kind, "llama"))


def _layer(run: Pass, block: dict[str, Any], layer: int, hidden: Tensor) -> Tensor:
    told = classic_layer if run.config["model_type"] in CLASSIC else decoder_layer
    try:
        return told(run, block, layer, hidden)
    finally:  # a recomputation ends where nothing more is needed
        run.weights = None


def _layer_function(run: Pass, block: dict[str, Any], layer: int) -> Callable[[Tensor], Tensor]:
    return lambda hidden: _layer(run, block, layer, hidden)


BLIND_TO_PACKS = frozenset({*ENCODERS, "gpt_oss"})
"""transformers 5.23 hands these models' masks no positions, so that packed examples are not kept apart but under flash attention."""


def _make_masks(run: Pass) -> dict[str, Tensor | None]:
    """One a kind of layer: bool for SDPA (none where causality says it all), a bias in the model's dtype for eager attention."""
    work, tape, config = run.work, run.tape, run.config
    kinds = {layer_type(config, layer) for layer in range(config["num_hidden_layers"])}
    if config["model_type"] in ("gemma2", "gemma3_text", "gpt_oss", "qwen2_moe"):
        kinds = {"full_attention", "sliding_attention"}  # both are made, whether a layer uses them or not
    count = work.micro_batch_size * work.seq_len**2
    if config["model_type"] == "llama4_text":
        kinds = {"full_attention", "chunked_attention"}
    if config["model_type"] in ENCODERS and not config.get("is_decoder"):
        return {"full_attention": None}
    masks: dict[str, Tensor | None] = {}
    for kind in sorted(kinds):
        window = {"sliding_attention": sliding_window(config), "chunked_attention": config.get("attention_chunk_size")}.get(kind)
        if kind == "sliding_attention" and config["model_type"] == "qwen2_moe" and not config.get("use_sliding_window"):
            window = 0  # its configuration says so, and a mask is made that no layer uses
        slides = window is not None and work.seq_len >= window
        packed = work.packed and config["model_type"] not in BLIND_TO_PACKS
        if work.attention == "flash_attention_2" or (work.attention == "sdpa" and not packed and not slides):
            masks[kind] = None
        else:
            masks[kind] = _make_mask(tape, count, work, packed or kind == "chunked_attention" and slides, packed)
    return masks


def _make_mask(tape: Tape, count: int, work: Workload, each_row: bool, packed: bool) -> Tensor:
    """masking_utils.sdpa_mask: a bool for causality, one for the packs, and both; eager_mask makes a bias of it. Chunks begin where a row does."""
    if not each_row:  # one for all rows, expanded to them
        mask = Tensor(tape.new(work.seq_len**2, 1).storage, count, 1)
    elif not packed:
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
    count = work.tokens * rotary_width(config) // (2 if config["model_type"] == "gpt_oss" else 1)
    if config["model_type"] in ("bert", "roberta", "gpt2"):
        return {}
    if config["model_type"] in LATENT:
        rope = widths(config)[1]
        if config["model_type"] == "deepseek_v3":
            return {"": (tape.new(work.tokens * rope, work.width), tape.new(work.tokens * rope, work.width))}
        table = tape.new(work.tokens * rope, FP32)  # half as many complex numbers
        return {"": (table, table)}
    if config["model_type"] == "llama4_text":
        table = tape.new(work.tokens * rotary_width(config), FP32)
        return {"": (table, table)}
    names = sorted({layer_type(config, i) for i in range(config["num_hidden_layers"])}) if config["model_type"] == "gemma3_text" else [""]
    width = FP32 if config["model_type"] == "olmo2" else work.width
    return {name: (tape.new(count, width), tape.new(count, width)) for name in names}


def _loss(run: Pass, model: _Model, kept: Tensor) -> Tensor:
    """launcher.train.loss: the head on the columns that carry loss, cross-entropy in fp32, summed."""
    tape = run.tape
    if run.work.loss != "plain" and run.config["model_type"] not in ENCODERS:
        return _loss_of_head(run, model, kept)
    logits = _logits(run, model, kept)
    with counting_as(tape, LOGITS):
        rows = logits.count // run.config["vocab_size"]
        return cross_entropy(tape, cast(tape, logits, FP32), rows, tape.new(rows, 8))


def _loss_of_head(run: Pass, model: _Model, kept: Tensor) -> Tensor:
    """launcher.train.head: the head gives the loss in place of logits."""
    work, tape, width = run.work, run.tape, run.config["hidden_size"]
    rows = run.rows * work.loss_columns
    targets = tape.new(rows, 8)
    hidden = _hidden_states(run, model)
    run.masks, run.tables = {}, {}
    tape.enter("loss")
    with counting_as(tape, LOGITS):
        chosen, head = gather_rows(tape, hidden, rows * width, kept), _head_of(model)
        tape.enter_module("head")
        chosen = tape.mark_backward(chosen, "head", ends=True)
        if work.loss == "chunked":
            loss = chunked_loss(tape, chosen, head, width, targets)
        else:
            loss = liger_loss(tape, chosen, head, width, sums_in_place=work.sums_in_place)
        tape.leave_module("head")
        return tape.mark_backward(loss, "head")


def _head_of(model: _Model) -> Any:
    """A linear layer, or the embedding's weight."""
    return model.outside.get("head", model.outside.get("embed_tokens", model.outside.get("wte", model.outside.get("embed_in"))))


def _logits(run: Pass, model: _Model, kept: Tensor) -> Tensor:
    work, tape, config = run.work, run.tape, run.config
    hidden = _hidden_states(run, model)
    run.masks, run.tables = {}, {}
    tape.enter("loss")
    with counting_as(tape, LOGITS):
        count = run.rows * work.loss_columns * config["hidden_size"]
        if config["model_type"] in ENCODERS:
            return encoder_logits(run, model.outside, hidden, count, kept)
        chosen = gather_rows(tape, hidden, count, kept)
        tape.enter_module("head")
        logits = project(tape, tape.mark_backward(chosen, "head", ends=True), _head_of(model), config["hidden_size"])
        logits = tape.mark_backward(logits, "head")
        tape.leave_module("head")
        if config["model_type"] == "granite":
            return scale(tape, logits)
        if config.get("final_logit_softcapping") is not None:
            logits = scale(tape, logits)
            logits = pointwise_of_result(tape, logits)
            logits = scale(tape, logits)
        return logits


__all__ = ["CHECKPOINTS", "run_step"]
