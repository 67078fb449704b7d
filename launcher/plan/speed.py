"""How long a step may take: floating-point operations, bytes moved and bytes sent, over what the devices can do.

An estimate, and marked as one wherever it is shown. It is made to order settings by speed and to tell hours from days;
it is not a measurement. The shares below are assumed: what well-tuned fine-tuning reaches on data-centre GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from launcher.cluster import Cluster
from launcher.data.rows import HUB_SCHEME, find_files
from launcher.plan.batch import BatchPlan
from launcher.plan.devices import Device
from launcher.plan.inventory import Inventory
from launcher.plan.inventory_others import reads_source
from launcher.plan.layout import Layout
from launcher.plan.shape import ModelShape, is_head, read_text_part
from launcher.recipe import Data, Full, Lora, QLora, Recipe
from launcher.units import DTYPE_BYTES

Bound = Literal["compute", "memory", "network", "host", "launches"]
MATMUL_SHARE = 0.62
"""Of the maker's FLOP/s that large matrix products reach."""
CPU_MEMORY_SHARE = 0.2
"""Of what a core copies that torch's other kernels move there: three methods' steps of SmolLM2-135M on two cores, within 1.5 times."""
SMALL_TOKENS, SMALL_WIDTH = 256, 512
"""A matrix product of so many rows, or a model so wide, reaches half of that."""
WIRE_SHARE = 0.7
"""Of a link's rate that collectives reach."""
LAYER_OVERHEAD_S, HOOK_OVERHEAD_S = 150e-6, 200e-6
"""What Python takes to launch a layer's kernels, once forward or backward; what ZeRO-3's hooks add."""
HOST_MEMORY_RATE = 100e9
"""Bytes/s of a machine's memory, for an optimizer that runs on the host."""
NVME_RATE = 5e9
"""Bytes/s of a machine's NVMe disk, read and written."""
COLLECTIVE_OVERHEAD_S = 50e-6
"""What one more reduction takes to start."""
BYTES_A_TOKEN = 4.2
"""Of text in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """An estimate of one optimizer step. `bound` names what takes most of it."""

    step_s: float
    tokens_per_s: float
    """Over all ranks, padding included."""
    mfu: float
    """FLOPs that the model needs (recomputation not counted) over what the devices could do in the time."""
    flops_per_step: float
    bound: Bound
    steps: int | None
    """Optimizer steps of the whole run; None where the data does not tell."""
    total_s: float | None
    cost: float | None
    """Of the whole run, in the currency of the cluster's price."""


def estimate_step(recipe: Recipe, shape: ModelShape, layout: Layout, batch: BatchPlan, device: Device, trained: int) -> Speed:
    """The time of a step without its part in a whole run. `trained` counts parameters that receive gradients."""
    micro_tokens = batch.micro_batch_size * (batch.seq_len + find_target_len(recipe, shape))
    parts = _time_micro_step(recipe, shape, layout, device, micro_tokens, trained)
    accumulation = batch.gradient_accumulation_steps
    network = accumulation * parts["network"] if layout.zero_stage >= 2 else parts["network"]
    times: dict[Bound, float] = {
        "compute": accumulation * parts["compute"],
        "memory": accumulation * parts["memory"] + _time_optimizer(recipe, layout, device, trained, on_host=False),
        "network": network,
        "host": accumulation * parts["host"] + _time_optimizer(recipe, layout, device, trained, on_host=True),
        "launches": accumulation * parts["launches"],
    }
    busy = max(times["compute"] + times["memory"], times["launches"])
    # DeepSpeed overlaps communication with computation under stage 3 alone (plan/deepspeed.py).
    step_s = (max(busy, times["network"]) if layout.zero_stage == 3 else busy + times["network"]) + times["host"]
    tokens = batch.global_batch_size * (batch.seq_len + find_target_len(recipe, shape))
    needed = tokens * _flops_a_token(recipe, shape, batch.seq_len, trained)
    peak = _peak_flops(layout, device) * layout.world_size
    bound = max(times, key=lambda name: times[name])
    return Speed(step_s=step_s, tokens_per_s=tokens / step_s, mfu=needed / (peak * step_s), flops_per_step=needed, bound=bound,
                 steps=None, total_s=None, cost=None)  # fmt: skip


