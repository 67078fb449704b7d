"""Host memory of a node, bytes on disk, bytes on the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.plan.budget import STEPPING, Component, DiskNeed, Phase
from launcher.plan.layout import Layout
from launcher.plan.shape import ModelShape
from launcher.plan.states import Counts, Sharding, States, optimizer_bytes, optimizer_of
from launcher.recipe import Lora, QLora, Recipe
from launcher.units import DTYPE_BYTES

LIBRARIES = "libraries"
SPARE_WORKER = 540 << 20
"""Resident memory of a process that has imported what a worker has, and holds nothing: measured on this project's CPU machine (Python 3.11,
torch 2.13, ray 2.60). 145 MiB of it are files, which processes on a node share."""


def round_pinned(size: int) -> int:
    """torch's CachingHostAllocator gives pinned memory in powers of two."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def make_staging(layout: Layout, checkpoint_bytes: int) -> Component:
    """A worker's copy of its part of a checkpoint, in host memory, kept from the first save on (train/saving.py); pinned where values come from a GPU."""
    part = -(-checkpoint_bytes // layout.world_size)
    pinned = layout.accelerator != "cpu" and not layout.offload_optimizer
    return Component(
        name="checkpoint staging", bytes=round_pinned(part) if pinned else part, provenance="source", error=0.05, counts_in="total"
    )


BESIDE_SAVE = ("forward", "loss", "backward", "reduce", "save")


def save_beside(phases: Sequence[Phase], staging: Component) -> tuple[Phase, ...]:
    """A CPU worker's phases: its copy is made, and stays, beside the next forward and backward pass."""
    most = max((phase for phase in phases if phase.name in BESIDE_SAVE), key=lambda phase: phase.total_bytes)
    return tuple(Phase(name="save", components=(*most.components, staging)) if phase.name == "save" else phase for phase in phases)


def make_host_phases(
    recipe: Recipe, shape: ModelShape, layout: Layout, states: States, counts: Counts, device: Sequence[Phase], libraries: int, error: float,
    checkpoints: int, staging: Component, spares: bool,
) -> tuple[Phase, ...]:  # fmt: skip
    """One node, all its ranks. On a CPU the device is the host: what workers hold, as many times as there are workers.

    `spares`: a process a rank stands by from the first steps on (job/driver.py), with the libraries and nothing else.
    """
    workers = layout.workers_per_node
    waiting = (Component(name="spare workers", bytes=SPARE_WORKER * workers, provenance="fitted", error=0.25),) if spares else ()
    if layout.accelerator == "cpu":
        return tuple(
            Phase(
                name=p.name,
                components=(
                    *(replace(c, bytes=c.bytes * workers) for c in p.components),
                    *(waiting if p.name in (*STEPPING, "save") else ()),
                ),
            )
            for p in device
        )
    base = Component(name=LIBRARIES, bytes=libraries * workers, provenance="fitted", error=error)
    rounded = sum(round_pinned(size) for size in states.host_pinned)
    offloaded = states.host - sum(states.host_pinned) + rounded
    held = [base, Component(name="optimizer states", bytes=offloaded * workers, provenance="source", error=0.1)]
    if checkpoints:
        held.append(Component(name="activation checkpoints", bytes=round_pinned(checkpoints) * workers, provenance="source", error=0.1))
    width = DTYPE_BYTES[layout.dtype]
    whole = shape.num_params * width
    # transformers 5: under zero.Init rank 0 reads the whole checkpoint; otherwise each rank maps the files and copies tensor by tensor.
    # A quantised model's weights stay in mapped files until each layer is quantised and sharded (train/shard.py).
    loading = whole if layout.zero_init and not isinstance(recipe.method, QLora) else 0
    adapters = isinstance(recipe.method, Lora | QLora)
    exported = counts.trained * width if adapters else whole
    staged = replace(staging, bytes=staging.bytes * workers)
    phases = {
        "load": [base, Component(name="weights", bytes=loading, provenance="source", error=0.2)],
        "optimizer step": [
            *held,
            *waiting,
            Component(name="step workspace", bytes=states.host_step * workers, provenance="source", error=0.1),
        ],
        "save": [
            *held,
            *waiting,
            staged,
            Component(name="weights", bytes=exported, provenance="source", error=0.05),
        ],
        # train/resume.py reads a rank's part of the checkpoint before it is put in its place.
        "resume": [*held, staged],
    }
    return tuple(Phase(name=name, components=tuple(c for c in parts if c.bytes)) for name, parts in phases.items())


def make_disk(recipe: Recipe, shape: ModelShape, counts: Counts, width: int, *, nvme: int = 0) -> DiskNeed:
    """A checkpoint holds the fp32 masters and the optimizer's states of what is trained; the next is written before the oldest goes."""
    states = optimizer_bytes(optimizer_of(recipe), (counts.trained,))
    checkpoint = 4 * counts.trained + states
    adapters = isinstance(recipe.method, Lora | QLora)
    return DiskNeed(checkpoint_bytes=checkpoint, kept_checkpoints_bytes=(recipe.save.keep + 1) * checkpoint,
                    export_bytes=width * (counts.trained if adapters else shape.num_params),
                    merged_bytes=width * shape.num_params if adapters else 0, nvme_bytes=nvme)  # fmt: skip


def make_network(counts: Counts, sharding: Sharding, width: int, micro_steps: int) -> int:
    """What a rank sends in an optimizer step. A ring all-reduce sends 2·(n-1)/n of its tensor, a gather or a reduce-scatter half of that."""
    ranks = sharding.ranks
    gradients = width * counts.trained
    if sharding.stage == 3:
        weights = width * (sum(counts.frozen) + counts.trained) + counts.packed_bytes
        total = micro_steps * (2 * weights + gradients)
    elif sharding.stage == 2:
        total = micro_steps * 2 * gradients + gradients
    else:
        total = 2 * gradients + (gradients if sharding.stage else 0)
    return total * (ranks - 1) // ranks
