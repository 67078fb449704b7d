"""Parameters of encoders, encoder-decoders and models that see: BERT's family, T5, Whisper, ViT, CLIP, Qwen-VL, Gemma 3 with its tower.

Which head a BERT has is said by config.json's `architectures`. Names and shapes as in launcher.plan.inventory, which is asked first.
"""

from __future__ import annotations

from collections.abc import Callable

from launcher.plan.inventory import Block, Config, Inventory, Weight, knows, linear, table, tied, vector
from launcher.plan.inventory import make_inventory as make_decoder_inventory


def make_inventory(config: Config) -> Inventory | None:
    """The parameters of any architecture known to the launcher; None for another."""
    maker = _MAKERS.get(str(config.get("model_type")))
    return maker(config) if maker else make_decoder_inventory(config)


PAIRS = frozenset({"t5", "mt5"})
"""Encoder-decoders that are trained on pairs of a source and a target."""


def is_known(config: Config) -> bool:
    """Whether make_inventory gives this architecture's parameters."""
    return str(config.get("model_type")) in _MAKERS or knows(str(config.get("model_type")))


def head_of(c: Config) -> str:
    """What stands on an encoder: "MaskedLM", "SequenceClassification", ... or "" for the bare model."""
    name = (c.get("architectures") or ["Model"])[0]
    return name.partition("For")[2] if "For" in name else "LMHead" if name.endswith("LMHeadModel") else ""


COUNTED = "counted_parameters"
"""A config's key for the parameters of a model that was built: a list of blocks, each its prefix, its layers, and its weights."""


def _counted(c: Config) -> Inventory:
    return tuple(
        Block(prefix, tuple(Weight(name, tuple(shape), matrix) for name, shape, matrix in weights), tuple(layers))
        for prefix, layers, weights in c[COUNTED]
    )


def _bert(c: Config) -> Inventory:
    kind, hidden, inner, vocab = c["model_type"], c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head, labels = head_of(c), int(c.get("num_labels") or len(c.get("id2label") or (0, 1)))
    root = f"{kind}." if head else ""
    embeddings = (*table("word_embeddings", vocab, hidden), *table("position_embeddings", c["max_position_embeddings"], hidden),
                  *table("token_type_embeddings", c.get("type_vocab_size", 2), hidden), *vector("LayerNorm", hidden, True))  # fmt: skip
    layer = (*(w for n in ("query", "key", "value") for w in linear(f"attention.self.{n}", hidden, hidden, True)),
             *linear("attention.output.dense", hidden, hidden, True), *vector("attention.output.LayerNorm", hidden, True),
             *linear("intermediate.dense", hidden, inner, True), *linear("output.dense", inner, hidden, True),
             *vector("output.LayerNorm", hidden, True))  # fmt: skip
    blocks = [Block(f"{root}embeddings.", embeddings), Block(root + "encoder.layer.{}.", layer, tuple(range(c["num_hidden_layers"])))]
    pooled = head in ("", "NextSentencePrediction", "PreTraining", "MultipleChoice") or (
        head == "SequenceClassification" and kind == "bert"
    )
    if pooled:
        blocks.append(Block(root, linear("pooler.dense", hidden, hidden, True)))
    if head in ("MaskedLM", "LMHead", "PreTraining", "CausalLM"):
        decoder = () if tied(c) else linear("decoder", hidden, vocab, True)  # with a bias of its own, the other is not used then
        if kind == "bert":
            transform = (*linear("transform.dense", hidden, hidden, True), *vector("transform.LayerNorm", hidden, True))
            blocks.append(Block("cls.predictions.", (Weight("bias", (vocab,)), *transform, *decoder)))
        else:
            names = (*linear("dense", hidden, hidden, True), *vector("layer_norm", hidden, True))
            blocks.append(Block("lm_head.", (Weight("bias", (vocab,)), *names, *decoder)))
    elif head == "SequenceClassification" and kind == "roberta":
        blocks.append(Block("classifier.", (*linear("dense", hidden, hidden, True), *linear("out_proj", hidden, labels, True))))
    elif head in ("SequenceClassification", "TokenClassification"):
        blocks.append(Block("", linear("classifier", hidden, labels, True)))
    elif head == "QuestionAnswering":
        blocks.append(Block("", linear("qa_outputs", hidden, 2, True)))
    return tuple(blocks)


