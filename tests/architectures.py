"""Tiny configurations of every architecture the plan has arithmetic for: what tests build on the meta device."""

from __future__ import annotations

import logging
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
LATENT: dict[str, Any] = {**EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
                          "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "phi3": {},
    "smollm3": {}, "olmo2": {}, "granite": {}, "cohere": {}, "stablelm": {}, "starcoder2": {}, "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 80}, "qwen3_moe": EXPERTS, "gpt_oss": EXPERTS, "deepseek_v2": LATENT,
    "deepseek_v3": LATENT, "llama4_text": {**EXPERTS, "intermediate_size_mlp": 112}, "phi": {}, "gpt2": {}, "gpt_neox": {},
    "bert": {"architectures": ["BertLMHeadModel"]}, "roberta": {"architectures": ["RobertaForCausalLM"]},
}  # fmt: skip


def config_of(kind: str, **changes: Any) -> Any:
    """A transformers configuration of this model type."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**{**SIZES, **DECODERS[kind], **changes})


def build_decoder(config: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return build(AutoModelForCausalLM.from_config, config)


def build(make: Any, config: Any) -> torch.nn.Module:
    """A model on the meta device."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.device("meta"):
        model: torch.nn.Module = make(config)
    return model


def build_others() -> list[torch.nn.Module]:
    """Encoders, encoder-decoders, and models that see."""
    import transformers as t

    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    grouped = {**text, "num_key_value_heads": 2}
    sight = {**small, "hidden_size": 48, "intermediate_size": 80}
    bert, roberta = t.BertConfig(**text), t.RobertaConfig(**text)
    vit = t.ViTConfig(**small)
    whisper = t.WhisperConfig(d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=80, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
                              decoder_attention_heads=4, vocab_size=160, pad_token_id=0)  # fmt: skip
    clip = t.CLIPConfig(text_config={**text, "projection_dim": 32}, vision_config={**sight, "projection_dim": 32}, projection_dim=32)
    qwen25 = t.Qwen2_5_VLConfig(
        text_config=grouped, vision_config={"hidden_size": 48, "out_hidden_size": 64, "intermediate_size": 80, "depth": 2, "num_heads": 4}
    )
    qwen2 = t.Qwen2VLConfig(text_config=grouped, vision_config={"embed_dim": 48, "hidden_size": 64, "depth": 2, "num_heads": 4})
    gemma3 = t.Gemma3Config(text_config=grouped, vision_config=sight)

    def t5(**changes: Any) -> Any:
        return t.T5Config(d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, vocab_size=160, **changes)

    pairs = [
        (t.BertModel, bert), (t.BertForMaskedLM, bert), (t.BertForSequenceClassification, bert), (t.BertForTokenClassification, bert),
        (t.BertForQuestionAnswering, bert), (t.RobertaModel, roberta), (t.RobertaForMaskedLM, roberta), (t.RobertaForSequenceClassification, roberta),
        (t.T5ForConditionalGeneration, t5()), (t.T5ForConditionalGeneration, t5(feed_forward_proj="gated-gelu", num_decoder_layers=1)),
        (t.MT5ForConditionalGeneration, t.MT5Config(d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, vocab_size=160)),
        (t.WhisperForConditionalGeneration, whisper), (t.ViTModel, vit), (t.ViTForImageClassification, vit), (t.CLIPModel, clip),
        (t.Qwen2_5_VLForConditionalGeneration, qwen25), (t.Qwen2VLForConditionalGeneration, qwen2), (t.Gemma3ForConditionalGeneration, gemma3),
    ]  # fmt: skip
    return [build(kind, config) for kind, config in pairs]
