"""What the model is: geometry and parameter inventory, from config.json or a GGUF header. No weights, no torch."""

from __future__ import annotations

import fnmatch
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from launcher.errors import ModelError
from launcher.plan.known import find_known
from launcher.plan.source import ModelSource

LLAMA_NAMED = frozenset({"llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "granite",
                         "stablelm", "cohere"})  # fmt: skip
"""Model types whose layers bear the names that `ModelShape.linears` gives (transformers 5.23, models/*/modeling_*.py)."""
TIED_UNLESS_TOLD = frozenset({"gpt2", "opt", "bloom", "falcon", "mpt", "gemma", "gemma2", "gemma3_text", "smollm3", "starcoder2", "cohere"})
"""Model types whose head is the embedding where config.json leaves tie_word_embeddings out (models/*/configuration_*.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Geometry of a decoder: widths in elements, `linears` the (in, out) of one layer's linear layers."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    gated_mlp: bool
    has_chat_template: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlp = {"mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
        if self.gated_mlp:
            mlp["mlp.gate_proj"] = (hidden, inner)
        return {
            "self_attn.q_proj": (hidden, query),
            "self_attn.k_proj": (hidden, key_value),
            "self_attn.v_proj": (hidden, key_value),
            "self_attn.o_proj": (query, hidden),
            **mlp,
        }

    @property
    def layer_linear_params(self) -> int:
        return sum(fan_in * fan_out for fan_in, fan_out in self.linears.values())

    @property
    def layer_params(self) -> int:
        return self.layer_linear_params + 2 * self.hidden_size

    @property
    def embedding_params(self) -> int:
        """Input embedding, and the output head where it is not the same weight."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def num_params(self) -> int:
        return self.embedding_params + self.num_layers * self.layer_params + self.hidden_size

    def lora_params(self, r: int, target_modules: str | tuple[str, ...]) -> int:
        """r · (in + out) for each linear layer that gets an adapter."""
        chosen = [
            shape for name, shape in self.linears.items()
            if target_modules == "all-linear" or any(name.endswith(target) for target in target_modules)
        ]  # fmt: skip
        return self.num_layers * sum(r * (fan_in + fan_out) for fan_in, fan_out in chosen)

    def frozen_but(self, last_layers: int, patterns: tuple[str, ...]) -> int:
        """Parameters that `freeze` leaves trainable."""
        return sum(size for name, size in self._inventory() if is_trained(name, self.num_layers, last_layers, patterns))

    def _inventory(self) -> list[tuple[str, int]]:
        hidden = self.hidden_size
        names = [("model.embed_tokens.weight", self.vocab_size * hidden), ("model.norm.weight", hidden)]
        if not self.tied_embeddings:
            names.append(("lm_head.weight", self.vocab_size * hidden))
        for index in range(self.num_layers):
            names += [(f"model.layers.{index}.{n}.weight", i * o) for n, (i, o) in self.linears.items()]
            names += [(f"model.layers.{index}.{n}.weight", hidden) for n in ("input_layernorm", "post_attention_layernorm")]
        return names


def is_trained(name: str, num_layers: int, last_layers: int, patterns: tuple[str, ...]) -> bool:
    """Whether method `freeze` trains the parameter of this name."""
    parts = name.split(".")
    layer = next(
        (
            int(part)
            for before, part in zip(parts, parts[1:], strict=False)
            if before in ("layers", "h", "layer", "block") and part.isdigit()
        ),
        None,
    )
    in_last = layer is not None and layer >= num_layers - last_layers
    return in_last or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def load_shape(source: ModelSource, revision: str | None) -> ModelShape:
    """The shape of a located model. A hub id is asked for its config.json only. Raises ModelError."""
    if source.kind == "gguf":
        return _shape_of_gguf(Path(source.path))
    if source.kind == "hub" and revision is None and (known := find_known(source.path)) is not None:
        shape = _shape_of_config(known.config.get("text_config") or known.config, Path(f"the shipped config.json of {known.name}"))
        return replace(shape, has_chat_template=known.has_chat_template)
    path = Path(source.path) / "config.json" if source.kind == "folder" else _fetch_hub_config(source.path, revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "it should be the config.json of a transformers model") from None
    text_config = config.get("text_config") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(text_config or {}, dict):
        raise ModelError(f"{path} is not a JSON object", "it should be the config.json of a transformers model")
    return _shape_of_config(text_config or config, path)


def _fetch_hub_config(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.name_or_path: {name} is neither a folder here nor reachable on the hub ({reason})",
                         "check the name, the network, and HF_TOKEN for a gated model; or name a local folder") from None  # fmt: skip


