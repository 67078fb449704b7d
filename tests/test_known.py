"""The shipped geometry of well-known models: their parameters counted by our arithmetic, by transformers, and as published."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.plan.known import MODELS, load_known
from launcher.plan.shape import load_shape
from launcher.plan.source import locate_model

ENTRIES: list[dict[str, Any]] = json.loads(MODELS.read_text(encoding="utf-8"))["models"]
PUBLISHED = {
    "llama-2-7b": 6.74e9, "llama-2-13b": 13.0e9, "llama-2-70b": 69.0e9, "llama-3-8b": 8.03e9, "llama-3-70b": 70.6e9, "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9, "llama-3.1-405b": 405.8e9, "llama-3.2-1b": 1.24e9, "llama-3.2-3b": 3.21e9, "llama-4-scout": 109e9 - 0.9e9,
    "llama-4-maverick": 402e9, "qwen2-0.5b": 0.494e9, "qwen2-1.5b": 1.54e9, "qwen2.5-3b": 3.09e9, "qwen2-7b": 7.62e9, "qwen2.5-14b": 14.8e9,
    "qwen2.5-32b": 32.8e9, "qwen2.5-72b": 72.7e9, "qwen2-57b-a14b": 57.4e9, "qwen1.5-moe-a2.7b": 14.3e9, "qwen3-8b": 8.19e9, "qwen3-14b": 14.8e9,
    "qwen3-32b": 32.8e9, "qwen3-30b-a3b": 30.5e9, "qwen3-235b-a22b": 235e9, "mistral-7b-v0.1": 7.24e9, "mistral-7b-v0.3": 7.25e9,
    "mistral-nemo-12b": 12.2e9, "mistral-small-24b": 23.6e9, "mixtral-8x7b": 46.7e9, "mixtral-8x22b": 141e9, "gemma-2-2b": 2.61e9,
    "gemma-2-9b": 9.24e9, "gemma-2-27b": 27.2e9, "gemma-3-270m": 0.268e9, "gemma-3-1b": 1.00e9, "gemma-3-4b": 4.30e9, "gemma-3-12b": 12.2e9,
    "gemma-3-27b": 27.4e9, "phi-3-mini-4k": 3.82e9, "phi-3-medium-4k": 14.0e9, "phi-4": 14.7e9, "phi-4-mini": 3.84e9, "deepseek-v2-lite": 15.7e9,
    "deepseek-v2": 236e9, "deepseek-v3": 671e9, "deepseek-r1-distill-qwen-1.5b": 1.78e9, "gpt-oss-20b": 20.9e9, "gpt-oss-120b": 116.8e9,
    "smollm2-135m": 134.5e6, "smollm2-360m": 362e6, "smollm2-1.7b": 1.71e9, "smollm3-3b": 3.08e9, "tinyllama-1.1b": 1.10e9, "gpt2": 124e6,
    "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1.56e9, "bert-base-uncased": 109.5e6, "bert-large-uncased": 335e6, "roberta-base": 124.6e6,
    "roberta-large": 355e6, "minilm-l6": 22.7e6, "t5-small": 60.5e6, "t5-base": 223e6, "t5-large": 738e6, "t5-3b": 2.85e9, "t5-11b": 11.3e9,
    "flan-t5-small": 77.0e6, "flan-t5-base": 248e6, "flan-t5-large": 783e6, "flan-t5-xl": 2.85e9, "flan-t5-xxl": 11.1e9, "whisper-tiny": 37.8e6,
    "whisper-base": 72.6e6, "whisper-small": 242e6, "whisper-medium": 764e6, "whisper-large-v3": 1.54e9, "whisper-large-v3-turbo": 809e6,
    "vit-base-patch16-224": 86.6e6, "vit-large-patch16-224": 304e6, "clip-vit-base-patch32": 151e6, "clip-vit-large-patch14": 428e6,
    "qwen2-vl-2b": 2.21e9, "qwen2-vl-7b": 8.29e9, "qwen2.5-vl-3b": 3.75e9, "qwen2.5-vl-7b": 8.29e9, "qwen2.5-vl-72b": 73.4e9,
}  # fmt: skip
"""As model cards, papers and the hub's size field give them: three digits, or four where they do. Llama 4 without the part that sees."""
UNTIED = frozenset(entry["name"] for entry in ENTRIES if entry["name"].startswith("flan-t5"))
"""T5 1.1 has a head of its own in its files and its published count; transformers 5.23 ties it to the embedding all the same
(models/t5/configuration_t5.py), and the count that is shipped is the published one."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shipped_count_is_the_published_one(name: str) -> None:
    (entry,) = [entry for entry in ENTRIES if entry["name"] == name]
    assert entry["params"] == pytest.approx(PUBLISHED[name], rel=5e-3)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_the_plan_counts_what_is_shipped_without_a_network(entry: dict[str, Any]) -> None:
    ids = entry["chat"] + entry["base"]
    shapes = [load_shape(locate_model(hub_id, "/nowhere"), None) for hub_id in ids]
    assert [shape.has_chat_template for shape in shapes] == [True] * len(entry["chat"]) + [False] * len(entry["base"])
    assert all(shape.is_known for shape in shapes)
    assert {shape.num_params for shape in shapes} == {entry["params"]}


def test_no_hub_id_stands_twice() -> None:
    ids = [hub_id.lower() for entry in ENTRIES for hub_id in entry["chat"] + entry["base"]]
    assert len(ids) == len(set(ids)) == len(load_known())


CLASSES = {"causal": "AutoModelForCausalLM", "image-text": "AutoModelForImageTextToText", "encoder": "AutoModel", "masked-lm": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM",
           "speech": "AutoModelForSpeechSeq2Seq", "image-classifier": "AutoModelForImageClassification", "clip": "AutoModel"}  # fmt: skip


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e["name"] not in UNTIED], ids=lambda entry: entry["name"])
def test_transformers_builds_that_many(entry: dict[str, Any]) -> None:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**{key: value for key, value in entry["config"].items() if key != "dtype"})
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[entry["counted_as"]]).from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["params"]