def estimate_run(recipe: Recipe, cluster: Cluster, speed: Speed, base_dir: str) -> Speed:
    """The step's estimate with the whole run's steps, time and cost, as far as the data tells how long it is."""
    schedule, tokens = recipe.schedule, count_tokens(recipe.data, base_dir)
    steps = schedule.max_steps
    if tokens is not None:
        a_step = recipe.batch.global_batch_size * recipe.data.seq_len
        wanted = max(1, math.ceil(schedule.epochs * tokens / a_step))
        steps = min(wanted, steps) if steps else wanted
    if steps is None:
        return speed
    total_s = steps * speed.step_s
    price = cluster.price_per_device_hour
    cost = None if price is None else price * cluster.nodes * cluster.workers_per_node * total_s / 3600
    return replace(speed, steps=steps, total_s=total_s, cost=cost)


def count_tokens(data: Data, base_dir: str) -> int | None:
    """About how many tokens an epoch has, from the size of its files; None where that does not tell (hub, compressed, columns).

    Only for packed data, whose sequences are full.
    """
    if not data.packing:
        return None
    total = 0.0
    for source in data.train:
        if source.path.startswith(HUB_SCHEME) or source.limit:
            return None
        files = find_files(source, base_dir)
        if any(path.suffix not in (".jsonl", ".json", ".csv", ".tsv") for path in files):
            return None
        total += source.weight * sum(path.stat().st_size for path in files)
    return math.ceil(total * (1 - data.eval_fraction) / BYTES_A_TOKEN)


def _memory_rate(layout: Layout, device: Device) -> float:
    return device.memory_rate * (CPU_MEMORY_SHARE if layout.accelerator == "cpu" else 1.0)


def _peak_flops(layout: Layout, device: Device) -> float:
    return device.flops_fp32 if layout.dtype == "fp32" else device.flops_16bit


@dataclass(frozen=True, slots=True)
class _Matrices:
    """Weights of linear layers: how many a token meets (the head too, of experts those it is sent to), how many bitsandbytes quantises."""

    met: int
    quantised: int


def _count_matrices(shape: ModelShape) -> _Matrices:
    config = read_text_part(shape.config)
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 1
    share = (config.get("num_experts_per_tok") or 1) / experts if experts > 1 else 1.0
    return _sum_matrices(shape.inventory, share, shape.vocab_size * shape.hidden_size if shape.tied_embeddings else 0)


@lru_cache(maxsize=64)
def _sum_matrices(inventory: Inventory, expert_share: float, tied_head: int) -> _Matrices:
    met, quantised = float(tied_head), 0
    for block in inventory:
        for weight in block.weights:
            if len(weight.shape) == 3:
                met += block.repeats * weight.count * expert_share
            elif weight.matrix:
                met += block.repeats * weight.count
                quantised += 0 if is_head(block.prefix, weight) else block.repeats * weight.count
    return _Matrices(round(met), quantised)


def find_target_len(recipe: Recipe, shape: ModelShape) -> int:
    """The longest target of an encoder-decoder's row; 0 for any other model."""
    return (recipe.data.target_len or recipe.data.seq_len) if shape.is_pair else 0


def _forward_flops(shape: ModelShape, seq_len: int, target_len: int) -> float:
    """Of one token: two a weight that it meets, and attention over half of the sequence on average; of a pair's tokens the mean."""
    if target_len:
        return _pair_flops(shape, seq_len, target_len) / (seq_len + target_len)
    return 2.0 * _count_matrices(shape).met + 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * seq_len


def _pair_flops(shape: ModelShape, source: int, target: int) -> float:
    """Of a source and its target: the encoder sees all of the source, the decoder all of it and half of its own."""
    flops, width = 0.0, shape.num_heads * shape.head_dim
    for block in shape.inventory:
        for weight in block.weights:
            tokens = source if reads_source(block.prefix + weight.name) else target
            flops += 2.0 * weight.count * block.repeats * tokens if weight.matrix else 0.0
    if shape.tied_embeddings:
        flops += 2.0 * shape.vocab_size * shape.hidden_size * target
    layers = shape.total_layers - shape.num_layers
    return flops + 4.0 * width * (shape.num_layers * source**2 + layers * (target * source + target**2 / 2))


def _flops_a_token(recipe: Recipe, shape: ModelShape, seq_len: int, trained: int) -> float:
    """Forward, the gradient of what comes in, and the gradient of the weights that are trained."""
    forward = _forward_flops(shape, seq_len, find_target_len(recipe, shape))
    return 3.0 * forward if isinstance(recipe.method, Full) else 2.0 * forward + 6.0 * trained