def _t5(c: Config) -> Inventory:
    hidden, inner, width = c["d_model"], c["d_ff"], c["num_heads"] * c["d_kv"]
    gated = is_gated(c)
    names = ("wi_0", "wi_1") if gated else ("wi",)
    buckets = c.get("relative_attention_num_buckets", 32)

    def attention(place: str, kind: str) -> tuple[Weight, ...]:
        return (*(w for n in ("q", "k", "v") for w in linear(f"{place}.{kind}.{n}", hidden, width)), *linear(f"{place}.{kind}.o", width, hidden),
                *vector(f"{place}.layer_norm", hidden))  # fmt: skip

    def mlp(place: str) -> tuple[Weight, ...]:
        return (*(w for n in names for w in linear(f"{place}.DenseReluDense.{n}", hidden, inner)),
                *linear(f"{place}.DenseReluDense.wo", inner, hidden), *vector(f"{place}.layer_norm", hidden))  # fmt: skip

    bias = table("layer.0.SelfAttention.relative_attention_bias", buckets, c["num_heads"])
    encoder = (*attention("layer.0", "SelfAttention"), *mlp("layer.1"))
    decoder = (*attention("layer.0", "SelfAttention"), *attention("layer.1", "EncDecAttention"), *mlp("layer.2"))
    head = () if tied(c) else (Block("", linear("lm_head", hidden, c["vocab_size"])),)
    return (Block("", table("shared", c["vocab_size"], hidden)), Block("encoder.block.{}.", encoder, tuple(range(c["num_layers"]))),
            Block("encoder.block.0.", bias), Block("encoder.", vector("final_layer_norm", hidden)),
            Block("decoder.block.{}.", decoder, tuple(range(depth_of_decoder(c)))), Block("decoder.block.0.", bias),
            Block("decoder.", vector("final_layer_norm", hidden)), *head)  # fmt: skip


def feed_forward(c: Config) -> str:
    """What config.json says of a T5's MLP: "relu", "gated-gelu", or the configuration class' own default."""
    return str(c.get("feed_forward_proj") or ("gated-gelu" if c["model_type"] == "mt5" else "relu"))


def is_gated(c: Config) -> bool:
    return feed_forward(c).startswith("gated")


def reads_source(name: str) -> bool:
    """Whether a T5's weight is multiplied with the source's tokens: the encoder's are, and the keys and values that the decoder has of it."""
    return name.startswith("encoder.") or name.endswith(("EncDecAttention.k.weight", "EncDecAttention.v.weight"))


def depth_of_decoder(c: Config) -> int:
    """Layers of a T5's decoder."""
    return int(c.get("num_decoder_layers") or c["num_layers"])


def _whisper(c: Config) -> Inventory:
    hidden = c["d_model"]

    def attention(name: str) -> tuple[Weight, ...]:
        return (*linear(f"{name}.k_proj", hidden, hidden), *(w for n in ("v_proj", "q_proj", "out_proj") for w in linear(f"{name}.{n}", hidden, hidden, True)),
                *vector(f"{name}_layer_norm", hidden, True))  # fmt: skip

    def mlp(inner: int) -> tuple[Weight, ...]:
        return (*linear("fc1", hidden, inner, True), *linear("fc2", inner, hidden, True), *vector("final_layer_norm", hidden, True))

    stem = (Weight("conv1.weight", (hidden, c["num_mel_bins"], 3)), Weight("conv1.bias", (hidden,)), Weight("conv2.weight", (hidden, hidden, 3)),
            Weight("conv2.bias", (hidden,)), *table("embed_positions", c["max_source_positions"], hidden))  # fmt: skip
    head = () if tied(c) else (Block("", linear("proj_out", hidden, c["vocab_size"])),)
    return (Block("model.encoder.", stem),
            Block("model.encoder.layers.{}.", (*attention("self_attn"), *mlp(c["encoder_ffn_dim"])), tuple(range(c["encoder_layers"]))),
            Block("model.encoder.", vector("layer_norm", hidden, True)),
            Block("model.decoder.", (*table("embed_tokens", c["vocab_size"], hidden), *table("embed_positions", c["max_target_positions"], hidden))),
            Block("model.decoder.layers.{}.", (*attention("self_attn"), *attention("encoder_attn"), *mlp(c["decoder_ffn_dim"])),
                  tuple(range(c["decoder_layers"]))),
            Block("model.decoder.", vector("layer_norm", hidden, True)), *head)  # fmt: skip


