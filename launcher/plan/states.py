"""What a rank holds besides activations: weights, gradients, masters, optimizer states, buckets, and what a step takes meanwhile.

Read in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py, runtime/fp16/unfused_optimizer.py) and
bitsandbytes 0.50.2 (functional.py, optim/optimizer.py); tests/test_states.py compares with the tensors of real engines on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from launcher.plan.inventory import Weight
from launcher.plan.shape import ModelShape, adapter_rank
from launcher.plan.workload import MethodFacts, Workload, is_quantised

QUANT_BLOCK, NESTED_BLOCK = 64, 256
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd", "lion", "lion_8bit", "adafactor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How the states lie over ranks. Buckets and thresholds are in elements, as in DeepSpeed's configuration."""

    ranks: int
    stage: int
    bucket: int
    overlap: bool
    offload_optimizer: bool
    offload_param: bool
    prefetch: int = 50_000_000
    persistence: int = 0
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    zero_init: bool = True
    leaf_modules: bool = True
    nvme: bool = False
    """Whether what is offloaded lies on disk (stage 3)."""
    efficient_linear: bool = True
    """DeepSpeed's own linear layer, whose graph does not hold a gathered weight (stage 3)."""
    forward_first: bool = False
    """Whether a run's first passes are forward passes alone (launcher/plan/coordinator.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Elements and bytes of a model under a method. `decayed` and `spared` are the two groups of trained parameters."""

    decayed: tuple[int, ...]
    spared: tuple[int, ...]
    frozen: tuple[int, ...]
    """Frozen parameters in the model's dtype."""
    packed_bytes: int
    """Quantised weights."""
    quant_state_bytes: int
    """Their scales and code tables."""
    adapters: int
    largest_quantised: int
    """Elements of the largest quantised weight."""
    largest_adapted: int
    """Elements of the largest weight that has an adapter."""

    @property
    def trained(self) -> int:
        return sum(self.decayed) + sum(self.spared)


def count_states(work: Workload) -> Counts:
    """The parameters of a model by what becomes of them."""
    return _count_states(work.shape, work.method)


@lru_cache(maxsize=256)
def _count_states(shape: ModelShape, method: MethodFacts) -> Counts:
    decayed: list[int] = []
    spared: list[int] = []
    frozen: list[int] = []
    packed = state = adapters = largest = adapted = 0
    for block in shape.inventory:
        for weight in block.weights:
            rank = adapter_rank(shape.model_type, block.prefix, weight, method.r, method.target_modules) if method.r else 0
            if rank:
                adapted = max(adapted, weight.count)
                halves = _adapter_shapes(weight, rank)
                adapters += block.repeats * sum(halves)
                decayed += list(halves) * block.repeats
                if method.dora:
                    spared += [weight.fan[1]] * block.repeats
                    adapters += weight.fan[1] * block.repeats
            if method.bits != 16 and is_quantised(block.prefix, weight):
                size, extra = quantised_bytes(weight, method)
                packed, state = packed + size * block.repeats, state + extra * block.repeats
                largest = max(largest, weight.count)
                continue
            for layer in block.layers or (0,):
                trained = method.trains_base(name := block.prefix.format(layer) + weight.name, shape.depth_of(name))
                (frozen if not trained else decayed if len(weight.shape) > 1 else spared).append(weight.count)
    return Counts(decayed=tuple(decayed), spared=tuple(spared), frozen=tuple(frozen), packed_bytes=packed, quant_state_bytes=state, adapters=adapters,
                  largest_quantised=largest, largest_adapted=adapted)  # fmt: skip


def _adapter_shapes(weight: Weight, rank: int) -> tuple[int, int]:
    """Elements of lora_A and lora_B; for fused experts of all experts together."""
    experts = weight.shape[0] if len(weight.shape) == 3 else 1
    return experts * rank * weight.shape[-1], experts * rank * weight.shape[-2]


