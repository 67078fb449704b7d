"""Cluster: what there is to run on.

`find_local_cluster` looks at this machine; `load_cluster` reads a YAML file. Neither imports torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, field_validator

from launcher.errors import ClusterError, RecipeError
from launcher.schema import Spec, check_document, load_document
from launcher.units import MIB, make_bytes

Accelerator = Literal["cpu", "cuda"]


class RayOptions(Spec):
    """How a run is placed on a Ray cluster, and how long it waits for what."""

    storage: str = ""
    """A folder that every node sees at this path (NFS, Lustre, a mounted bucket): run folders are made in it."""
    min_nodes: PositiveInt | None = None
    """Go on with as few as this many nodes when others are lost, and grow back when they return; --nodes 2..4."""
    cpus_per_worker: PositiveInt = 1
    """Cores that Ray sets aside for a worker."""
    labels: dict[str, str] = {}
    """Only nodes with these Ray labels take part (ray start --labels)."""
    secrets: tuple[str, ...] = ()
    """Names of environment variables that workers get, such as HF_TOKEN; their values are never printed nor in plan.json."""
    capacity_timeout_s: PositiveFloat = 600.0
    """How long to wait for nodes that are not there or not free."""
    stall_timeout_s: PositiveFloat | None = None
    """A group without progress for so long is hung, and restarted; left out, 20 times the usual step and at least 2 minutes."""
    stop_grace_s: PositiveFloat = 60.0
    """How long a run that is asked to stop may take to save."""
    spare_workers: bool = True
    """Keep a process a rank ready, its libraries imported, that takes over at once when a worker dies."""


class Cluster(Spec):
    """The machines of a run."""

    name: str = "local"
    """What messages call it."""
    address: str = "local"
    """local starts a Ray of the run's own on this machine; else the address of a running one."""
    nodes: PositiveInt = 1
    """How many machines take part."""
    accelerator: Accelerator = "cpu"
    """What a worker computes on."""
    device_name: str = ""
    """The devices' model, as their driver says it."""
    workers_per_node: PositiveInt = 1
    """One worker a GPU; on CPU as many as share the cores."""
    cpus_per_node: PositiveInt = 1
    """Cores of a machine."""
    device_memory: PositiveInt = 1
    """Memory of one device, as a size such as 80GiB or in bytes; on CPU a worker's share of host memory."""
    host_memory: PositiveInt = 1
    """A machine's memory, as a size such as 512GiB or in bytes."""
    bf16: bool = False
    """Whether the devices compute in bf16 natively (compute capability 8.0 and up; avx512_bf16 or amx_bf16)."""
    amx: bool = False
    """Whether CPUs multiply bf16 matrices in AMX tiles: about five times what they do in fp32."""
    price_per_device_hour: PositiveFloat | None = None
    """What one device costs an hour, in any currency: the dry run estimates the cost of a run from it."""
    ray: RayOptions = RayOptions()
    """How a run is placed on a Ray cluster."""

    @field_validator("device_memory", "host_memory", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return make_bytes(value)
        except ValueError:
            raise ValueError("should be a size with its unit, such as 80GiB, or a number of bytes") from None


def load_cluster(path: Path) -> Cluster:
    """The cluster of a YAML file. Raises RecipeError with every fault."""
    cluster, faults = check_document(Cluster, load_document(path))
    if faults or cluster is None:
        raise RecipeError(faults)
    return cluster


def locate_cluster(name: str) -> Path | None:
    """The file of --cluster: a path, or the name of one in cluster/. None for an address. Raises ClusterError."""
    if name == "auto" or "://" in name or re.fullmatch(r"[\w.\-\[\]:]+:\d+", name):
        return None
    folders = (Path("cluster"), Path(__file__).parents[1] / "cluster")
    for path in (Path(name), *(folder / f"{name}.yaml" for folder in folders)):
        if path.is_file():
            return path
    there = sorted({path.stem for folder in folders for path in folder.glob("*.yaml") if _is_cluster_file(path)})
    raise ClusterError(
        f"--cluster {name}: no such file, no cluster/{name}.yaml, and no address",
        f"name {', '.join(there)}, a file, or http://HOST:8265" if there else "name a file, or http://HOST:8265",
    )


def _is_cluster_file(path: Path) -> bool:
    """Whether a YAML file beside clusters is one: `ray up` and KubeRay have theirs there too."""
    return any(line.startswith("address:") for line in path.read_text(encoding="utf-8").splitlines())


def make_node_range(text: str) -> tuple[int, int]:
    """The bounds of --nodes: "4" → (4, 4), "2..4" → (2, 4). Raises ClusterError."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text.strip())
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ClusterError(f"--nodes {text}: a number of machines, or a range of them", "write --nodes 4, or --nodes 2..4")
    return least, most


def find_local_cluster(workers: int | None = None, accelerator: Accelerator | None = None) -> Cluster:
    """This machine: one worker a GPU, or, without one, two CPU workers that share the cores.

    Two, so that what is tried on a laptop is the distributed run. Raises ClusterError for a GPU that is not there.
    """
    gpus = [] if accelerator == "cpu" else find_gpus()
    if accelerator == "cuda" and not gpus:
        raise ClusterError(f"no GPU was found ({_why_no_gpu()})", "train on the CPU, or run lepton-launch doctor to see what is here")
    if gpus and workers and workers > len(gpus):
        raise ClusterError(
            f"{workers} workers were asked for, and there are {len(gpus)} GPUs", f"use at most {len(gpus)}, or --accelerator cpu"
        )
    cores, memory = len(os.sched_getaffinity(0)), find_host_memory()
    if gpus:
        name, device_memory, capability = gpus[0]
        return Cluster(accelerator="cuda", device_name=name, workers_per_node=workers or len(gpus), cpus_per_node=cores,
                       device_memory=device_memory, host_memory=memory, bf16=capability >= 8.0)  # fmt: skip
    workers = workers or min(2, cores)
    return Cluster(accelerator="cpu", device_name="CPU", workers_per_node=workers, cpus_per_node=cores,
                   device_memory=memory // workers, host_memory=memory, bf16=cpu_has_bf16(), amx=cpu_has_amx())  # fmt: skip


def find_gpus() -> list[tuple[str, int, float]]:
    """Name, bytes and compute capability of each GPU this process may use, as nvidia-smi tells."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return []
    gpus = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = None if visible is None else [part.strip() for part in visible.split(",") if part.strip()]
    for line in answer.stdout.splitlines():
        index, uuid, name, mebibytes, capability = (part.strip() for part in line.split(","))
        if allowed is None or index in allowed or any(uuid.startswith(part) for part in allowed):
            gpus.append((name, int(mebibytes) * MIB, float(capability)))
    return gpus


def _why_no_gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not on the PATH, so no NVIDIA driver is installed"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "nvidia-smi lists none" if visible is None else f"nvidia-smi lists none that CUDA_VISIBLE_DEVICES={visible!r} allows"


def cpu_has_bf16() -> bool:
    """Whether matrix products in bf16 have instructions of their own; without them they are slower than in fp32."""
    return bool({"avx512_bf16", "amx_bf16"} & _find_cpu_flags())


def cpu_has_amx() -> bool:
    return "amx_bf16" in _find_cpu_flags()


def _find_cpu_flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def find_host_memory() -> int:
    """Bytes of memory this machine has, or that its cgroup allows."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)