def _vit(c: Config) -> Inventory:
    hidden, inner, patch, channels = c["hidden_size"], c["intermediate_size"], c["patch_size"], c.get("num_channels", 3)
    head, bias = head_of(c), bool(c.get("qkv_bias", True))
    root = "vit." if head else ""
    patches = (c["image_size"] // patch) ** 2
    stem = (Weight("cls_token", (1, 1, hidden)), Weight("position_embeddings", (1, patches + 1, hidden)),
            Weight("patch_embeddings.projection.weight", (hidden, channels, patch, patch)), Weight("patch_embeddings.projection.bias", (hidden,)))  # fmt: skip
    layer = (*(w for n in ("q_proj", "k_proj", "v_proj") for w in linear(f"attention.{n}", hidden, hidden, bias)),
             *linear("attention.o_proj", hidden, hidden, True), *vector("layernorm_before", hidden, True), *vector("layernorm_after", hidden, True),
             *linear("mlp.fc1", hidden, inner, True), *linear("mlp.fc2", inner, hidden, True))  # fmt: skip
    blocks = [Block(f"{root}embeddings.", stem), Block(root + "layers.{}.", layer, tuple(range(c["num_hidden_layers"]))),
              Block(root, vector("layernorm", hidden, True))]  # fmt: skip
    if not head:
        blocks.append(Block("", linear("pooler.dense", hidden, hidden, True)))
    if head == "ImageClassification":
        blocks.append(Block("", linear("classifier", hidden, int(c.get("num_labels") or len(c.get("id2label") or (0, 1))), True)))
    return tuple(blocks)


def _clip_layer(hidden: int, inner: int) -> tuple[Weight, ...]:
    return (*(w for n in ("k_proj", "v_proj", "q_proj", "out_proj") for w in linear(f"self_attn.{n}", hidden, hidden, True)),
            *vector("layer_norm1", hidden, True), *linear("mlp.fc1", hidden, inner, True), *linear("mlp.fc2", inner, hidden, True),
            *vector("layer_norm2", hidden, True))  # fmt: skip


CLIP_TEXT = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
             "max_position_embeddings": 77}  # fmt: skip
CLIP_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
               "patch_size": 32, "num_channels": 3}  # fmt: skip
"""CLIP's config.json leaves out in its two parts what is as in configuration_clip.py."""