def quantised_bytes(weight: Weight, method: MethodFacts) -> tuple[int, int]:
    """Bytes of a weight in bitsandbytes' code, and of the scales and tables beside it."""
    count = weight.count
    if method.bits == 8:
        return count, 4 * weight.fan[1]
    blocks = -(-count // QUANT_BLOCK)
    tables = 16 * 4
    if not method.double_quant:
        return -(-count // 2), blocks * 4 + tables
    nested = -(-blocks // NESTED_BLOCK)
    return -(-count // 2), blocks + nested * 4 + tables + 256 * 4 + 4


def optimizer_bytes(name: OptimizerName, momentum: bool, tensors: tuple[int, ...], *, flat: bool) -> int:
    """Bytes of the optimizer's states over these tensors; `flat`: they are partitions, one-dimensional."""
    return sum(_state_bytes(name, momentum, count) for count in tensors if count)


def _state_bytes(name: OptimizerName, momentum: bool, count: int) -> int:
    eight_bit = name.endswith("_8bit") and count >= 4096  # min_8bit_size
    moments = {"sgd": int(momentum), "lion": 1, "lion_8bit": 1, "adafactor": 1}.get(name, 2)
    if eight_bit:
        return moments * (count + -(-count // 256) * 4 + 256 * 4)
    return moments * count * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes on the device of one rank, the one with the largest part. Zero where the host holds it."""

    weights: int
    quant_state: int
    adapters: int
    persistent: int
    """ZeRO-3: small parameters that every rank holds whole."""
    master: int
    optimizer: int
    gradients: int
    """Held between micro-steps and steps."""
    bucket: int
    bucket_always: bool
    """ZeRO-3's bucket is there from the start; others come with the first gradient and go after the last."""
    partition: int
    """Elements of trained parameters this rank updates."""
    part_bytes: int
    """Gradients of that part in the model's dtype."""
    reduce_copy: int
    """Taken while a bucket is reduced."""
    start_peak: int
    """Engine start: beyond weights, quantisation state and adapters."""
    step_peak: int
    """Optimizer step: beyond what is held."""
    host: int
    """Bytes in this rank's host memory, of which `host_pinned` is pinned."""
    host_pinned: tuple[int, ...]
    nvme: int = 0
    """Bytes of this rank's files on an NVMe disk."""
    start_least: int = 0
    """The start's peak where groups are flattened in host memory: DeepSpeed does so where the device has no room for the copy."""


UPDATE: dict[OptimizerName, int] = {"adafactor": 8}
"""Bytes an element of a flat tensor that an optimizer takes for a moment (torch 2.13, optim/_adafactor.py): the gradient's square, and a copy of
the variance."""
UPDATE_ON_CPU: dict[OptimizerName, int] = UPDATE | {
    "adamw_8bit": 20,
    "paged_adamw_8bit": 20,
    "lion_8bit": 20,
    "paged_adamw": 12,
    "lion": 12,
}
"""There bitsandbytes computes in torch's operators (backends/cpu/ops.py). 8 bits: both states and the gradient in fp32, a root and its quotient;
Lion: the state, the gradient, two products and their sum. 32 bits: the gradient, and two of what its direction is made of."""


def make_states(
    counts: Counts, sharding: Sharding, *, width: int, optimizer: OptimizerName, momentum: bool, micro_steps: int, on_cpu: bool = False
) -> States:
    """States of the rank that holds most."""
    # the second micro-step is like all that follow
    return _make_states(counts, sharding, width, optimizer, momentum, min(micro_steps, 2), on_cpu)


@lru_cache(maxsize=512)
def _make_states(
    counts: Counts, sharding: Sharding, width: int, optimizer: OptimizerName, momentum: bool, micro_steps: int, on_cpu: bool
) -> States:
    maker = {0: _replicated, 1: _partitioned, 2: _partitioned, 3: _sharded}[sharding.stage]
    held = maker(counts, sharding, width, optimizer, momentum, micro_steps)
    updated = _largest_updated(counts, sharding)
    # The group's gradient in fp32; what it came from is let go after the step (stage_1_and_2.py, grads_in_partition), or in stage 3 is counted as held.
    gradients = held.step_peak if sharding.stage == 0 else 4 * updated + (width * held.partition if sharding.stage < 3 else 0)
    moment = (UPDATE_ON_CPU if on_cpu else UPDATE).get(optimizer, 0) * updated
    if sharding.offload_optimizer:  # on a CPU what is offloaded stays in the same memory
        return replace(held, optimizer=held.optimizer + held.host, host=0, host_pinned=()) if on_cpu else held
    return replace(held, step_peak=max(held.step_peak, gradients + moment))


def _largest_updated(counts: Counts, sharding: Sharding) -> int:
    """Elements of the largest tensor that the optimizer is given: a parameter, a group's part, or a sub-group's."""
    groups, ranks = (counts.decayed, counts.spared), sharding.ranks
    if sharding.stage == 0:
        return max(counts.decayed + counts.spared, default=0)
    if sharding.stage == 3:
        parts = tuple(-(-count // ranks) for count in counts.decayed + counts.spared)
        return max(_sub_groups(parts, len(counts.decayed), sharding.sub_group), default=0)
    return max((_padded(group, ranks) // ranks for group in groups), default=0)


def _padded(group: tuple[int, ...], ranks: int) -> int:
    """Elements of a flat group of stages 1 and 2."""
    return -(-sum(group) // (2 * ranks)) * 2 * ranks


REDUCED_AT_ONCE = 500_000_000
"""Gradients, in elements, that stage 0 copies into one flat tensor, on one rank too (runtime/engine.py, allreduce_bucket)."""


def _replicated(counts: Counts, sharding: Sharding, width: int, name: OptimizerName, momentum: bool, micro_steps: int) -> States:
    """Stage 0: the torch optimizer in fp32, DeepSpeed's unfused one in 16 bits, with a master of each parameter."""
    trained = counts.trained
    states = optimizer_bytes(name, momentum, counts.decayed + counts.spared, flat=False)
    master = 4 * trained if width < 4 else 0
    fp32_gradients = 4 * trained if width < 4 else 0
    gradients = width * trained
    # In 16 bits it takes one step on empty gradients when it starts (unfused_optimizer.py, initialize_optimizer_states).
    start = (master + states + fp32_gradients + gradients) if width < 4 else 0
    return States(
        weights=_frozen(counts, width) + width * (trained - counts.adapters), quant_state=counts.quant_state_bytes, adapters=width * counts.adapters,
        persistent=0, master=master, optimizer=states, gradients=gradients if micro_steps > 1 else 0, bucket=0, bucket_always=False,
        partition=trained, part_bytes=gradients, reduce_copy=width * min(trained, REDUCED_AT_ONCE), start_peak=start,
        step_peak=gradients + fp32_gradients, host=0, host_pinned=(),
    )  # fmt: skip


def _frozen(counts: Counts, width: int) -> int:
    return width * sum(counts.frozen) + counts.packed_bytes


def _partitioned(counts: Counts, sharding: Sharding, width: int, name: OptimizerName, momentum: bool, micro_steps: int) -> States:
    """Stages 1 and 2: each group of trained parameters is one flat tensor, cut into equal parts."""
    ranks = sharding.ranks
    flats = [_padded(group, ranks) for group in (counts.decayed, counts.spared) if group]
    parts = tuple(flat // ranks for flat in flats)
    part, flat, largest = sum(parts), sum(flats), max(parts, default=0)
    states = optimizer_bytes(name, momentum, parts, flat=True)
    bucket = width * sharding.bucket * (2 if sharding.overlap else 1)
    biggest = max(counts.decayed + counts.spared, default=0)
    # A group is flattened beside its parameters; its master is made from a clone; gradients of zeros are made, and dropped.
    flattened, least = width * max(flats, default=0), max(width * largest + 4 * largest, 4 * part + 4 * largest)
    if sharding.offload_optimizer:  # masters and their gradients are made on the host, from a clone of the part
        least = width * largest
    in_bucket = min(sharding.bucket, counts.trained)
    held = States(
        weights=_frozen(counts, width) + width * (flat - counts.adapters), quant_state=counts.quant_state_bytes, adapters=width * counts.adapters,
        persistent=0, master=4 * part, optimizer=states,
        gradients=(width * counts.trained if sharding.stage == 1 else width * part) if micro_steps > 1 else 0,
        bucket=bucket, bucket_always=False, partition=part, part_bytes=width * part,
        reduce_copy=width * in_bucket if ranks > 1 else 0, start_peak=max(flattened, least), start_least=least,
        # this rank's gradients, their flat copy, and that in fp32
        step_peak=width * part + width * largest + (4 * largest if width < 4 else 0), host=0, host_pinned=(),
    )  # fmt: skip
    if not sharding.offload_optimizer:
        return held
    pinned = (4 * part, width * part, 4 * part, width * biggest) + ((width * part,) if micro_steps > 1 else ())
    return _offloaded(
        held,
        width * biggest,
        4 * part + states + 4 * part + width * part + width * biggest + (width * part if micro_steps > 1 else 0),
        pinned,
    )


def _offloaded(held: States, on_device: int, host: int, pinned: tuple[int, ...]) -> States:
    """The same with masters, states and gradients in host memory."""
    return States(
        weights=held.weights, quant_state=held.quant_state, adapters=held.adapters, persistent=held.persistent, master=0, optimizer=0,
        gradients=on_device, bucket=held.bucket, bucket_always=held.bucket_always, partition=held.partition, part_bytes=0,
        reduce_copy=held.reduce_copy, start_peak=held.start_peak, step_peak=0, host=host, host_pinned=pinned, start_least=held.start_least,
    )  # fmt: skip


def _sharded(counts: Counts, sharding: Sharding, width: int, name: OptimizerName, momentum: bool, micro_steps: int) -> States:
    """Stage 3: each parameter is cut into equal parts; small ones are held whole too."""
    ranks = sharding.ranks
    trained = counts.decayed + counts.spared
    parts = tuple(-(-count // ranks) for count in trained)
    part = sum(parts)
    frozen = sum(-(-count // ranks) for count in counts.frozen)
    whole = sum(count for count in trained + counts.frozen if count <= sharding.persistence) if ranks > 1 else 0
    adapters = min(counts.adapters, counts.trained)
    adapter_part = part if adapters == counts.trained else 0
    groups = _sub_groups(parts, len(counts.decayed), sharding.sub_group)
    states = optimizer_bytes(name, momentum, groups, flat=True)
    largest = max(groups, default=0)
    bucket = width * sharding.bucket
    weights = width * frozen + -(-counts.packed_bytes // ranks) + width * (part - adapter_part)
    held = States(
        weights=0 if sharding.offload_param else weights, quant_state=counts.quant_state_bytes,
        adapters=0 if sharding.offload_param else width * adapter_part, persistent=width * whole, master=4 * part, optimizer=states,
        gradients=width * part, bucket=bucket, bucket_always=True, partition=part, part_bytes=0,
        reduce_copy=width * min(sharding.bucket, max(trained, default=0)) if ranks > 1 else 0, start_peak=4 * largest + 4 * part,
        step_peak=width * largest + (4 * largest if width < 4 else 0), host=0, host_pinned=(),
    )  # fmt: skip
    if not sharding.offload_optimizer:
        return held
    held = replace(held, start_peak=0)  # masters are made on the host
    if sharding.nvme:
        return _on_nvme(_offloaded(held, 0, 0, ()), sharding, width, largest, 8 * part + states, weights + width * adapter_part)
    host = 4 * part + 4 * part + states + width * part
    pinned: tuple[int, ...] = (4 * part, width * part)
    if sharding.offload_param:
        host += 2 * weights + 2 * width * adapter_part
        pinned += (weights + width * adapter_part, weights + width * adapter_part)
    return _offloaded(held, 0, host, pinned)


NVME_STATE_BUFFERS, NVME_WEIGHT_BUFFERS, NVME_BUFFER, NVME_IN_MEMORY = 4, 5, 100_000_000, 1_000_000_000
"""zero/offload_config.py: buffers of the optimizer's swapper, each of the largest sub-group in fp32; buffers of the parameters', and elements of
one; elements of trained weights that stay in host memory all the same."""


def _on_nvme(held: States, sharding: Sharding, width: int, largest: int, states: int, weights: int) -> States:
    """The same with masters, states and fp32 gradients in files, and weights too if they are offloaded (swap_tensor/*.py)."""
    pinned: tuple[int, ...] = (width * held.partition, *(4 * largest for _ in range(NVME_STATE_BUFFERS)))
    if sharding.offload_param:
        pinned += (width * NVME_BUFFER * NVME_WEIGHT_BUFFERS, width * min(held.partition, NVME_IN_MEMORY))
        states += weights
    return replace(held, host=sum(pinned), host_pinned=pinned, nvme=states)


def _sub_groups(parts: tuple[int, ...], first_group: int, limit: int) -> tuple[int, ...]:
    """stage3.py packs a group's parameters in order until `sub_group_size` elements (of partitions) are reached."""
    groups: list[int] = []
    for group in (parts[:first_group], parts[first_group:]):
        held = 0
        for index, count in enumerate(group):
            held += count
            if held >= limit or index == len(group) - 1:
                groups.append(held)
                held = 0
    return tuple(groups)
