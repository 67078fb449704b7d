"""The plan's questions answered by a trace (launcher.plan.memory.Tracer): what a micro-step holds, and which parameters a model has.

The model is built on the meta device as a run builds it, from its configuration alone. Two depths are enough: from the second on, peaks
are linear in layers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from launcher.plan.forward import layer_type
from launcher.plan.inventory_others import COUNTED, PAIRS
from launcher.plan.profile import StepProfile
from launcher.plan.shape import ModelShape, name_alike, read_text_part
from launcher.plan.workload import Workload
from launcher.train.encode import IGNORED
from launcher.train.head import put_loss_into_head
from launcher.train.loss import sum_kept_loss, sum_pair_loss
from launcher.train.trace import Trace, checkpoint_as_on, fused_loss, trace_step

DTYPES = {2: torch.bfloat16, 4: torch.float32}
LOST = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError)
"""What a model that cannot be built or traced on the meta device is known to raise."""


def profile(work: Workload, *, keep_gradients: bool) -> StepProfile | str:
    """The profile of a micro-step, or why it cannot be traced. A quantised base is traced dense."""
    few, more = find_depths(work.shape)
    try:
        with _quiet():
            traces = [trace_layers(work, depth, keep_gradients=keep_gradients) for depth in sorted({few, more})]
    except LOST as error:
        return _describe(work.shape, error)

    def extend(phase: str) -> dict[str, int]:
        first, last = traces[0].peaks[phase], traces[-1].peaks[phase]
        each = (last - first) / (more - few) if more > few else 0.0
        return {"activations": first + int(each * (work.shape.num_layers - few))}

    return StepProfile(forward=extend("forward"), loss=extend("forward"), backward=extend("backward"), is_traced=True)


def count(shape: ModelShape) -> ModelShape:
    """The shape of a model of an unknown architecture, with every parameter it has; the same shape where it cannot be built."""
    try:
        with _quiet():
            model = _build(shape, None)
    except LOST:
        return shape
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers: dict[tuple[str, tuple[Any, ...]], list[int]] = {}
    by_layer: dict[tuple[str, int], list[tuple[str, tuple[int, ...], str]]] = {}
    for name, parameter in model.named_parameters():
        found = re.match(r"(.*?\.)(\d+)(\..*)$", name)
        prefix, layer, inner = (found[1] + "{}.", int(found[2]), found[3][1:]) if found else ("", -1, name)
        by_layer.setdefault((prefix, layer), []).append((inner, tuple(parameter.shape), "linear" if name in linear else ""))
    for (prefix, layer), weights in by_layer.items():
        layers.setdefault((prefix, tuple(weights)), []).append(layer)
    blocks = [
        [prefix, [] if numbers == [-1] else numbers, [[name, list(shape), matrix] for name, shape, matrix in weights]]
        for (prefix, weights), numbers in layers.items()
    ]
    return replace(shape, config=shape.config | {COUNTED: blocks})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without libraries' advice on a model that is never run."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def find_depths(shape: ModelShape) -> tuple[int, int]:
    """The two depths whose difference is one period of the layers' pattern; the whole model's twice where it is not deeper."""
    config, total = name_alike(read_text_part(shape.config)), shape.num_layers
    if shape.is_pair and shape.total_layers != 2 * total:  # two stacks, of which one ends before the other
        deepest = max(total, shape.total_layers - total)
        return deepest, deepest
    signs: list[Any] = [
        (tuple(index for index, block in enumerate(shape.inventory) if layer in block.layers), _kind_of(config, layer))
        for layer in range(total)
    ]
    found = (total, total)
    for start in range(total):
        for period in range(1, 9):
            more = max(start, 2 - period) + 2 * period
            if more < found[1] and all(signs[i] == signs[i + period] for i in range(start, total - period)):
                found = (more - period, more)
    return found


def _kind_of(config: dict[str, Any], layer: int) -> Any:
    turns = config.get("no_rope_layers") or [(i + 1) % int(config.get("no_rope_layer_interval") or 1) for i in range(layer + 1)]
    listed = config.get("layer_types")
    return turns[layer], listed[layer] if listed and layer < len(listed) else layer_type({**config, "layer_types": None}, layer)


def _describe(shape: ModelShape, error: Exception) -> str:
    from transformers import CONFIG_MAPPING

    if shape.config.get("model_type") not in CONFIG_MAPPING:
        return f"this transformers has no model type {shape.config.get('model_type')!r}"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def trace_layers(work: Workload, layers: int, *, keep_gradients: bool, trains: bool = True) -> Trace:
    """A micro-step of the first `layers` layers of a workload's model, or an evaluation's forward pass where it does not `train`."""
    base = _build(work.shape, layers, work.attention).to(DTYPES[work.width]).train()
    if work.loss != "plain":
        put_loss_into_head(base, work.loss, fused_loss)
    trained = _lay_method(base, work).train(trains)
    if work.checkpointing != "off" and trains:
        checkpoint_as_on(base, work.device)
    kind = str(work.shape.config["model_type"])
    make_batch = _BATCHES.get(kind, _make_text)
    batch = make_batch(work, base.config)
    packed = work.packed and work.attention != "flash_attention_2"
    return trace_step(trained, _LOSSES.get(kind, _loss_of_words(work)), batch, device=work.device, packed=packed,
                      keep_gradients=keep_gradients, trains=trains)  # fmt: skip


_CLASSES = {"t5": "AutoModelForSeq2SeqLM", "mt5": "AutoModelForSeq2SeqLM", "whisper": "AutoModelForSpeechSeq2Seq", "vit": "AutoModelForImageClassification", "clip": "AutoModel",
            "qwen2_vl": "AutoModelForImageTextToText", "qwen2_5_vl": "AutoModelForImageTextToText"}  # fmt: skip
_DEPTH = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer")


def _build(shape: ModelShape, layers: int | None, attention: str = "sdpa") -> Any:
    """The model on the meta device, of so many layers (all unless told)."""
    import transformers

    facts = {name: value for name, value in shape.config.items() if name not in ("model_type", "num_labels", COUNTED)}
    kind = str(shape.config["model_type"])
    config = transformers.CONFIG_MAPPING[kind](**facts)
    if layers is not None:
        for part in (config, *(getattr(config, name) for name in ("text_config", "vision_config") if name in facts)):
            _cut(part, layers)
    config._attn_implementation = "sdpa" if attention == "flash_attention_2" else attention
    with torch.device("meta"):
        model = getattr(transformers, _CLASSES.get(kind, "AutoModelForCausalLM")).from_config(config)
    if kind in PAIRS and not shape.tied_embeddings:
        # As from_pretrained leaves it where the files hold a head of their own; a configuration alone always ties (configuration_t5.py).
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


def _cut(config: Any, layers: int) -> None:
    facts = config.to_dict()
    for name in _DEPTH:
        if isinstance(facts.get(name), int):
            setattr(config, name, min(facts[name], layers))
    if isinstance(facts.get("layer_types"), list):
        config.layer_types = config.layer_types[:layers]


# ------------------------------------------------------------------------------------------------- what a model is given

Batch = dict[str, torch.Tensor]


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.long, device="meta")


def _make_text(work: Workload, config: Any) -> Batch:
    return {name: _zeros(work.micro_batch_size, work.seq_len) for name in ("input_ids", "labels", "position_ids")}


def _make_pair(work: Workload, config: Any) -> Batch:
    """A source and a target, as launcher.train.data makes them: with a mask where a source may be padded."""
    rows = work.micro_batch_size
    batch = {"input_ids": _zeros(rows, work.seq_len)} | {name: _zeros(rows, work.target_len) for name in ("decoder_input_ids", "labels")}
    return batch | ({"attention_mask": _zeros(rows, work.seq_len)} if work.packed else {})


def _make_speech(work: Workload, config: Any) -> Batch:
    sound = torch.zeros(
        work.micro_batch_size, config.num_mel_bins, 2 * config.max_source_positions, dtype=DTYPES[work.width], device="meta"
    )
    return {"input_features": sound, "decoder_input_ids": _zeros(work.micro_batch_size, min(work.seq_len, config.max_target_positions))}


def _make_images(work: Workload, config: Any) -> Batch:
    sight = config.vision_config if config.model_type == "clip" else config
    size = sight.image_size
    return {"pixel_values": torch.zeros(work.micro_batch_size, sight.num_channels, size, size, dtype=DTYPES[work.width], device="meta")}


def _make_images_and_texts(work: Workload, config: Any) -> Batch:
    words = _zeros(work.micro_batch_size, min(work.seq_len, config.text_config.max_position_embeddings))
    return {**_make_images(work, config), "input_ids": words}


_BATCHES: dict[str, Callable[[Workload, Any], Batch]] = {
    "t5": _make_pair, "mt5": _make_pair, "whisper": _make_speech, "vit": _make_images, "clip": _make_images_and_texts,
}  # fmt: skip


def _loss_of_words(work: Workload) -> Callable[[Any, Batch], torch.Tensor]:
    columns = min(work.loss_columns, work.seq_len - 1)

    def loss_of(model: Any, batch: Batch) -> torch.Tensor:
        targets_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        return sum_kept_loss(model, batch, targets_BS, torch.zeros(columns, dtype=torch.long, device="meta"))

    return loss_of


def _loss_of_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Of every row of logits: words, or an image's class."""
    logits = model(**batch).logits
    logits = logits.flatten(0, -2)
    return F.cross_entropy(logits.float(), _zeros(logits.shape[0]), reduction="sum")


def _loss_of_pairs(model: Any, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch, return_loss=True).loss
    return loss


_LOSSES = {"t5": sum_pair_loss, "mt5": sum_pair_loss, "whisper": _loss_of_logits, "vit": _loss_of_logits, "clip": _loss_of_pairs}


def _lay_method(model: Any, work: Workload) -> Any:
    method = work.method
    if method.trains == "some":
        for name, parameter in model.named_parameters():
            decodes = work.shape.model_type in PAIRS and name.startswith("decoder.")
            depth = model.config.num_decoder_layers if decodes else model.config.num_hidden_layers
            parameter.requires_grad_(method.trains_base(name, depth))
    if not method.r:
        return model
    from peft import LoraConfig, get_peft_model

    targets = method.target_modules
    kind = work.shape.config["model_type"]
    task = "SEQ_2_SEQ_LM" if kind in PAIRS else None if kind in _CLASSES else "CAUSAL_LM"
    lora = LoraConfig(task_type=task, r=method.r, lora_dropout=method.dropout, use_dora=method.dora,
                      target_modules=targets if isinstance(targets, str) else list(targets))  # fmt: skip
    with torch.device("meta"):
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.to(DTYPES[work.width])
    return adapted.train()