def _shape_of_config(config: dict[str, Any], path: Path) -> ModelShape:
    def need(*names: str, otherwise: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if value is not None and not (type(value) is int and value > 0):
                raise ModelError(f"{path}: {name} is {value!r}, and not a whole number above 0", "this launcher does not know such a model")
            if value is not None:
                return int(value)
        if otherwise is None:
            raise ModelError(f"{path} has no {' or '.join(names)}", "the file is not the configuration of a causal language model")
        return otherwise

    hidden, heads = need("hidden_size", "n_embd", "d_model"), need("num_attention_heads", "n_head", "num_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"{path}: {heads} attention heads do not divide hidden_size {hidden}", "the file is damaged or not of this model")
    template_files = ("chat_template.jinja", "chat_template.json")
    folder = path.parent
    tokenizer = folder / "tokenizer_config.json"
    has_template = any((folder / name).is_file() for name in template_files) or (
        tokenizer.is_file() and '"chat_template"' in tokenizer.read_text(encoding="utf-8")
    )
    return ModelShape(
        model_type=str(config.get("model_type", "unknown")),
        hidden_size=hidden,
        intermediate_size=need("intermediate_size", "n_inner", "ffn_dim", otherwise=4 * hidden),
        num_layers=need("num_hidden_layers", "n_layer", "num_layers"),
        num_heads=heads,
        num_kv_heads=need("num_key_value_heads", otherwise=heads),
        head_dim=need("head_dim", otherwise=hidden // heads),
        vocab_size=need("vocab_size"),
        max_positions=need("max_position_embeddings", "n_positions"),
        tied_embeddings=bool(config.get("tie_word_embeddings", config.get("model_type") in TIED_UNLESS_TOLD)),
        gated_mlp=config.get("model_type") not in ("gpt2", "opt", "gpt_neox"),
        has_chat_template=has_template,
    )


def _shape_of_gguf(path: Path) -> ModelShape:
    header = read_gguf_header(path)
    arch = header.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelError(f"{path}: the GGUF header has no general.architecture", "the file is damaged or not a language model")

    def need(name: str, otherwise: Any = None) -> int:
        value = header.get(f"{arch}.{name}", otherwise)
        if type(value) is not int or value < 1:
            raise ModelError(f"{path}: the GGUF header has no {arch}.{name}", "the file is damaged or not a language model")
        return value

    hidden, heads = need("embedding_length"), need("attention.head_count")
    return ModelShape(
        model_type=str(arch),
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        num_layers=need("block_count"),
        num_heads=heads,
        num_kv_heads=need("attention.head_count_kv", heads),
        head_dim=need("attention.key_length", hidden // heads),
        vocab_size=need("vocab_size", header.get("tokenizer.ggml.tokens")),
        max_positions=need("context_length"),
        tied_embeddings="output.weight" not in header["tensor_names"],
        gated_mlp=True,
        has_chat_template="tokenizer.chat_template" in header,
    )


_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def read_gguf_header(path: Path) -> dict[str, Any]:
    """Keys and values of a GGUF file (spec: ggml docs/gguf.md, versions 2 and 3) plus "tensor_names".

    An array is given by its length: what is needed of one is how many tokens it lists.
    """
    try:
        with path.open("rb") as file:
            magic, version = struct.unpack("<4sI", file.read(8))
            if magic != b"GGUF" or version not in (2, 3):
                raise ModelError(f"{path} is not a GGUF file of version 2 or 3", "download it again")
            tensors, pairs = struct.unpack("<QQ", file.read(16))
            header: dict[str, Any] = {}
            for _ in range(pairs):
                key = _read_gguf_string(file)
                header[key] = _read_gguf_value(file, *struct.unpack("<I", file.read(4)))
            header["tensor_names"] = frozenset(_read_gguf_tensor_name(file) for _ in range(tensors))
            return header
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except (struct.error, KeyError, UnicodeDecodeError, OverflowError, MemoryError):
        raise ModelError(f"{path}: the GGUF header ends early or is damaged", "download it again") from None


def _read_gguf_string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8")


def _read_gguf_value(file: BinaryIO, kind: int) -> Any:
    if kind == _GGUF_STRING:
        return _read_gguf_string(file)
    if kind != _GGUF_ARRAY:
        code = _GGUF_SCALARS[kind]
        return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]
    item_kind, length = struct.unpack("<IQ", file.read(12))
    if item_kind == _GGUF_STRING:
        for _ in range(length):
            file.seek(struct.unpack("<Q", file.read(8))[0], 1)
    else:
        file.seek(length * struct.calcsize(f"<{_GGUF_SCALARS[item_kind]}"), 1)
    return length


def _read_gguf_tensor_name(file: BinaryIO) -> str:
    name = _read_gguf_string(file)
    (dims,) = struct.unpack("<I", file.read(4))
    file.seek(8 * dims + 4 + 8, 1)
    return name
