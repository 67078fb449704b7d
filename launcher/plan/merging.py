"""What `lepton-launch export RUN --merge` takes where it is run: one process, the whole model in host memory (launcher/train/merge.py).

It comes after a run and may be done on another machine, so that it has no part in the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan.budget import MERGE, Component, Phase
from launcher.plan.host import LIBRARIES
from launcher.plan.states import Counts
from launcher.plan.workload import Workload

FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePhases:
    """The merge on the machine's device and in its host memory: one phase each, or none."""

    device: tuple[Phase, ...] = ()
    host: tuple[Phase, ...] = ()


def make_merge_phases(
    work: Workload, counts: Counts, *, libraries: int, libraries_error: float, context: int, context_error: float
) -> MergePhases:
    """A merge in the run's dtype; nothing where the method has no adapters. On a CPU the device is the host."""
    if not work.method.r:
        return MergePhases()
    # Weights come mapped from their files, and merged copies take their place, a layer at a time. peft's safe merge copies a weight, and
    # on a CPU makes the adapters' product in fp32, and that times its scale (peft 0.21, lora/layer.py).
    one = counts.largest_adapted * (work.width + 2 * FP32)
    turning = counts.largest_quantised * (2 * work.width + 1) if work.method.bits != 16 else 0
    host = _phase(
        Component(name="weights", bytes=work.width * work.shape.num_params, provenance="source", error=0.02),
        Component(name="adapters", bytes=work.width * counts.adapters, provenance="exact"),
        Component(name="merge workspace", bytes=max(one, turning if work.device == "cpu" else 0), provenance="source", error=0.3),
        Component(name=LIBRARIES, bytes=libraries, provenance="fitted", error=libraries_error, counts_in="total"),
    )
    if work.device == "cpu":
        return MergePhases(device=(host,), host=(host,))
    if not turning:
        return MergePhases(host=(host,))
    # A base that was trained quantised is quantised and unpacked on the GPU, a weight at a time.
    device = _phase(
        Component(name="merge workspace", bytes=turning, provenance="source", error=0.3),
        Component(name="CUDA context", bytes=context, provenance="assumed", error=context_error, counts_in="total"),
    )
    return MergePhases(device=(device,), host=(host,))


def _phase(*components: Component) -> Phase:
    return Phase(name=MERGE, components=tuple(part for part in components if part.bytes))
