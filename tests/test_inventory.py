"""The parameters that the plan counts are the parameters that transformers makes: name by name, shape by shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import DECODERS, build_decoder, build_others, config_of

from launcher.plan.inventory_others import make_inventory
from launcher.plan.shape import shape_of_config


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def counted(config: Any, kind: str) -> dict[str, tuple[int, ...]]:
    facts = json.loads(json.dumps(config.to_dict() | {"architectures": [kind]}))
    inventory = make_inventory(facts)
    assert inventory is not None
    return {name: weight.shape for block in inventory for name, weight in block.names()}


@pytest.mark.parametrize("kind", DECODERS)
def test_every_parameter_of_a_decoder(kind: str) -> None:
    model = build_decoder(config_of(kind))
    assert counted(model.config, type(model).__name__) == shapes_of(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(kind: str, tied: bool) -> None:
    model = build_decoder(config_of(kind, tie_word_embeddings=tied, num_hidden_layers=1))
    assert counted(model.config, type(model).__name__) == shapes_of(model)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("deepseek_v3", {"q_lora_rank": None}), ("deepseek_v2", {"first_k_dense_replace": 0}),
     ("qwen3_moe", {"mlp_only_layers": [0]}), ("qwen2_moe", {"decoder_sparse_step": 2}), ("llama4_text", {"interleave_moe_layer_step": 2}),
     ("gpt2", {"n_inner": 72}), ("qwen3", {"head_dim": 32}), ("starcoder2", {"use_bias": False}), ("stablelm", {"use_qkv_bias": True})],
    ids=str,
)  # fmt: skip
def test_what_a_configuration_turns_on(kind: str, changes: dict[str, Any]) -> None:
    model = build_decoder(config_of(kind, **changes))
    assert counted(model.config, type(model).__name__) == shapes_of(model)


def test_every_parameter_of_encoders_and_models_that_see() -> None:
    for model in build_others():
        assert counted(model.config, type(model).__name__) == shapes_of(model), type(model).__name__


LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (LLAMA_8B, 8_030_261_248),
        (LLAMA_8B | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}, 405_853_388_800),
        ({"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
          "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
          "num_experts_per_tok": 8, "max_position_embeddings": 40960}, 30_532_122_624),
        ({"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024}, 124_439_808),
    ],
)  # fmt: skip
def test_published_counts(config: dict[str, Any], params: int) -> None:
    assert shape_of_config(config, Path("config.json")).num_params == params


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "v_proj"), ("down_proj", "lm_head"), ("embed_tokens", "o_proj"), ("gate",)], ids=str
)
@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text", "gpt2"]
)
def test_adapters_are_counted_as_peft_makes_them(kind: str, targets: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = build_decoder(config_of(kind))
    shape = shape_of_config(json.loads(json.dumps(model.config.to_dict())), Path("config.json"))
    wanted = list(targets) if isinstance(targets, tuple) else targets
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=wanted))
    except ValueError:
        assert shape.lora_params(4, targets) == 0, "peft finds no such layer"
        return
    assert shape.lora_params(4, targets) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
