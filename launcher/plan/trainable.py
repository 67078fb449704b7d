"""What the launcher can train of the models it can plan: causal language models and encoder-decoders, as AutoModelForCausalLM and
AutoModelForSeq2SeqLM build them (train/model.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

from launcher.cluster import Cluster
from launcher.errors import Fault, RecipeError
from launcher.plan.classic import ENCODERS
from launcher.plan.inventory_others import head_of
from launcher.plan.layout import Layout
from launcher.plan.shape import ModelShape, adapter_rank
from launcher.plan.step import BLIND_TO_PACKS
from launcher.recipe import Lora, QLora, Recipe

OTHERS = {"whisper": "a model of speech", "vit": "a model of images", "clip": "a model of images and texts",
          "qwen2_vl": "a model of images and texts", "qwen2_5_vl": "a model of images and texts",
          "qwen2_vl_text": "a model of images and texts", "qwen2_5_vl_text": "a model of images and texts"}  # fmt: skip
"""Model types that neither class of transformers 5.23 builds, or builds only in part."""

HEADS = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM"}


def find_obstacle(shape: ModelShape, recipe: Recipe) -> str | None:
    """Why a run would not start with this model, or None."""
    kind = str(shape.config.get("model_type"))
    if kind in OTHERS:
        return f"a {kind} is {OTHERS[kind]}, and the launcher trains causal language models"
    if kind in ENCODERS and not _has_language_head(shape):
        named = (shape.config.get("architectures") or ["no architectures"])[0]
        return f"this {kind} has no head for words (config.json says {named}), and the launcher trains causal language models"
    method, quantised = recipe.method, shape.config.get("quant_method")
    if method.kind == "qlora" and quantised not in (None, "bitsandbytes"):
        return (
            f"its files are quantised already ({quantised}), and transformers refuses to do it again with bitsandbytes; method lora works"
        )
    if method.kind == "qlora" and method.bits == 8 and method.dora:
        return "method.dora: peft 0.21 takes an 8-bit layer's scales away when it norms its weight; use bits 4"
    if method.kind in ("lora", "qlora") and (method.dropout or method.dora) and _adapts_fused_experts(shape, method):
        which = "dropout" if method.dropout else "dora"
        return f"method.{which}: peft 0.21 lays adapters on fused experts without it; leave it out, or name the attention's layers in target_modules"
    if kind.startswith("llama4") and method.kind in ("lora", "qlora") and method.target_modules == "all-linear":
        return "method.target_modules: all-linear reaches Llama 4's router, which peft 0.21 cannot wrap; name the attention's layers"
    return None


def check_pairs(recipe: Recipe, shape: ModelShape) -> None:
    """Raises RecipeError where the data is not of the kind that the model learns from: pairs for an encoder-decoder, for others none."""
    data, kind = recipe.data, shape.model_type
    faults: list[Fault] = []
    if not shape.is_pair:
        if data.target_len is not None:
            why = f"a {kind} reads prompt and answer in one sequence, and only an encoder-decoder has targets of their own"
            faults = [Fault("plan", "data.target_len", why, "leave it out; data.seq_len is for both together")]
    elif data.packing is True:
        faults = [Fault("plan", "data.packing", f"a {kind} reads a source and writes a target, and packs of pairs would see each other",
                        "set data.packing to auto or false")]  # fmt: skip
    elif data.loss_on == "all":
        faults = [Fault("plan", "data.loss_on", f"a {kind}'s source carries no loss, its target all of it", "leave data.loss_on out")]
    elif any(source.format == "text" for source in (*data.train, *data.eval)):
        faults = [Fault("plan", "data.train", f"a {kind} learns to write a target for a source, and format text has but one text",
                        "use prompt_completion, alpaca or messages")]  # fmt: skip
    if faults:
        raise RecipeError(faults)


def _adapts_fused_experts(shape: ModelShape, method: Lora | QLora) -> bool:
    """Experts that are one parameter of three dimensions, which peft wraps as a parameter and no layer (lora/layer.py, ParamWrapper)."""
    return any(
        len(weight.shape) == 3 and adapter_rank(shape.model_type, block.prefix, weight, method.r, method.target_modules)
        for block in shape.inventory
        for weight in block.weights
    )


def list_oddities(shape: ModelShape, recipe: Recipe, layout: Layout) -> Iterator[str]:
    """What a run of this model does that its user may not expect, a note each."""
    kind = shape.model_type
    if kind in REFUSED:
        yield f"attention: {layout.attn_implementation}, because transformers 5.23 refuses {' and '.join(sorted(REFUSED[kind]))} for a {kind}"
    if (obstacle := find_obstacle(shape, recipe)) is not None:
        yield f"a run would not start: {obstacle}"
    elif shape.is_pair:
        yield from _list_pair_oddities(shape, recipe, layout)
    elif kind in ENCODERS and not shape.config.get("is_decoder"):
        yield (
            f"this {kind} looks in both directions: as a causal language model it sees the words it is to predict;"
            " is_decoder in config.json makes it look back only"
        )
    if (quantised := shape.config.get("quant_method")) and recipe.method.kind != "qlora":
        yield f"weights: the files are {quantised}; counted in {layout.dtype}, which transformers turns them to where it lacks the kernels to keep them"


def _list_pair_oddities(shape: ModelShape, recipe: Recipe, layout: Layout) -> Iterator[str]:
    kind, data, trained = shape.model_type, recipe.data, shape.config.get("n_positions")
    if data.target_len is None:
        yield f"targets: as long as sources, {data.seq_len} tokens, because data.target_len is not set"
    if isinstance(trained, int) and data.seq_len > trained:
        yield f"sources: this {kind} was trained with {trained} tokens; longer ones work (positions are relative), at a cost of their square"
    if layout.dtype == "fp16":
        yield f"fp16: a {kind}'s MLPs were trained in bf16 and may overflow; the clamps of transformers' code are not counted; fp32 is safe"


REFUSED = {
    "t5": frozenset({"flash_attention_2"}),
    "mt5": frozenset({"flash_attention_2"}),
    "gemma2": frozenset({"sdpa"}),
    "gpt_oss": frozenset({"sdpa", "flash_attention_2"}),
    "llama4_text": frozenset({"flash_attention_2"}),
}
"""Attention that transformers 5.23 will not load a model type with (_supports_sdpa, _supports_flash_attn; GPT-OSS' sinks need a kernel of
flash attention 3 from the hub). tests/test_trainable.py compares."""


def settle_attention(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> Recipe:
    """The recipe with a kernel that transformers has for the model, where it leaves the choice and the usual one is refused. Raises RecipeError."""
    refused, wanted = REFUSED.get(shape.model_type, frozenset()), recipe.model.attn_implementation
    if wanted != "auto" and wanted not in refused:
        return recipe
    flash = has_flash(recipe, cluster)
    chosen = next(name for name in ("flash_attention_2", "sdpa", "eager") if name not in refused and (flash or name != "flash_attention_2"))
    if wanted != "auto":
        why = f"transformers 5.23 refuses {wanted} for a {shape.model_type}"
        raise RecipeError([Fault("plan", "model.attn_implementation", why, f"use auto, which takes {chosen} here")])
    if not refused:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"attn_implementation": chosen})})


def settle_packing(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> tuple[Recipe, list[str]]:
    """The recipe with examples packed or not, and why where that is not the usual. Raises RecipeError where they would see each other."""
    wanted, kind = recipe.data.packing, shape.model_type
    leaks = kind in BLIND_TO_PACKS and not _takes_flash(recipe, shape, cluster)
    why = f"transformers 5.23 gives a {kind} no positions for its mask, so that examples in one sequence would see each other"
    if wanted is True and leaks:
        remedy = "set data.packing to auto or false" + (
            "" if "flash_attention_2" in REFUSED.get(kind, ()) else ", or use flash_attention_2"
        )
        raise RecipeError([Fault("plan", "data.packing", why, remedy)])
    if wanted != "auto":
        return recipe, []
    if shape.is_pair:
        leaks, why = True, f"a {kind} reads a source and writes a target, each in a row of its own"
    settled = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": not leaks})})
    return settled, [f"packing: off, because {why}"] if leaks else []


def settle_dtype(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> tuple[Recipe, list[str]]:
    """The recipe in fp32 where the usual choice would be fp16 and the model is no good in it, and why."""
    if recipe.model.dtype != "auto" or not shape.is_pair or cluster.accelerator != "cuda" or cluster.bf16:
        return recipe, []
    settled = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "fp32"})})
    return settled, [
        f"dtype: fp32, because a {shape.model_type}'s MLPs may overflow in fp16 and a {cluster.device_name or 'GPU'} has no bf16"
    ]


def _takes_flash(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> bool:
    """Whether attention is flash attention 2's, once the plan has chosen it."""
    wanted, refused = recipe.model.attn_implementation, REFUSED.get(shape.model_type, frozenset())
    return wanted == "flash_attention_2" or (wanted == "auto" and "flash_attention_2" not in refused and has_flash(recipe, cluster))


def has_flash(recipe: Recipe, cluster: Cluster) -> bool:
    """Whether flash attention 2 can be had: its package, on a GPU, in 16 bits."""
    return cluster.accelerator == "cuda" and recipe.model.dtype != "fp32" and importlib.util.find_spec("flash_attn") is not None


def as_trained(shape: ModelShape) -> ModelShape:
    """The model that AutoModelForCausalLM makes of an encoder: with a head for words, whatever its files hold."""
    if shape.model_type not in ENCODERS or _has_language_head(shape):
        return shape
    return replace(shape, config=shape.config | {"architectures": [HEADS[shape.model_type]]})


def _has_language_head(shape: ModelShape) -> bool:
    return head_of(shape.config) in ("MaskedLM", "LMHead", "PreTraining", "CausalLM")
