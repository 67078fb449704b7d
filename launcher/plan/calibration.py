"""What `lepton-launch calibrate` measured on this machine, and a memory plan with it in place of what is assumed.

It is kept in $XDG_CONFIG_HOME/lepton-launch/calibration.json: one entry a device, by the name that the driver gives it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.cluster import Cluster
from launcher.errors import DataError
from launcher.plan.budget import Component, MemoryPlan, Phase
from launcher.plan.devices import Device, find_device_of
from launcher.units import format_bytes

SCHEMA_VERSION = 1
ERROR = 0.05
"""Relative, of a constant measured on this machine: what two runs of calibrate differ by, rounded up."""
REPLACED = ("libraries", "CUDA context", "NCCL", "library workspace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A device's constants: bytes by component, rates by name (flops_16bit, flops_fp32, memory_rate), of a CPU those of one core."""

    device: str
    measured_at: str
    versions: dict[str, str]
    bytes: dict[str, int]
    rates: dict[str, float]
    slack: float | None
    """Resident memory beyond live tensors, as a share of these (CPU); None where it was not measured."""


def calibration_path() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lepton-launch" / "calibration.json"


def load_calibrations() -> dict[str, Calibration]:
    """What has been measured here, by device; empty where nothing was. Raises DataError for a damaged file."""
    path = calibration_path()
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["schema_version"] != SCHEMA_VERSION:
            return {}
        return {name: Calibration(**entry) for name, entry in facts["devices"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "delete it, or run lepton-launch calibrate again") from None


def save_calibration(calibration: Calibration) -> Path:
    """Keep it beside those of other devices; where it was written."""
    path = calibration_path()
    devices = {name: asdict(entry) for name, entry in load_calibrations().items()} | {calibration.device: asdict(calibration)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "devices": devices}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def find_calibration(cluster: Cluster) -> Calibration | None:
    """The one of a cluster's devices. Those of a CPU are this machine's alone, and so hold for a local run only."""
    if cluster.accelerator == "cpu" and cluster.address != "local":
        return None
    return load_calibrations().get(cluster.device_name or "CPU")


def apply_calibration(memory: MemoryPlan, calibration: Calibration, ranks_per_node: int) -> MemoryPlan:
    """The plan with measured constants. Components that the plan does not have are not added."""
    host = {name: size * ranks_per_node for name, size in calibration.bytes.items()}
    phases = tuple(_apply_to(phase, calibration.bytes, calibration.slack) for phase in memory.phases)
    host_phases = tuple(_apply_to(phase, host, calibration.slack) for phase in memory.host_phases)
    if (phases, host_phases) == (memory.phases, memory.host_phases):
        return memory
    names = [name for name in calibration.bytes if any(part.name == name for phase in memory.phases for part in phase.components)]
    told = ", ".join(f"{name} {format_bytes(calibration.bytes[name])}" for name in names)
    note = f"measured on this machine by lepton-launch calibrate ({calibration.measured_at}): {told or 'allocator slack'}"
    return replace(memory, phases=phases, host_phases=host_phases, notes=(*memory.notes, note))


def _apply_to(phase: Phase, sizes: Mapping[str, int], slack: float | None) -> Phase:
    tensors = sum(part.bytes for part in phase.components if part.counts_in == "allocated" and part.name not in REPLACED)

    def measured(part: Component) -> Component:
        if part.name in REPLACED and part.name in sizes:
            return replace(part, bytes=sizes[part.name], provenance="fitted", error=ERROR)
        if part.name == "allocator slack" and slack is not None and part.provenance == "assumed":  # a replay knows more than a share
            return replace(part, bytes=int(slack * tensors), provenance="fitted", error=0.5)
        return part

    return replace(phase, components=tuple(measured(part) for part in phase.components))


def find_rates(cluster: Cluster) -> Device | None:
    """What a cluster computes on, with the rates measured here in place of the catalogue's; None for an unknown GPU."""
    device, calibration = find_device_of(cluster), find_calibration(cluster)
    if device is None or calibration is None:
        return device
    cores = max(1, cluster.cpus_per_node // cluster.workers_per_node) if cluster.accelerator == "cpu" else 1
    measured: dict[str, Any] = {name: rate * cores for name, rate in calibration.rates.items()}
    return replace(device, **measured)
