"""What the model is: geometry and parameter inventory, from config.json or a GGUF header. No weights, no torch."""

from __future__ import annotations

import fnmatch
import json
import re
import socket
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from launcher.errors import ModelError
from launcher.plan.gguf import read_gguf_header
from launcher.plan.inventory import HEAD_DIM, TIED_UNLESS_TOLD, Inventory, Weight
from launcher.plan.inventory_others import COUNTED, GEMMA3_TEXT, PAIRS, depth_of_decoder, is_gated, is_known, make_inventory
from launcher.plan.known import find_known
from launcher.plan.source import ModelSource

KNOWN_HEADS = ("lm_head", "proj_out", "classifier", "qa_outputs")
"""Output layers, which peft's all-linear and bitsandbytes leave alone; those of BERT's family have layers before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Geometry of a model, and the part of its config.json that its parameters and activations follow from.

    For an encoder or a model that sees, the numbers are those of the part that reads text.
    """

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
    has_chat_template: bool | None
    """None where there is a configuration and no tokenizer beside it."""
    config: dict[str, Any] = field(hash=False)

    @property
    def inventory(self) -> Inventory:
        """Every parameter; of an unknown architecture what was counted, or those of a Llama of the same sizes."""
        return _inventory_of(self)

    @property
    def is_known(self) -> bool:
        """Whether the launcher knows this architecture's parameters exactly."""
        return is_known(self.config)

    @property
    def is_counted(self) -> bool:
        """Whether a model of an unknown architecture was built once, and its parameters counted (launcher.train.trace)."""
        return COUNTED in self.config

    def known_config(self) -> dict[str, Any]:
        if self.is_counted:
            return {"model_type": COUNTED, COUNTED: self.config[COUNTED]}
        if self.is_known:
            return self.config
        return {"model_type": "llama", "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
                "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_kv_heads,
                "head_dim": self.head_dim, "vocab_size": self.vocab_size, "tie_word_embeddings": self.tied_embeddings}  # fmt: skip

    @property
    def is_pair(self) -> bool:
        """Whether it is an encoder-decoder that is trained on pairs of a source and a target."""
        return self.model_type in PAIRS

    @property
    def auto_class(self) -> str:
        """The class of transformers that builds what the launcher trains."""
        return "AutoModelForSeq2SeqLM" if self.is_pair else "AutoModelForCausalLM"

    def depth_of(self, name: str) -> int:
        """Layers of the stack that a parameter of this name is in."""
        return depth_of_decoder(self.config) if self.is_pair and name.startswith("decoder.") else self.num_layers

    @property
    def total_layers(self) -> int:
        """Of both stacks, where there are two."""
        return self.num_layers + (depth_of_decoder(self.config) if self.is_pair else 0)

    @property
    def layer_params(self) -> int:
        """Parameters of the largest layer."""
        return max((block.count for block in self.inventory if block.layers), default=0)

    @property
    def num_params(self) -> int:
        return sum(block.count * block.repeats for block in self.inventory)

    def lora_params(self, r: int, target_modules: str | tuple[str, ...], *, dora: bool = False) -> int:
        """Parameters of the adapters peft makes: rank · (in + out) for each matrix that gets one, and DoRA's magnitudes, one an output."""
        total = 0
        for block in self.inventory:
            for weight in block.weights:
                rank = adapter_rank(self.model_type, block.prefix, weight, r, target_modules)
                total += block.repeats * rank * sum(weight.shape[-2:]) * (weight.shape[0] if len(weight.shape) == 3 else 1) if rank else 0
                total += block.repeats * weight.fan[1] if rank and dora else 0
        if self.tied_embeddings and target_modules != "all-linear" and "lm_head" in target_modules:
            total += r * (self.vocab_size + self.hidden_size)  # the module is there, though its weight is the embedding's
        return total

    def frozen_but(self, last_layers: int, patterns: tuple[str, ...]) -> int:
        """Parameters that `freeze` leaves trainable."""
        return sum(
            weight.count
            for block in self.inventory
            for name, weight in block.names()
            if is_trained(name, self.depth_of(name), last_layers, patterns)
        )


@lru_cache(maxsize=64)
def _inventory_of(shape: ModelShape) -> Inventory:
    inventory = make_inventory(shape.known_config())
    assert inventory is not None, "asked of known architectures only"
    return inventory