def _clip(c: Config) -> Inventory:
    text, sight = CLIP_TEXT | (c.get("text_config") or {}), CLIP_VISION | (c.get("vision_config") or {})
    wide, seen, shared = text["hidden_size"], sight["hidden_size"], c.get("projection_dim", 512)
    patches = (sight["image_size"] // sight["patch_size"]) ** 2
    stem = (Weight("embeddings.class_embedding", (seen,)),
            Weight("embeddings.patch_embedding.weight", (seen, sight["num_channels"], sight["patch_size"], sight["patch_size"])),
            *table("embeddings.position_embedding", patches + 1, seen), *vector("pre_layrnorm", seen, True), *vector("post_layernorm", seen, True))  # fmt: skip
    words = (*table("embeddings.token_embedding", text["vocab_size"], wide),
             *table("embeddings.position_embedding", text["max_position_embeddings"], wide), *vector("final_layer_norm", wide, True))  # fmt: skip
    return (Block("", (Weight("logit_scale", ()), *linear("visual_projection", seen, shared), *linear("text_projection", wide, shared))),
            Block("text_model.", words),
            Block("text_model.encoder.layers.{}.", _clip_layer(wide, text["intermediate_size"]), tuple(range(text["num_hidden_layers"]))),
            Block("vision_model.", stem),
            Block("vision_model.encoder.layers.{}.", _clip_layer(seen, sight["intermediate_size"]), tuple(range(sight["num_hidden_layers"]))))  # fmt: skip


QWEN_VISION = {
    "qwen2_vl": {"embed_dim": 1280, "hidden_size": 3584, "depth": 32, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2,
                 "spatial_merge_size": 2, "in_channels": 3},
    "qwen2_5_vl": {"hidden_size": 3584, "out_hidden_size": 3584, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "patch_size": 14,
                   "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3},
}  # fmt: skip


def _qwen_vl(c: Config) -> Inventory:
    kind = c["model_type"]
    text = {k: v for k, v in c.items() if k != "text_config"} | (c.get("text_config") or {}) | {"model_type": f"{kind}_text"}
    sight = QWEN_VISION[kind] | (c.get("vision_config") or {})
    new = kind == "qwen2_5_vl"
    wide, out = (sight["hidden_size"], sight["out_hidden_size"]) if new else (sight["embed_dim"], sight["hidden_size"])
    patch, merged = sight["patch_size"], sight["hidden_size" if new else "embed_dim"] * sight["spatial_merge_size"] ** 2
    if new:
        mlp = (*linear("mlp.gate_proj", wide, sight["intermediate_size"], True), *linear("mlp.up_proj", wide, sight["intermediate_size"], True),
               *linear("mlp.down_proj", sight["intermediate_size"], wide, True))  # fmt: skip
    else:
        inner = int(wide * sight["mlp_ratio"])
        mlp = (*linear("mlp.fc1", wide, inner, True), *linear("mlp.fc2", inner, wide, True))
    layer = (*vector("norm1", wide, not new), *vector("norm2", wide, not new), *linear("attn.qkv", wide, 3 * wide, True),
             *linear("attn.proj", wide, wide, True), *mlp)  # fmt: skip
    stem = (Weight("patch_embed.proj.weight", (wide, sight["in_channels"], sight["temporal_patch_size"], patch, patch)),)
    merger = (
        *vector("merger.ln_q", wide, not new),
        *linear("merger.mlp.0", merged, merged, True),
        *linear("merger.mlp.2", merged, out, True),
    )
    language = make_decoder_inventory(text | {"model_type": "qwen2"}) or ()
    moved = tuple(Block(b.prefix.replace("model.", "model.language_model.", 1), b.weights, b.layers) for b in language)
    return (Block("model.visual.", (*stem, *merger)), Block("model.visual.blocks.{}.", layer, tuple(range(sight["depth"]))), *moved)


SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_channels": 3, "image_size": 224, "patch_size": 16}
GEMMA3_TEXT = {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
               "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072}  # fmt: skip


def _gemma3(c: Config) -> Inventory:
    """The model with its SigLIP tower, which is what AutoModelForCausalLM makes of a config.json with a vision part."""
    text = GEMMA3_TEXT | (c.get("text_config") or {}) | {"model_type": "gemma3_text", "tie_word_embeddings": tied(c)}
    sight = SIGLIP | (c.get("vision_config") or {})
    wide, inner, patch = sight["hidden_size"], sight["intermediate_size"], sight["patch_size"]
    patches = (sight["image_size"] // patch) ** 2
    stem = (Weight("embeddings.patch_embedding.weight", (wide, sight["num_channels"], patch, patch)), Weight("embeddings.patch_embedding.bias", (wide,)),
            *table("embeddings.position_embedding", patches, wide), *vector("post_layernorm", wide, True))  # fmt: skip
    pooling = (Weight("probe", (1, 1, wide)), Weight("attention.in_proj_weight", (3 * wide, wide)), Weight("attention.in_proj_bias", (3 * wide,)),
               *linear("attention.out_proj", wide, wide, True), *vector("layernorm", wide, True), *linear("mlp.fc1", wide, inner, True),
               *linear("mlp.fc2", inner, wide, True))  # fmt: skip
    head = (Block("model.vision_tower.head.", pooling),) if sight.get("vision_use_head", True) else ()
    language = make_decoder_inventory(text) or ()
    moved = tuple(Block(b.prefix.replace("model.", "model.language_model.", 1), b.weights, b.layers) for b in language)
    return (Block("model.vision_tower.", stem),
            Block("model.vision_tower.encoder.layers.{}.", _clip_layer(wide, inner), tuple(range(sight["num_hidden_layers"]))), *head,
            Block("model.multi_modal_projector.", (Weight("mm_input_projection_weight", (wide, text["hidden_size"])), *vector("mm_soft_emb_norm", wide))),
            *moved)  # fmt: skip


def _llama4(c: Config) -> Inventory:
    """AutoModelForCausalLM builds a Llama 4 without the part that sees (models/auto/modeling_auto.py)."""
    text = make_decoder_inventory({**c["text_config"], "model_type": "llama4_text"})
    assert text is not None, "llama4_text is known"
    return text


_MAKERS: dict[str, Callable[[Config], Inventory]] = {
    COUNTED: _counted,
    "llama4": _llama4,
    "bert": _bert,
    "roberta": _bert,
    "t5": _t5,
    "mt5": _t5,
    "whisper": _whisper,
    "vit": _vit,
    "clip": _clip,
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
    "gemma3": _gemma3,
}
