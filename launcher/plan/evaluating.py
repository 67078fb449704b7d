"""What an evaluation holds beside weights and states: a forward pass without gradients and its loss, or the answers to sample prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.plan.forward import layer_type, sliding_window
from launcher.plan.profile import Peak, profile_evaluation
from launcher.plan.shape import ModelShape, name_alike, read_text_part
from launcher.plan.workload import Workload
from launcher.recipe import Recipe

TEMPLATE_TOKENS = 64
"""What a chat template puts around a prompt, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A peak, and the keys and values that answering keeps (0 where the held-out loss decides)."""

    peak: Peak
    cache: int = 0


def profile_evaluating(work: Workload, recipe: Recipe) -> Evaluation:
    """The larger of both. `work` is an evaluation's micro-batch."""
    loss = Evaluation(peak=profile_evaluation(work))
    if not recipe.evaluate.samples:
        return loss
    answering = _profile_answering(work, recipe)
    return max(loss, answering, key=lambda told: sum(told.peak.values()) + told.cache)


def _profile_answering(work: Workload, recipe: Recipe) -> Evaluation:
    """One row (train/evaluate.py): the prompt at once with the logits of its last token, then token by token on what is kept.

    A prompt's tokens are not known here. A byte-level tokenizer makes at most one a byte, and those are counted.
    """
    prompt = max(len(text.encode()) for text in recipe.evaluate.samples) + len((recipe.data.system_prompt or "").encode()) + TEMPLATE_TOKENS
    if work.shape.is_pair:
        row = replace(work, micro_batch_size=1, seq_len=prompt, target_len=1, loss_columns=1, packed=False)
        return Evaluation(
            peak=profile_evaluation(row), cache=pair_cache_bytes(work.shape, prompt, recipe.evaluate.max_new_tokens, work.width)
        )
    longest = min(prompt + recipe.evaluate.max_new_tokens, max(1, work.shape.max_positions))
    attention = "sdpa" if work.attention == "flash_attention_2" else work.attention  # as a row, not as one stream of packs
    row = replace(work, micro_batch_size=1, seq_len=min(prompt, longest), loss_columns=1, packed=False, attention=attention)
    return Evaluation(peak=profile_evaluation(row), cache=cache_bytes(work.shape, longest, work.width))


def cache_bytes(shape: ModelShape, tokens: int, width: int) -> int:
    """Keys and values of a row, every layer's (transformers 5.23, DynamicCache: a sliding layer keeps its window), and one layer's twice: it
    grows by a copy."""
    config = name_alike(read_text_part(shape.config))
    each = 0
    total = 0
    for layer in range(shape.num_layers):
        kept = min(tokens, sliding_window(config) or tokens) if layer_type(config, layer) == "sliding_attention" else tokens
        each = kept * _widths(shape, config) * width
        total += each
    return total + each


def pair_cache_bytes(shape: ModelShape, source: int, target: int, width: int) -> int:
    """An encoder-decoder's row (EncoderDecoderCache): every decoder layer's keys and values of the answer, and of the source, which it reads once;
    one layer's of the answer twice, and what the encoder gave."""
    a_token, layers = 2 * shape.num_heads * shape.head_dim * width, shape.total_layers - shape.num_layers
    return a_token * (layers * (source + target) + target) + source * shape.hidden_size * width


def _widths(shape: ModelShape, config: dict[str, object]) -> int:
    """Elements a token of a layer: keys and values; of latent attention those of every head, which transformers keeps spread out."""
    if "kv_lora_rank" in config:
        nope, rope, value = (int(str(config[name])) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        return shape.num_heads * (nope + rope + value)
    return 2 * shape.num_kv_heads * shape.head_dim
