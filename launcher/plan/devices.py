"""The devices that can be planned for without being there: a catalogue, and the cluster that a command line makes of it."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster import Cluster
from launcher.errors import ClusterError
from launcher.units import MIB

PLANNED = "planned"
"""The address of machines that are nowhere yet."""
CATALOGUE = Path(__file__).parent / "data" / "devices.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a device can do. Rates are the maker's: FLOP/s dense with fp32 accumulation, bytes/s each way."""

    name: str
    """As `--gpu` is given it."""
    smi_names: tuple[str, ...]
    """As nvidia-smi says it; a * stands for anything."""
    aliases: tuple[str, ...]
    memory: int
    """Bytes that a process sees of it."""
    bf16: bool
    flops_16bit: float
    flops_fp32: float
    memory_rate: float
    """Of its own memory."""
    link_rate: float
    """To another device of the same machine."""
    host_rate: float
    """To the memory of its machine."""
    network_rate: float
    """To another machine: its share of the network card that such machines usually have."""


def load_devices() -> dict[str, Device]:
    """The catalogue: every GPU by its name."""
    return {facts["name"]: _make_device(facts) for facts in _read_catalogue()["devices"]}


def load_cpu(cores: int, *, bf16: bool, amx: bool) -> Device:
    """So many cores of a CPU as one device; its memory is the machine's to say, and 0 here."""
    core = _read_catalogue()["cpu"]
    rates = {"tflops_fp32": core["tflops_fp32"] * cores, "tflops_16bit": core["tflops_amx" if amx else "tflops_16bit"] * cores}
    return _make_device({**core, **rates, "name": "cpu", "smi": [], "aliases": [], "memory_mib": 0, "bf16": bf16})


@functools.cache
def _read_catalogue() -> dict[str, Any]:
    catalogue: dict[str, Any] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return catalogue


def _make_device(facts: dict[str, Any]) -> Device:
    return Device(
        name=facts["name"],
        smi_names=tuple(facts["smi"]),
        aliases=tuple(facts["aliases"]),
        memory=facts["memory_mib"] * MIB,
        bf16=facts["bf16"],
        flops_16bit=facts["tflops_16bit"] * 1e12,
        flops_fp32=facts["tflops_fp32"] * 1e12,
        memory_rate=facts["hbm_gb_s"] * 1e9,
        link_rate=facts["link_gb_s"] * 1e9,
        host_rate=facts["host_gb_s"] * 1e9,
        network_rate=facts["net_gb_s"] * 1e9,
    )


def find_device(name: str) -> Device:
    """The device of a name, an alias or what nvidia-smi says. Raises ClusterError that names the nearest."""
    devices = load_devices()
    called = {_plain(known): device for device in devices.values() for known in (device.name, *device.aliases)}
    device = called.get(_plain(name)) or find_device_called(name)
    if device is not None:
        return device
    if _plain(name) == "cpu":
        raise ClusterError("--gpu cpu: a CPU is no GPU", "leave --gpu out and add --accelerator cpu, to plan for this machine's cores")
    near = list(dict.fromkeys(called[known].name for known in difflib.get_close_matches(_plain(name), called, 3, 0.5)))
    remedy = f"did you mean {' or '.join(near)}? " if near else ""
    raise ClusterError(
        f"--gpu {name}: no such device in the catalogue", f"{remedy}it has {', '.join(devices)}; for another, write a cluster file"
    )


def _plain(name: str) -> str:
    """A name without what people write differently: "RTX 4090", "rtx-4090" and "NVIDIA GeForce RTX4090" are one."""
    letters = re.sub(r"[^a-z0-9]|nvidia|geforce|tesla|amd|instinct", "", name.lower())
    return re.sub(r"(?<=\d)gb$|(?<=\d{3})g$", "", letters)  # a size; AWS' A10G is a name


def find_device_called(smi_name: str) -> Device | None:
    """The device that a driver's name means; None where the catalogue has it not."""
    return next((device for device in load_devices().values() if _is_called(device, smi_name)), None)


def _is_called(device: Device, smi_name: str) -> bool:
    return any(fnmatch.fnmatch(smi_name.lower(), known.lower()) for known in device.smi_names)


def find_device_of(cluster: Cluster) -> Device | None:
    """What a cluster computes on, with its rates; None for a GPU that the catalogue does not know."""
    if cluster.accelerator == "cpu":
        return load_cpu(max(1, cluster.cpus_per_node // cluster.workers_per_node), bf16=cluster.bf16, amx=cluster.amx)
    return find_device_called(cluster.device_name)


def make_cluster(device: Device, *, nodes: int, gpus_per_node: int) -> Cluster:
    """Machines that are not here, to plan for. What is not known of them stays unknown: cores, host memory."""
    return Cluster(
        name=f"{nodes} × {gpus_per_node} {device.name}",
        address=PLANNED,
        nodes=nodes,
        accelerator="cuda",
        device_name=device.smi_names[0].replace("*", "").strip(),
        workers_per_node=gpus_per_node,
        cpus_per_node=gpus_per_node,
        device_memory=device.memory,
        bf16=device.bf16,
    )
