"""What one device needs: a first honest estimate, in closed form.

Sources: docs/plan.md tells the arithmetic in words. States follow DeepSpeed 0.19.8
(runtime/zero/stage_1_and_2.py, stage3.py), quantisation bitsandbytes 0.50.2 (blocks of 64, nested of 256),
activations a Llama layer with memory-efficient attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan.layout import Layout
from launcher.plan.shape import ModelShape
from launcher.recipe import Freeze, Full, Lora, Optim, QLora, Recipe
from launcher.units import DTYPE_BYTES

NF4_DOUBLE_QUANT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
NF4_BYTES = 0.5 + 4 / 64
INT8_BYTES = 1.0

STATE_BYTES = {
    "adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256,
    "sgd": 0.0, "lion": 4.0, "lion_8bit": 1 + 4 / 256, "adafactor": 4.0,
}  # fmt: skip
"""Optimizer state, bytes a trained parameter. Adafactor sees flat partitions, so it cannot factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes a rank at the peak of a step, part by part."""

    weights: int
    trainable: int
    gradients: int
    master: int
    optimizer: int
    activations: int
    logits: int
    buckets: int

    @property
    def total(self) -> int:
        return self.weights + self.trainable + self.gradients + self.master + self.optimizer + self.activations + self.logits + self.buckets


def count_trainable(recipe: Recipe, shape: ModelShape) -> int:
    """Parameters that receive gradients."""
    method = recipe.method
    if isinstance(method, Lora | QLora):
        return shape.lora_params(method.r, method.target_modules)
    if isinstance(method, Freeze):
        return shape.frozen_but(method.last_layers, method.patterns)
    return shape.num_params


def estimate_memory(recipe: Recipe, shape: ModelShape, layout: Layout, micro_batch_size: int, bucket: int) -> MemoryEstimate:
    """The parts at the peak of a step. `bucket` is DeepSpeed's reduce bucket, in elements."""
    ranks, stage, width = layout.world_size, layout.zero_stage, DTYPE_BYTES[layout.dtype]
    trained = count_trainable(recipe, shape)
    frozen_bytes = _frozen_bytes(recipe, shape, width, trained)
    tokens = micro_batch_size * recipe.data.seq_len
    part = trained / ranks
    on_device = 0.0 if layout.offload_optimizer else 1.0
    sharded = 1 / ranks if stage == 3 else 1.0
    working_layer = shape.layer_params * width * (2 if stage == 3 else 0)
    return MemoryEstimate(
        weights=int(frozen_bytes * (0 if layout.offload_param else sharded) + working_layer),
        trainable=int(trained * width * (0 if layout.offload_param else sharded)),
        gradients=int((part if stage >= 2 else trained) * width * on_device),
        master=int((part if stage >= 1 else trained) * on_device * (4 if width < 4 or stage >= 1 else 0)),
        optimizer=int((part if stage >= 1 else trained) * STATE_BYTES[recipe.optim.name] * on_device + _momentum(recipe.optim, part)),
        activations=int(_activation_bytes(recipe, shape, layout, tokens, width)),
        logits=int(12 * shape.vocab_size * tokens),
        buckets=int(bucket * width) if stage >= 1 else 0,
    )


def _momentum(optim: Optim, part: float) -> float:
    return 4 * part if optim.name == "sgd" and optim.momentum else 0.0


def _frozen_bytes(recipe: Recipe, shape: ModelShape, width: int, trained: int) -> float:
    method = recipe.method
    if isinstance(method, Full):
        return 0.0
    if isinstance(method, Freeze):
        return (shape.num_params - trained) * width
    if isinstance(method, Lora):
        return shape.num_params * width
    quantised = shape.num_layers * shape.layer_linear_params
    per_weight = INT8_BYTES if method.bits == 8 else NF4_DOUBLE_QUANT_BYTES if method.double_quant else NF4_BYTES
    return quantised * per_weight + (shape.num_params - quantised) * width


def _activation_bytes(recipe: Recipe, shape: ModelShape, layout: Layout, tokens: int, width: int) -> float:
    """What the backward pass needs, all layers; with checkpointing their inputs and one layer in full."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key_value, heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.num_heads
    half = 16 * hidden + 8 + 8 * inner + 4 * query + 4 * key_value + 4 * heads
    if isinstance(recipe.method, Lora | QLora):
        half += 14 * recipe.method.r - 4 * hidden
    layer = half * width / 2 * tokens
    if not layout.gradient_checkpointing:
        return shape.num_layers * layer
    return shape.num_layers * width * hidden * tokens + layer + 2 * width * inner * tokens
