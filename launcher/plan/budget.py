"""What a run needs, as values: components, phases, and the verdict against a budget. No arithmetic of models here.

Three figures are kept apart, because tools report different ones: **allocated** is what tensors take
(`torch.cuda.max_memory_allocated`), **reserved** adds what the caching allocator holds beyond that
(`max_memory_reserved`), **total** adds what the driver and NCCL hold (what nvidia-smi shows). On a CPU, total is a
process' resident memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

SCHEMA_VERSION = 1
"""Of `MemoryPlan.to_dict`. Raised when a key is renamed, removed or changes its meaning; not when one is added."""

Provenance = Literal["exact", "source", "fitted", "assumed"]
"""exact: follows from shapes, and a test compares it with tensors; source: read in a library's source; fitted: a constant
measured somewhere; assumed: a guess that is said to be one."""
FigureName = Literal["allocated", "reserved", "total"]
Verdict = Literal["FITS", "TIGHT", "DOES NOT FIT"]
VERDICTS: tuple[Verdict, ...] = ("FITS", "TIGHT", "DOES NOT FIT")
"""From good to bad."""

MARGIN = 0.03
"""A run whose P95 comes this near to the budget (as a share of it) is TIGHT."""

COMPONENTS = (
    "weights", "quantisation state", "adapters", "gathered parameters", "gradients", "fp32 master", "optimizer states", "buckets",
    "activation checkpoints", "activations", "logits and loss", "dequantisation workspace", "step workspace", "library workspace",
    "allocator slack", "CUDA context", "NCCL", "libraries", "spare workers", "checkpoint staging", "KV cache", "merge workspace",
)  # fmt: skip
"""Names a device's component may have, in the order tables and pictures show them."""
PHASES = ("load", "engine start", "forward", "loss", "backward", "reduce", "optimizer step", "evaluation", "save", "resume", "merge")
"""Names of the phases, in the order a run goes through them. A phase that a run does not have is left out."""
STEPPING = ("forward", "loss", "backward", "reduce", "optimizer step", "evaluation")
"""Phases that every step goes through, and what is measured between them."""
MERGE = "merge"
"""What `export --merge` takes where it is run. It comes after the run, and may be elsewhere: it has no part in verdict and figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of what is needed. `error` is relative: with 95 % certainty the true size is within bytes · (1 ± error).

    `counts_in` is the first of the three figures that sees it: allocator slack is in reserved and total, not in allocated.
    """

    name: str
    bytes: int
    provenance: Provenance
    error: float = 0.0
    counts_in: FigureName = "allocated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The expected bytes, and what is exceeded in one case of twenty."""

    p50: int
    p95: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What is held at the peak of one phase, by the rank that needs most (for a host: by all of a node's ranks)."""

    name: str
    components: tuple[Component, ...]

    @property
    def allocated_bytes(self) -> int:
        return self.figure("allocated").p50

    @property
    def reserved_bytes(self) -> int:
        return self.figure("reserved").p50

    @property
    def total_bytes(self) -> int:
        return self.figure("total").p50

    def without(self, name: str) -> Phase:
        return replace(self, components=tuple(part for part in self.components if part.name != name))

    def figure(self, name: FigureName) -> Figure:
        return add_up(part for part in self.components if _counts(part, name))


def add_up(components: Iterable[Component]) -> Figure:
    """Their sum, with their errors taken as independent: added in quadrature."""
    total, variance = 0, 0.0
    for part in components:
        total += part.bytes
        variance += (part.bytes * part.error) ** 2
    return Figure(p50=total, p95=total + math.ceil(math.sqrt(variance)))


def _counts(part: Component, name: FigureName) -> bool:
    return name == "total" or part.counts_in == "allocated" or part.counts_in == name


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    """Bytes on the storage that run folders are on."""

    checkpoint_bytes: int
    """One checkpoint, all ranks' shards."""
    kept_checkpoints_bytes: int
    """As many as the run keeps, and the one being written."""
    export_bytes: int
    """The exported model or adapter."""
    merged_bytes: int = 0
    """The whole model that `export --merge` writes, where it is asked for; 0 where there is nothing to merge."""
    nvme_bytes: int = 0
    """Offloaded states, on each machine's own NVMe disk."""

    @property
    def run_folder_bytes(self) -> int:
        return self.kept_checkpoints_bytes + self.export_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What each device, each host, the disk and the network need. `budget` is what a device may use."""

    phases: tuple[Phase, ...]
    host_phases: tuple[Phase, ...]
    """Of one node, all its ranks together."""
    disk: DiskNeed
    network_bytes: int
    """What a rank sends in one optimizer step."""
    budget: int
    host_budget: int | None
    """Bytes of a node's memory; None where the cluster does not tell."""
    notes: tuple[str, ...] = ()

    @property
    def decisive(self) -> Phase:
        """The phase in which the device needs most. What is reserved stays reserved: of phases that hold as much, the one that uses most."""
        return max(self.run_phases, key=lambda phase: (phase.total_bytes, phase.allocated_bytes))

    @property
    def run_phases(self) -> tuple[Phase, ...]:
        """The phases of the run itself."""
        return tuple(phase for phase in self.phases if phase.name != MERGE)

    @property
    def decisive_phase(self) -> str:
        return self.decisive.name

    @property
    def host_decisive(self) -> Phase:
        return max((phase for phase in self.host_phases if phase.name != MERGE), key=lambda phase: phase.figure("total").p95)

    def device(self, name: FigureName) -> Figure:
        """The largest of a figure over the phases: each figure may have its own peak, as torch's counters have."""
        figures = [phase.figure(name) for phase in self.run_phases]
        return Figure(p50=max(f.p50 for f in figures), p95=max(f.p95 for f in figures))

    @property
    def host(self) -> Figure:
        return self.host_decisive.figure("total")

    @property
    def verdict(self) -> Verdict:
        """At P95, of the device and of the host: the worse of the two."""
        verdicts = [judge(self.device("total"), self.budget)]
        if self.host_budget is not None:
            verdicts.append(judge(self.host, self.host_budget))
        return max(verdicts, key=VERDICTS.index)

    @property
    def without_slack(self) -> MemoryPlan:
        """What is needed were the allocator perfect: never more than what a replay of it adds to."""
        return replace(self, phases=tuple(phase.without("allocator slack") for phase in self.phases))

    def to_dict(self) -> dict[str, Any]:
        """The documented schema (docs/plan.md); from_dict gives the plan back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "decisive_phase": self.decisive_phase,
            "budget_bytes": self.budget,
            "device": {f"{name}_bytes": _figure_dict(self.device(name)) for name in ("allocated", "reserved", "total")},
            "host": {"total_bytes": self.host.p50, "total_bytes_p95": self.host.p95, "budget_bytes": self.host_budget,
                     "decisive_phase": self.host_decisive.name, "phases": [_phase_dict(phase) for phase in self.host_phases]},
            "disk": {"checkpoint_bytes": self.disk.checkpoint_bytes, "kept_checkpoints_bytes": self.disk.kept_checkpoints_bytes,
                     "export_bytes": self.disk.export_bytes, "run_folder_bytes": self.disk.run_folder_bytes,
                     "merged_bytes": self.disk.merged_bytes, "nvme_bytes": self.disk.nvme_bytes},
            "network": {"bytes_a_step_a_rank": self.network_bytes},
            "phases": [_phase_dict(phase) for phase in self.phases],
            "notes": list(self.notes),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> MemoryPlan:
        """The plan that to_dict wrote. Raises KeyError, TypeError or ValueError where it is no such thing."""
        if facts["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"memory schema {facts['schema_version']}, and this version reads {SCHEMA_VERSION}")
        disk = facts["disk"]
        return cls(
            phases=tuple(_read_phase(phase) for phase in facts["phases"]),
            host_phases=tuple(_read_phase(phase) for phase in facts["host"]["phases"]),
            disk=DiskNeed(checkpoint_bytes=disk["checkpoint_bytes"], kept_checkpoints_bytes=disk["kept_checkpoints_bytes"],
                          export_bytes=disk["export_bytes"], merged_bytes=disk.get("merged_bytes", 0), nvme_bytes=disk.get("nvme_bytes", 0)),
            network_bytes=facts["network"]["bytes_a_step_a_rank"],
            budget=facts["budget_bytes"],
            host_budget=facts["host"]["budget_bytes"],
            notes=tuple(facts["notes"]),
        )  # fmt: skip


def judge(need: Figure, budget: int) -> Verdict:
    """DOES NOT FIT where P95 is above the budget, TIGHT where it is within MARGIN of it."""
    if need.p95 > budget:
        return "DOES NOT FIT"
    return "TIGHT" if need.p95 > (1 - MARGIN) * budget else "FITS"


def _figure_dict(figure: Figure) -> dict[str, int]:
    return {"p50": figure.p50, "p95": figure.p95}


def _phase_dict(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        **{f"{name}_bytes": _figure_dict(phase.figure(name)) for name in ("allocated", "reserved", "total")},
        "components": [
            {"name": part.name, "bytes": part.bytes, "provenance": part.provenance, "error": part.error, "counts_in": part.counts_in}
            for part in phase.components
        ],
    }


def _read_phase(facts: Mapping[str, Any]) -> Phase:
    return Phase(name=facts["name"], components=tuple(Component(**part) for part in facts["components"]))