def _time_micro_step(recipe: Recipe, shape: ModelShape, layout: Layout, device: Device, tokens: int, trained: int) -> dict[str, float]:
    """Seconds of one forward and backward, by what they are spent on."""
    seq_len, width, ranks = recipe.data.seq_len, DTYPE_BYTES[layout.dtype], layout.world_size
    target_len = find_target_len(recipe, shape)
    learned = target_len / (seq_len + target_len) if target_len else 1.0  # of the tokens have logits
    flops = _flops_a_token(recipe, shape, seq_len, trained) + layout.gradient_checkpointing * _forward_flops(shape, seq_len, target_len)
    share = 1.0  # a CPU's rate is what its products reach
    if layout.accelerator == "cuda":
        share = MATMUL_SHARE * tokens / (tokens + SMALL_TOKENS) * shape.hidden_size / (shape.hidden_size + SMALL_WIDTH)
    passes = 3 if layout.gradient_checkpointing else 2
    # Norms, activations and residuals are read and written a few times each; logits in fp32.
    moved = (
        1.0
        * tokens
        * (shape.num_layers * passes * width * (10 * shape.hidden_size + 3 * shape.intermediate_size) + 30 * learned * shape.vocab_size)
    )
    if layout.loss == "chunked":  # its logits are made once more in the backward pass
        flops += 2.0 * shape.hidden_size * shape.vocab_size
    weights = _count_matrices(shape).quantised
    weight_bytes = float(shape.num_params * width)
    if isinstance(recipe.method, QLora):
        stored = 0.516 if recipe.method.bits == 4 else 1.0
        moved += passes * weights * (stored + 2 * width)  # dequantised anew in every pass
        weight_bytes = weights * stored + (shape.num_params - weights) * width
        share *= 1.0 if recipe.method.bits == 4 else 0.5  # LLM.int8() splits each product in two
    adapters = isinstance(recipe.method, Lora | QLora)
    launches = shape.total_layers * passes * LAYER_OVERHEAD_S * (2 if adapters else 1)
    if ranks > 1 and layout.zero_stage:
        bucket = recipe.parallel.reduce_bucket_size
        if bucket == "auto":
            raise ValueError("a step is timed of a recipe that leaves nothing to choose (launcher.plan.solve)")
        launches += trained / (bucket or max(1, trained)) * COLLECTIVE_OVERHEAD_S
    moved_to_host = 2.0 * width * shape.hidden_size * shape.num_layers * tokens if layout.checkpoints_on_host else 0.0
    host_rate = WIRE_SHARE * device.host_rate
    offload_rate = min(host_rate, NVME_RATE / layout.workers_per_node) if layout.nvme_path else host_rate
    sent = trained * width * (1.0 if layout.zero_stage >= 2 else 2.0)
    if layout.zero_stage == 2:
        sent += trained * width / 4  # updated weights are gathered once a step; an accumulation of four is usual
    if layout.zero_stage == 3:
        launches += shape.total_layers * passes * HOOK_OVERHEAD_S
        sent += 2 * weight_bytes
    rate = device.link_rate if layout.nodes == 1 else min(device.link_rate, device.network_rate)
    return {
        "compute": tokens * flops / (share * _peak_flops(layout, device)),
        "memory": moved / _memory_rate(layout, device),
        "network": sent * (ranks - 1) / ranks / (WIRE_SHARE * rate),
        "host": (2 * weight_bytes / ranks / offload_rate if layout.offload_param else 0.0) + moved_to_host / host_rate,
        "launches": launches if layout.accelerator == "cuda" else 0.0,
    }


def _time_optimizer(recipe: Recipe, layout: Layout, device: Device, trained: int, *, on_host: bool) -> float:
    """Seconds of the update: states, masters and gradients are read and written once."""
    if on_host != layout.offload_optimizer:
        return 0.0
    part = trained / (layout.world_size if layout.zero_stage else 1)
    moved = part * (14 if "8bit" in recipe.optim.name else 32)
    if not on_host:
        return moved / _memory_rate(layout, device)
    wires = part * 2 * DTYPE_BYTES[layout.dtype] / (WIRE_SHARE * device.host_rate)
    if layout.nvme_path:
        wires += moved * layout.workers_per_node / NVME_RATE
    return moved * layout.workers_per_node / HOST_MEMORY_RATE + wires
