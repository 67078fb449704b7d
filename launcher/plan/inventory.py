"""Every parameter of a model by name and shape, from its config.json. No weights, no torch.

Names and shapes are those of transformers 5.23 (models/*/modeling_*.py); tests/test_inventory.py builds each architecture
on the meta device and compares. Values a config.json may leave out are the configuration class' own defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Matrix = Literal["", "linear", "conv1d"]
"""linear: an nn.Linear's weight, which takes an adapter and is quantised; conv1d: the same for GPT-2's transposed kind."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter: its name within its block, its shape as stored."""

    name: str
    shape: tuple[int, ...]
    matrix: Matrix = ""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def fan(self) -> tuple[int, int]:
        """In and out of a linear layer."""
        return (self.shape[0], self.shape[1]) if self.matrix == "conv1d" else (self.shape[1], self.shape[0])


@dataclass(frozen=True, slots=True)
class Block:
    """Parameters that come once a layer: `prefix` has a {} for each of `layers`. Those outside of layers have layers ()."""

    prefix: str
    weights: tuple[Weight, ...]
    layers: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Parameters of one layer."""
        return sum(weight.count for weight in self.weights)

    @property
    def repeats(self) -> int:
        return len(self.layers) or 1

    def names(self) -> Iterator[tuple[str, Weight]]:
        for layer in self.layers or (0,):
            for weight in self.weights:
                yield self.prefix.format(layer) + weight.name, weight


Inventory = tuple[Block, ...]
Config = dict[str, Any]


def make_inventory(config: Config) -> Inventory | None:
    """The parameters of the model a config.json describes (as AutoModelForCausalLM or the architecture's own class builds it);
    None for an architecture that is not known here."""
    kind = config.get("model_type")
    maker = _MAKERS.get(str(kind))
    return maker(config) if maker else None


def knows(kind: str) -> bool:
    """Whether this module has a model type."""
    return kind in _MAKERS


def linear(name: str, n_in: int, n_out: int, bias: bool = False) -> tuple[Weight, ...]:
    weight = Weight(f"{name}.weight", (n_out, n_in), "linear")
    return (weight, Weight(f"{name}.bias", (n_out,))) if bias else (weight,)


def vector(name: str, size: int, bias: bool = False) -> tuple[Weight, ...]:
    weight = Weight(f"{name}.weight", (size,))
    return (weight, Weight(f"{name}.bias", (size,))) if bias else (weight,)


def table(name: str, rows: int, size: int) -> tuple[Weight, ...]:
    return (Weight(f"{name}.weight", (rows, size)),)


# ------------------------------------------------------------------------------------------------- decoders


def head_dim(c: Config) -> int:
    return int(c.get("head_dim") or HEAD_DIM.get(str(c.get("model_type")), 0) or c["hidden_size"] // c["num_attention_heads"])


HEAD_DIM = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128, "gpt_oss": 64, "llama4_text": 128}
"""Where it is not hidden_size / heads though config.json is silent (configuration_*.py)."""


def kv_heads(c: Config) -> int:
    return int(c.get("num_key_value_heads") or c["num_attention_heads"])


def _llama_attention(c: Config) -> tuple[Weight, ...]:
    kind, hidden = c["model_type"], c["hidden_size"]
    width = head_dim(c)
    query, key = c["num_attention_heads"] * width, kv_heads(c) * width
    qkv_bias = bool({"qwen2": True, "qwen2_moe": c.get("qkv_bias", True), "qwen2_vl_text": True, "qwen2_5_vl_text": True,
                     "starcoder2": c.get("use_bias", True), "stablelm": c.get("use_qkv_bias", False),
                     "gpt_oss": c.get("attention_bias", True)}.get(kind, c.get("attention_bias", False)))  # fmt: skip
    out_bias = bool({"qwen2": False, "qwen2_moe": False, "qwen2_vl_text": False, "qwen2_5_vl_text": False, "stablelm": False,
                     "starcoder2": c.get("use_bias", True)}.get(kind, qkv_bias))  # fmt: skip
    weights: tuple[Weight, ...] = ()
    if kind == "gpt_oss":
        weights += (Weight("self_attn.sinks", (c["num_attention_heads"],)),)
    weights += (*linear("self_attn.q_proj", hidden, query, qkv_bias), *linear("self_attn.k_proj", hidden, key, qkv_bias),
                *linear("self_attn.v_proj", hidden, key, qkv_bias), *linear("self_attn.o_proj", query, hidden, out_bias))  # fmt: skip
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        weights += (*vector("self_attn.q_norm", width), *vector("self_attn.k_norm", width))
    if kind == "olmo2":
        weights += (*vector("self_attn.q_norm", query), *vector("self_attn.k_norm", key))
    return weights


def _phi3_attention(c: Config) -> tuple[Weight, ...]:
    width = head_dim(c)
    heads, keys = c["num_attention_heads"], kv_heads(c)
    return (
        *linear("self_attn.o_proj", heads * width, c["hidden_size"]),
        *linear("self_attn.qkv_proj", c["hidden_size"], (heads + 2 * keys) * width),
    )


def _mla_attention(c: Config) -> tuple[Weight, ...]:
    """DeepSeek's latent attention."""
    hidden, heads, bias = c["hidden_size"], c["num_attention_heads"], bool(c.get("attention_bias", False))
    rope, nope, value, rank = (
        c.get("qk_rope_head_dim", 64),
        c.get("qk_nope_head_dim", 128),
        c.get("v_head_dim", 128),
        c.get("kv_lora_rank", 512),
    )
    q_rank = c.get("q_lora_rank", 1536)
    if q_rank is None:
        query = linear("self_attn.q_proj", hidden, heads * (nope + rope))
    else:
        query = (*linear("self_attn.q_a_proj", hidden, q_rank, bias), *vector("self_attn.q_a_layernorm", q_rank),
                 *linear("self_attn.q_b_proj", q_rank, heads * (nope + rope)))  # fmt: skip
    return (*query, *linear("self_attn.kv_a_proj_with_mqa", hidden, rank + rope, bias), *vector("self_attn.kv_a_layernorm", rank),
            *linear("self_attn.kv_b_proj", rank, heads * (nope + value)), *linear("self_attn.o_proj", heads * value, hidden, bias))  # fmt: skip


def _gated(prefix: str, hidden: int, inner: int, bias: bool = False) -> tuple[Weight, ...]:
    return (*linear(f"{prefix}.gate_proj", hidden, inner, bias), *linear(f"{prefix}.up_proj", hidden, inner, bias),
            *linear(f"{prefix}.down_proj", inner, hidden, bias))  # fmt: skip


def _mlp(c: Config) -> tuple[Weight, ...]:
    kind, hidden, inner = c["model_type"], c["hidden_size"], c["intermediate_size"]
    if kind == "phi3":
        return (*linear("mlp.gate_up_proj", hidden, 2 * inner), *linear("mlp.down_proj", inner, hidden))
    if kind == "starcoder2":
        bias = bool(c.get("use_bias", True))
        return (*linear("mlp.c_fc", hidden, inner, bias), *linear("mlp.c_proj", inner, hidden, bias))
    return _gated("mlp", hidden, inner, bool(c.get("mlp_bias", False)))


def num_experts(c: Config) -> int:
    return int(c.get("n_routed_experts") or c.get("num_experts") or c.get("num_local_experts") or 0)


def is_sparse(c: Config, layer: int) -> bool:
    """Whether a layer's MLP is a mixture of experts."""
    kind = c["model_type"]
    if kind in ("mixtral", "gpt_oss"):
        return True
    if kind in ("qwen2_moe", "qwen3_moe"):
        step = c.get("decoder_sparse_step", 1)
        return layer not in (c.get("mlp_only_layers") or ()) and (layer + 1) % step == 0
    if kind in ("deepseek_v2", "deepseek_v3"):
        return bool(layer >= c.get("first_k_dense_replace", 0 if kind == "deepseek_v2" else 3))
    if kind == "llama4_text":
        step = c.get("interleave_moe_layer_step", 1)
        listed = c.get("moe_layers")
        return bool(layer in listed if listed else (layer + 1) % step == 0)
    return False


def _experts(c: Config) -> tuple[Weight, ...]:
    """transformers 5 keeps the experts of a layer in two three-dimensional parameters, which are no nn.Linear."""
    kind, hidden, experts = c["model_type"], c["hidden_size"], num_experts(c)
    inner = c["intermediate_size"] if kind in ("mixtral", "gpt_oss", "llama4_text") else c["moe_intermediate_size"]
    if kind == "gpt_oss":
        return (Weight("mlp.router.weight", (experts, hidden)), Weight("mlp.router.bias", (experts,)),
                Weight("mlp.experts.gate_up_proj", (experts, hidden, 2 * inner)), Weight("mlp.experts.gate_up_proj_bias", (experts, 2 * inner)),
                Weight("mlp.experts.down_proj", (experts, inner, hidden)), Weight("mlp.experts.down_proj_bias", (experts, hidden)))  # fmt: skip
    if kind == "llama4_text":
        return (Weight("feed_forward.experts.gate_up_proj", (experts, hidden, 2 * inner)),
                Weight("feed_forward.experts.down_proj", (experts, inner, hidden)), *linear("feed_forward.router", hidden, experts),
                *_gated("feed_forward.shared_expert", hidden, inner))  # fmt: skip
    weights = (Weight("mlp.gate.weight", (experts, hidden)), Weight("mlp.experts.gate_up_proj", (experts, 2 * inner, hidden)),
               Weight("mlp.experts.down_proj", (experts, hidden, inner)))  # fmt: skip
    if kind == "qwen2_moe":
        return (
            *weights,
            *_gated("mlp.shared_expert", hidden, c["shared_expert_intermediate_size"]),
            *linear("mlp.shared_expert_gate", hidden, 1),
        )
    if kind in ("deepseek_v2", "deepseek_v3") and (shared := c.get("n_shared_experts", 2 if kind == "deepseek_v2" else 1)):
        return (*weights, *_gated("mlp.shared_experts", hidden, inner * shared))
    return weights


def _layer(c: Config, layer: int) -> tuple[Weight, ...]:
    kind, hidden = c["model_type"], c["hidden_size"]
    attention = _phi3_attention(c) if kind == "phi3" else _mla_attention(c) if kind.startswith("deepseek") else _llama_attention(c)
    if is_sparse(c, layer):
        mlp = _experts(c)
    elif kind == "llama4_text":
        mlp = _gated("feed_forward", hidden, c["intermediate_size_mlp"])
    else:
        mlp = _mlp(c)
    bias = kind in ("starcoder2", "stablelm")
    norms = {"gemma2": SANDWICH, "gemma3_text": SANDWICH, "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
             "cohere": ("input_layernorm",)}.get(kind, ("input_layernorm", "post_attention_layernorm"))  # fmt: skip
    return (*attention, *mlp, *(w for name in norms for w in vector(name, hidden, bias)))


SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def tied(c: Config) -> bool:
    return bool(c.get("tie_word_embeddings", c.get("model_type") in TIED_UNLESS_TOLD))


TIED_UNLESS_TOLD = frozenset({"gpt2", "opt", "bloom", "falcon", "mpt", "gemma", "gemma2", "gemma3", "gemma3_text", "smollm3", "starcoder2",
                              "cohere", "bert", "roberta", "t5", "mt5", "whisper"})  # fmt: skip
"""Model types whose head is the embedding where config.json leaves tie_word_embeddings out (models/*/configuration_*.py)."""


def _decoder(c: Config, root: str = "model.") -> Inventory:
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    blocks = [Block(root, table("embed_tokens", vocab, hidden))]
    by_shape: dict[tuple[Weight, ...], list[int]] = {}
    for layer in range(c["num_hidden_layers"]):
        by_shape.setdefault(_layer(c, layer), []).append(layer)
    blocks += [Block(root + "layers.{}.", weights, tuple(layers)) for weights, layers in by_shape.items()]
    blocks.append(Block(root, vector("norm", hidden, c["model_type"] in ("starcoder2", "stablelm"))))
    if not tied(c):
        blocks.append(Block("", linear("lm_head", hidden, vocab)))
    return tuple(blocks)


def _phi(c: Config) -> Inventory:
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    key = kv_heads(c) * hidden // c["num_attention_heads"]
    layer = (*linear("self_attn.q_proj", hidden, hidden, True), *linear("self_attn.k_proj", hidden, key, True),
             *linear("self_attn.v_proj", hidden, key, True), *linear("self_attn.dense", hidden, hidden, True),
             *linear("mlp.fc1", hidden, inner, True), *linear("mlp.fc2", inner, hidden, True), *vector("input_layernorm", hidden, True))  # fmt: skip
    if c.get("qk_layernorm"):
        width = hidden // c["num_attention_heads"]
        layer += (*vector("self_attn.q_layernorm", width, True), *vector("self_attn.k_layernorm", width, True))
    return (Block("model.", table("embed_tokens", vocab, hidden)), Block("model.layers.{}.", layer, tuple(range(c["num_hidden_layers"]))),
            Block("model.", vector("final_layernorm", hidden, True)),
            Block("", linear("lm_head", hidden, vocab, True)[1 if tied(c) else 0 :]))  # fmt: skip


def _conv1d(name: str, n_in: int, n_out: int) -> tuple[Weight, ...]:
    return (Weight(f"{name}.weight", (n_in, n_out), "conv1d"), Weight(f"{name}.bias", (n_out,)))


def _gpt2(c: Config) -> Inventory:
    hidden, inner = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    layer = (*vector("ln_1", hidden, True), *_conv1d("attn.c_attn", hidden, 3 * hidden), *_conv1d("attn.c_proj", hidden, hidden),
             *vector("ln_2", hidden, True), *_conv1d("mlp.c_fc", hidden, inner), *_conv1d("mlp.c_proj", inner, hidden))  # fmt: skip
    head = () if tied(c) else (Block("", linear("lm_head", hidden, c["vocab_size"])),)
    return (Block("transformer.", (*table("wte", c["vocab_size"], hidden), *table("wpe", c["n_positions"], hidden))),
            Block("transformer.h.{}.", layer, tuple(range(c["n_layer"]))), Block("transformer.", vector("ln_f", hidden, True)), *head)  # fmt: skip


def _gpt_neox(c: Config) -> Inventory:
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], bool(c.get("attention_bias", True))
    layer = (*vector("input_layernorm", hidden, True), *vector("post_attention_layernorm", hidden, True),
             *linear("attention.query_key_value", hidden, 3 * hidden, bias), *linear("attention.dense", hidden, hidden, bias),
             *linear("mlp.dense_h_to_4h", hidden, inner, True), *linear("mlp.dense_4h_to_h", inner, hidden, True))  # fmt: skip
    head = () if tied(c) else (Block("", linear("lm_head", hidden, c["vocab_size"])),)
    return (Block("gpt_neox.", table("embed_in", c["vocab_size"], hidden)), Block("gpt_neox.layers.{}.", layer, tuple(range(c["num_hidden_layers"]))),
            Block("gpt_neox.", vector("final_layer_norm", hidden, True)), *head)  # fmt: skip


_DECODERS = ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite", "cohere",
             "stablelm", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "llama4_text")  # fmt: skip
_MAKERS: dict[str, Callable[[Config], Inventory]] = {
    **dict.fromkeys(_DECODERS, _decoder),
    "phi": _phi,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