def is_head(prefix: str, weight: Weight) -> bool:
    """Whether a weight is an output layer's."""
    name = prefix + weight.name
    if name.startswith("lm_head.") and name.count(".") > 1:
        return name.startswith("lm_head.decoder")
    return not prefix.count("{") and (name.split(".")[0] in KNOWN_HEADS or name.startswith("cls.predictions.decoder"))


_FUSED_NAMES = {
    "mixtral": {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj", "gate": "gate.weight"},
    **dict.fromkeys(("qwen3_moe", "deepseek_v2", "deepseek_v3"),
                    {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj", "gate": "gate.weight"}),
}  # fmt: skip
"""Where peft 0.21 turns a module's name into that of a fused parameter (utils/transformers_weight_conversion.py): such an adapter
is of all experts, and the whole stack of their weights is added to on each forward."""


def adapter_rank(kind: str, prefix: str, weight: Weight, r: int, target_modules: str | tuple[str, ...]) -> int:
    """The rank of the adapter peft lays on a weight of a model type, or 0. all-linear leaves the head out."""
    fused = _FUSED_NAMES.get(kind, {})
    every = target_modules == "all-linear"
    name = prefix.format(0) + weight.name
    parts = {part for old, part in fused.items() if every or any(t == old or t.endswith("." + old) for t in target_modules)}
    if fused and any(name.endswith("." + part) for part in parts):
        return 2 * r if name.endswith(".gate_up_proj") else r
    if len(weight.shape) != 2 or not name.endswith(".weight"):
        return 0
    module = name.removesuffix(".weight")
    if every:
        return r if weight.matrix and not is_head(prefix, weight) and module.rpartition(".")[2] not in fused else 0
    is_module = weight.matrix != "" or "embed" in weight.name or weight.name.startswith(("wte", "wpe"))
    wanted = [t for t in target_modules if t.rpartition(".")[2] not in fused]
    return r if is_module and any(module == t or module.endswith("." + t) for t in wanted) else 0


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
        return _checked(_shape_of_gguf(Path(source.path)), Path(source.path))
    if source.kind == "hub" and revision is None and (known := find_known(source.path)) is not None:
        shape = shape_of_config(known.config, Path(f"the shipped config.json of {known.name}"))
        return replace(shape, has_chat_template=known.has_chat_template)
    path = Path(source.path) / "config.json" if source.kind == "folder" else _fetch_hub_config(source.path, revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "it should be the config.json of a transformers model") from None
    text_config = config.get("text_config") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(text_config or {}, dict):
        raise ModelError(f"{path} is not a JSON object", "it should be the config.json of a transformers model")
    return shape_of_config(config, path)


def _fetch_hub_config(name: str, revision: str | None) -> Path:
    """Its config.json: the hub's, or the copy that an earlier run left in the cache. Raises ModelError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    online = _finds_hub()
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=not online))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (
            str(error).splitlines()[0] if online else "no network here: the hub's host name does not resolve; and it is not in the cache"
        )
        raise ModelError(f"model.name_or_path: {name} is neither a folder here nor reachable on the hub ({reason})",
                         "check the name, the network, and HF_TOKEN for a gated model; or name a local folder") from None  # fmt: skip


def _finds_hub() -> bool:
    """Whether the hub's host name resolves, which says in no time what huggingface_hub finds out in forty seconds of retries.
    Behind a proxy it need not resolve here."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None))
    except OSError:
        return False


def shape_of_config(whole: dict[str, Any], path: Path) -> ModelShape:
    """The shape that a config.json's values describe; `path` is where messages say they are from. Raises ModelError."""
    kept = keep_shape(whole)
    config = read_text_part(kept)

    def need(*names: str, otherwise: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if value is not None and not (type(value) is int and value > 0):
                raise ModelError(f"{path}: {name} is {value!r}, and not a whole number above 0", "this launcher does not know such a model")
            if value is not None:
                return int(value)
        if otherwise is None:
            raise ModelError(f"{path} has no {' or '.join(names)}", "the file is not the configuration of a language model")
        return otherwise

    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} has no model_type", "the file is not the config.json of a transformers model, or of a very old one")
    kind = str(config["model_type"])
    hidden, heads = need("hidden_size", "n_embd", "d_model"), need("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads")
    width = config.get("head_dim") or config.get("d_kv") or HEAD_DIM.get(kind) or config.get("v_head_dim")
    if width is None and hidden % heads:
        raise ModelError(f"{path}: {heads} attention heads do not divide hidden_size {hidden}", "the file is damaged or not of this model")
    sees = kind in ("vit", "clip")
    shape = ModelShape(
        model_type=kind,
        hidden_size=hidden,
        intermediate_size=need("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", otherwise=4 * hidden),
        num_layers=need("num_hidden_layers", "n_layer", "num_layers", "decoder_layers"),
        num_heads=heads,
        num_kv_heads=need("num_key_value_heads", otherwise=heads),
        head_dim=need("head_dim", "d_kv", otherwise=width or hidden // heads),
        vocab_size=need("vocab_size", otherwise=1 if sees else None),
        max_positions=need("max_position_embeddings", "n_positions", "max_target_positions", otherwise=1 if sees else None)
        if kind not in PAIRS
        else UNBOUNDED,
        tied_embeddings=bool(config.get("tie_word_embeddings", kind in TIED_UNLESS_TOLD)),
        gated_mlp=is_gated(config)
        if kind in PAIRS
        else kind not in ("gpt2", "opt", "gpt_neox", "phi", "starcoder2", "bert", "roberta", "whisper", "vit", "clip"),
        has_chat_template=_has_chat_template(path.parent),
        config=kept,
    )
    return _checked(shape, path)


EXPERTS = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "llama4_text"})


_COUNTS = re.compile(r"(num|n)_.*|.*_(size|dim|rank|heads|layers|experts|tok|step|mlp)|sliding_window(_pattern)?")
"""Keys whose values are whole numbers, not below 0, in every architecture that the launcher knows; some may be null, or lists."""
_PERIODS = ("sliding_window_pattern", "decoder_sparse_step", "interleave_moe_layer_step")
"""Of these, what layers are counted by."""
UNBOUNDED = 1 << 30
"""Positions of a model that counts them from each other, as T5 does: its n_positions is what it was trained with."""
MOST_LAYERS = 10_000
"""The deepest that was published has 1,000 (DeepNet); an absurd number would take a dry run minutes to count."""


def _checked(shape: ModelShape, path: Path) -> ModelShape:
    """The same shape. Raises ModelError where its numbers do not go together, or the parameters of its architecture do not follow from them."""
    config = read_text_part(shape.config)
    if shape.num_layers > MOST_LAYERS:
        raise ModelError(f"{path}: {shape.num_layers} layers, and no model has more than {MOST_LAYERS}", "the file is damaged")
    if shape.num_heads % shape.num_kv_heads:
        raise ModelError(f"{path}: {shape.num_kv_heads} key-value heads do not divide {shape.num_heads} attention heads",
                         "the file is damaged or not of this model")  # fmt: skip
    listed = config.get("layer_types")
    if isinstance(listed, list) and len(listed) < shape.num_layers:
        raise ModelError(
            f"{path}: layer_types lists {len(listed)} layers, and there are {shape.num_layers}", "the file is damaged or not of this model"
        )
    if not shape.is_known:
        return shape
    for key, value in config.items():
        whole = type(value) is int and value >= (1 if key in _PERIODS else 0)
        if _COUNTS.fullmatch(key) and not (whole or value is None or isinstance(value, list)):
            raise ModelError(f"{path}: {key} is {value!r}, and not a whole number", "the file is damaged or not of this model")
    if not isinstance(config.get("tie_word_embeddings"), bool | None):
        raise ModelError(f"{path}: tie_word_embeddings is {config['tie_word_embeddings']!r}, and not true or false", "the file is damaged")
    wanted: tuple[tuple[str, ...], ...] = (("n_routed_experts", "num_experts", "num_local_experts"), ("num_experts_per_tok",))
    for names in wanted if shape.model_type in EXPERTS else ():
        if not any(config.get(name) for name in names):
            raise ModelError(
                f"{path} has no {' or '.join(names)}, which a {shape.model_type} needs",
                "take the config.json of the model's own repository",
            )
    experts = next((config[name] for name in wanted[0] if config.get(name)), None)
    if shape.model_type in EXPERTS and experts is not None and config["num_experts_per_tok"] > experts:
        raise ModelError(
            f"{path}: num_experts_per_tok is {config['num_experts_per_tok']}, and there are {experts} experts", "the file is damaged"
        )
    try:
        assert shape.num_params > 0
    except KeyError as error:
        raise ModelError(
            f"{path} has no {error.args[0]}, which a {shape.model_type} needs", "take the config.json of the model's own repository"
        ) from None
    except TypeError as error:
        absent = [
            name
            for name in ("intermediate_size", "moe_intermediate_size", "d_ff", "intermediate_size_mlp")
            if name in config and not config[name]
        ]
        problem = f"has no {absent[0]}, which a {shape.model_type} needs" if absent else f"cannot be made sense of: {error}"
        raise ModelError(f"{path} {problem}", "take the config.json of the model's own repository") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{path}: the parameters of a {shape.model_type} do not follow from it ({error})", "the file is damaged") from None
    return shape


def as_llama(shape: ModelShape) -> ModelShape:
    """A Llama of the same widths and depth."""
    config = {"model_type": "llama", "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size,
              "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads,
              "head_dim": shape.head_dim, "vocab_size": shape.vocab_size, "tie_word_embeddings": shape.tied_embeddings}  # fmt: skip
    return replace(shape, model_type="llama", config=config)


def keep_shape(config: dict[str, Any]) -> dict[str, Any]:
    """Of a config.json what sizes can follow from: numbers, words and short lists, and the parts for text and images."""
    kept: dict[str, Any] = {
        k: v for k, v in config.items() if isinstance(v, int | float | str | None) or (isinstance(v, list) and len(v) <= 256)
    }
    kept |= {k: keep_shape(config[k]) for k in ("text_config", "vision_config") if isinstance(config.get(k), dict)}
    if isinstance(config.get("quantization_config"), dict):
        kept["quant_method"] = config["quantization_config"].get("quant_method")
    for rope in (config.get("rope_parameters"), config.get("rope_scaling")):
        if isinstance(rope, dict) and "partial_rotary_factor" in rope:
            kept["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if isinstance(config.get("id2label"), dict):
        kept["num_labels"] = len(config["id2label"])
    return kept


def name_alike(config: dict[str, Any]) -> dict[str, Any]:
    """The same under the names most architectures use (GPT-2 has n_embd, n_layer and n_head)."""
    found = {new: config[old] for old, new in _OTHER_NAMES.items() if old in config and new not in config}
    return config | found


_OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}


def read_text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that reads text: all of it, or its text_config over what stands beside it."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    kind = config.get("model_type")
    beside = {k: v for k, v in config.items() if k not in ("text_config", "vision_config")}
    if kind == "gemma3":
        return beside | GEMMA3_TEXT | text | {"model_type": "gemma3_text"}
    return beside | {"model_type": f"{kind}_text"} | text


def _has_chat_template(folder: Path) -> bool | None:
    tokenizer = folder / "tokenizer_config.json"
    if not any(folder.glob("*token*")) and not any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return None
    return any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")) or (
        tokenizer.is_file() and '"chat_template"' in tokenizer.read_text(encoding="utf-8")
    )


_GGUF_NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"}
"""GGUF's names of architectures where transformers has others."""


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
    tied = "output.weight" not in header["tensor_names"]
    config = {"model_type": _GGUF_NAMES.get(arch, arch), "hidden_size": hidden, "intermediate_size": need("feed_forward_length"),
              "num_hidden_layers": need("block_count"), "num_attention_heads": heads, "num_key_value_heads": need("attention.head_count_kv", heads),
              "head_dim": need("attention.key_length", hidden // heads), "vocab_size": need("vocab_size", header.get("tokenizer.ggml.tokens")),
              "max_position_embeddings": need("context_length"), "tie_word_embeddings": tied}  # fmt: skip
    return ModelShape(
        model_type=str(config["model_type"]),
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        num_layers=need("block_count"),
        num_heads=heads,
        num_kv_heads=need("attention.head_count_kv", heads),
        head_dim=need("attention.key_length", hidden // heads),
        vocab_size=need("vocab_size", header.get("tokenizer.ggml.tokens")),
        max_positions=need("context_length"),
        tied_embeddings=tied,
        gated_mlp=True,
        has_chat_template="tokenizer.chat_template" in header,
        config=config,
    )
