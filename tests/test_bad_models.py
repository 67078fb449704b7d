"""What a dry run says of input that cannot be planned: a config.json that does not add up, devices, budgets, lengths and batches."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import ModelError
from launcher.plan.shape import shape_of_config

LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4,
                         "vocab_size": 160, "max_position_embeddings": 64}  # fmt: skip

MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("missing", [key for key in LLAMA if key not in ("num_hidden_layers", "max_position_embeddings")])
def test_a_config_without_a_field_names_the_field(missing: str) -> None:
    with pytest.raises(ModelError, match=f"x.json has no {missing}"):
        shape_of_config({key: value for key, value in LLAMA.items() if key != missing}, Path("x.json"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"hidden_size": 65}, "4 attention heads do not divide hidden_size 65"), ({"num_key_value_heads": 3}, "3 key-value heads do not divide 4 attention heads"),
     ({"hidden_size": -64}, "hidden_size is -64, and not a whole number above 0"), ({"hidden_size": "64"}, "hidden_size is '64'"),
     ({"layer_types": ["full_attention"]}, "layer_types lists 1 layers, and there are 4"), ({"model_type": None}, "has no model_type"),
     ({"model_type": "qwen3_moe"}, "has no n_routed_experts or num_experts or num_local_experts, which a qwen3_moe needs"),
     ({"model_type": "qwen3_moe", "num_experts": 4}, "has no num_experts_per_tok, which a qwen3_moe needs"),
     ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}, "has no moe_intermediate_size, which a qwen3_moe needs"),
     ({"model_type": "t5", "d_model": 64, "num_layers": 2, "num_heads": 4}, "has no d_ff, which a t5 needs"),
     ({"vocab_size": True}, "vocab_size is True"), ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
     (MOE | {"num_experts_per_tok": "2"}, "num_experts_per_tok is '2', and not a whole number"),
     (MOE | {"moe_intermediate_size": -5}, "moe_intermediate_size is -5, and not a whole number"),
     (MOE | {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, and there are 4 experts"),
     ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern is 0"), ({"num_hidden_layers": 10_000_000}, "no model has more than 10000")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_numbers_that_do_not_go_together(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        shape_of_config(LLAMA | changes, Path("x.json"))
    assert problem in str(caught.value) and caught.value.remedy


def dry_run(tmp_path: Path, *arguments: str) -> Result:
    """Of a tiny Llama, on an H100 where the arguments name no GPU."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "t.jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "r.yaml").write_text(
        f"name: p\nmodel: {{name_or_path: {tmp_path}}}\ndata: {{train: t.jsonl, seq_len: 64}}\nbatch: {{global_batch_size: 2}}\n"
    )
    gpu = [] if "--gpu" in arguments else ["--gpu", "h100-80gb"]
    return CliRunner().invoke(app, [str(tmp_path / "r.yaml"), "--dry-run", *gpu, *arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--gpu", "h10-80gb"], "no such device in the catalogue"), (["--gpu", "h10-80gb"], "did you mean h100-80gb"),
     (["--budget", "24"], "'24' is not a size"), (["memory.budget=24"], "24 should be a size with its unit, such as 24GiB"),
     (["--budget", "0GiB"], "should be a size above 0"), (["--sweep", "seq_len=8,16", "seq_len=32"], "data.seq_len: is there twice"),
     (["--sweep", "seq_len=8,16", "--html", "x.html"], "are of one plan"), (["--sweep", "seq_len=a,b"], "'a' should be a valid integer"),
     (["--nodes", "0"], "--nodes 0: a number of machines"), (["batch.micro_batch_size=2", "batch.global_batch_size=5"], "2 does not divide"),
     (["--html", "/nonexistent/x.html"], "cannot be written"), (["parallel.nvme_path=/x"], "needs ZeRO stage 3"),
     (["data.seq_len=65"], "65 is longer than the model's 64 positions"),
     (["--gpus-per-node", "8"], "2 is not divisible by 8 ranks: each takes a row at least"),
     (["--gpus-per-node", "8"], "use 8, or another number of workers")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_the_command_line_says_what_is_wrong(tmp_path: Path, arguments: list[str], expected: str) -> None:
    outcome = dry_run(tmp_path, *arguments)
    said = re.sub(r"[│\s]+", " ", f"{outcome.exception}{outcome.output}")
    assert outcome.exit_code != 0 and expected in said


def test_a_folder_with_nothing_but_a_config_can_be_planned_and_not_run(tmp_path: Path) -> None:
    """Chat data too: whether its tokenizer has a template is not known."""
    dry_run(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "t.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    outcome = CliRunner().invoke(app, [str(tmp_path / "r.yaml"), "--dry-run", "--gpu", "h100", "--json"])
    assert outcome.exit_code == 0 and any("planned and not run" in note for note in json.loads(outcome.stdout)["notes"])
    refused = CliRunner().invoke(app, [str(tmp_path / "r.yaml"), "--accelerator", "cpu"])
    said = re.sub(r"[│\s]+", " ", f"{refused.exception}{refused.output}")
    assert refused.exit_code == ModelError.exit_code and "has no weights" in said and not (tmp_path / "runs").exists()


def test_a_budget_above_what_the_device_has_is_the_devices(tmp_path: Path) -> None:
    outcome = dry_run(tmp_path, "--budget", "100TiB", "--json")
    document = json.loads(outcome.stdout)
    assert document["budget_bytes"] < 80 << 30 and any("100TiB is more than a NVIDIA H100" in note for note in document["notes"])


def test_an_absurd_batch_is_answered_at_once(tmp_path: Path) -> None:
    outcome = dry_run(tmp_path, "batch.global_batch_size=1000000000", "batch.micro_batch_size=1000000000")
    assert outcome.exit_code == 3 and "DOES NOT FIT" in outcome.output
