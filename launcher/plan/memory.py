"""What one device needs: a first honest estimate, in closed form.

Sources: docs/plan.md tells the arithmetic in words. States follow DeepSpeed 0.19.8
(runtime/zero/stage_1_and_2.py, stage3.py), quantisation bitsandbytes 0.50.2 (blocks of 64, nested of 256),
activations a Llama layer with memory-efficient attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from launcher.cluster import Cluster
from launcher.plan.batch import BatchPlan
from launcher.plan.budget import Component, DiskNeed, MemoryPlan, Phase, Provenance
from launcher.plan.layout import Layout
from launcher.plan.shape import ModelShape, is_head
from launcher.recipe import Freeze, Full, Lora, Optim, QLora, Recipe
from launcher.units import DTYPE_BYTES, MIB

NF4_DOUBLE_QUANT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
NF4_BYTES = 0.5 + 4 / 64
INT8_BYTES = 1.0

STATE_BYTES = {
    "adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256,
    "sgd": 0.0, "lion": 4.0, "lion_8bit": 1 + 4 / 256, "adafactor": 4.0,
}  # fmt: skip
"""Optimizer state, bytes a trained parameter. Adafactor sees flat partitions, so it cannot factor."""


def count_trainable(recipe: Recipe, shape: ModelShape) -> int:
    """Parameters that receive gradients."""
    method = recipe.method
    if isinstance(method, Lora | QLora):
        return shape.lora_params(method.r, method.target_modules)
    if isinstance(method, Freeze):
        return shape.frozen_but(method.last_layers, method.patterns)
    return shape.num_params


CUDA_CONTEXT_BYTES, LIBRARIES_BYTES = 500 * MIB, 1100 * MIB
"""What the driver holds of a device, and what a worker's libraries take of host memory. To be measured."""


def predict_memory(
    recipe: Recipe,
    shape: ModelShape,
    layout: Layout,
    batch: BatchPlan,
    cluster: Cluster,
    *,
    deepspeed: Mapping[str, Any],
    budget: int | None = None,
    replay: bool = True,
) -> MemoryPlan:
    """What the run needs, phase by phase. `deepspeed` is its configuration; `budget` is the device's memory unless told.

    With `replay` the allocator is simulated; without, its slack is a share: for a search over thousands of candidates.
    """
    bucket = deepspeed["zero_optimization"]["reduce_bucket_size"]
    ranks, stage, width = layout.world_size, layout.zero_stage, DTYPE_BYTES[layout.dtype]
    trained = count_trainable(recipe, shape)
    tokens = batch.micro_batch_size * batch.seq_len
    part = trained / ranks
    on_device = 0.0 if layout.offload_optimizer else 1.0
    sharded = 0.0 if layout.offload_param else 1 / ranks if stage == 3 else 1.0
    frozen = _frozen_bytes(recipe, shape, width, trained)
    weights = _part("weights", (frozen + trained * width) * sharded, "source", 0.01)
    gathered = _part("gathered parameters", shape.layer_params * width * (2 if stage == 3 else 0), "assumed", 0.5)
    gradients = _part("gradients", (part if stage >= 2 else trained) * width * on_device, "source", 0.05)
    master = _part("fp32 master", (part if stage else trained) * on_device * (4 if width < 4 or stage else 0), "source")
    states = _part(
        "optimizer states",
        ((part if stage else trained) * STATE_BYTES[recipe.optim.name] + _momentum(recipe.optim, part)) * on_device,
        "source",
    )
    activations = _part("activations", _activation_bytes(recipe, shape, layout, tokens, width), "source", 0.1)
    logits = _part("logits and loss", 12 * shape.vocab_size * tokens, "source", 0.05)
    buckets = _part("buckets", bucket * width if stage else 0, "source", 0.05)
    step = _part("step workspace", 6 * part * on_device, "source", 0.2)
    steady = [weights, master, states]
    held: dict[str, list[Component]] = {
        "load": [weights],
        "engine start": [weights, master],
        "forward": [*steady, gathered, activations],
        "loss": [*steady, gathered, activations, logits],
        "backward": [*steady, gathered, activations, logits, gradients, buckets],
        "optimizer step": [*steady, gradients, step],
    }
    phases = tuple(Phase(name=name, components=(*_nonzero(parts), *_overhead(parts, layout))) for name, parts in held.items())
    a_node = layout.workers_per_node
    libraries = Component(name="libraries", bytes=LIBRARIES_BYTES * a_node, provenance="assumed", error=0.3)
    offloaded = _part("optimizer states", 18 * part * a_node * (1 - on_device), "source", 0.2)
    host = Phase(name="optimizer step", components=tuple(_nonzero([libraries, offloaded])))
    if layout.accelerator == "cpu":
        worst = max(phases, key=lambda phase: phase.total_bytes)
        host = Phase(name=worst.name, components=tuple(replace(c, bytes=c.bytes * a_node) for c in worst.components))
    export = int(trained * width if isinstance(recipe.method, Lora | QLora) else shape.num_params * width)
    return MemoryPlan(
        phases=phases,
        host_phases=(host,),
        disk=DiskNeed(checkpoint_bytes=int(trained * 12), kept_checkpoints_bytes=int(trained * 12) * 2, export_bytes=export),
        network_bytes=int(2 * trained * width * (ranks - 1) / ranks),
        budget=budget if budget is not None else cluster.device_memory,
        host_budget=cluster.host_memory if cluster.host_memory > 1 else None,
    )


def _part(name: str, size: float, provenance: Provenance, error: float = 0.0) -> Component:
    return Component(name=name, bytes=int(size), provenance=provenance, error=error)


def _nonzero(parts: Iterable[Component]) -> Iterator[Component]:
    return (part for part in parts if part.bytes)


def _overhead(parts: list[Component], layout: Layout) -> list[Component]:
    slack = int(0.06 * sum(part.bytes for part in parts))
    if layout.accelerator == "cpu":
        return [Component(name="allocator slack", bytes=slack, provenance="assumed", error=1.0, counts_in="reserved"),
                Component(name="libraries", bytes=LIBRARIES_BYTES, provenance="assumed", error=0.3, counts_in="total")]  # fmt: skip
    return [Component(name="allocator slack", bytes=slack, provenance="assumed", error=1.0, counts_in="reserved"),
            Component(name="CUDA context", bytes=CUDA_CONTEXT_BYTES, provenance="assumed", error=0.3, counts_in="total")]  # fmt: skip


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
    quantised = sum(b.repeats * w.count for b in shape.inventory for w in b.weights if w.matrix and not is_head(b.prefix, w))
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
