"""Before any training: is each node what the plan takes it for? Nodes answer with facts; what they mean is decided here."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import BudgetError, ClusterError, DataError, LauncherError, ModelError
from launcher.plan import Plan
from launcher.units import GIB, format_bytes
from launcher.versions import read_version

SAME_EVERYWHERE = ("torch", "deepspeed", "ray", "transformers", "peft", "bitsandbytes")
MOST_SKEW_S = 30.0
"""Clocks further apart than this make timestamps, tokens and NFS leases lie."""
SCRATCH = GIB // 2
"""What Ray and the caches of a node need on its own disk, apart from what the model takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What a node says about itself."""

    host: str
    address: str
    versions: dict[str, str]
    clock: float
    scratch_free: int
    storage_free: int
    storage_error: str
    memory_available: int
    unreachable: tuple[str, ...]


def make_report(plan: Plan, nonce: str, address: str) -> NodeReport:
    """This node's facts. Leaves a file named by its host in the run's meeting folder, for the driver to find."""
    import psutil

    host = platform.node()
    storage_error, storage_free = _touch_storage(meeting_folder(plan, nonce), f"{host}-{address}")
    versions = {name: version for name in SAME_EVERYWHERE if (version := read_version(name))}
    return NodeReport(
        host=host,
        address=address,
        versions={"python": ".".join(map(str, sys.version_info[:2])), **versions},
        clock=time.time(),
        scratch_free=shutil.disk_usage(_existing(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))).free,
        storage_free=storage_free,
        storage_error=storage_error,
        memory_available=psutil.virtual_memory().available,
        unreachable=tuple(_find_unreachable(plan)),
    )


def meeting_folder(plan: Plan, nonce: str) -> Path:
    return Path(plan.run_dir) / f".preflight-{nonce}"


def _touch_storage(folder: Path, name: str) -> tuple[str, int]:
    """An error, or the free bytes, of the storage: the driver's file must be there, and ours must arrive."""
    if not (folder / "driver").is_file():
        return f"does not see what the head wrote to {folder.parent}", 0
    try:
        (folder / name).write_text("here", encoding="utf-8")
        return "", shutil.disk_usage(folder).free
    except OSError as error:
        return f"cannot write to {folder.parent}: {error.strerror}", 0


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _find_unreachable(plan: Plan) -> list[str]:
    """What of the model and the data this node does not find."""
    from launcher.data.rows import find_files
    from launcher.plan.source import locate_model

    problems = []
    try:
        locate_model(plan.recipe.model.name_or_path, plan.base_dir)
    except LauncherError as error:
        problems.append(error.message)
    for source in (*plan.recipe.data.train, *plan.recipe.data.eval):
        if source.path.startswith("hub://"):
            continue
        try:
            find_files(source, plan.base_dir)
        except LauncherError as error:
            problems.append(error.message)
    return problems


def check_reports(plan: Plan, reports: Sequence[NodeReport], arrived: set[str], now: float) -> None:
    """Raises what is wrong with the nodes, every host of a fault named. `arrived` are the files the driver sees."""
    _check_versions(reports)
    _check_storage(plan, reports, arrived)
    lost = {f"{report.host}: {problem}" for report in reports for problem in report.unreachable}
    if lost:
        raise (ModelError if any("model" in problem for problem in lost) else DataError)(
            f"not every node finds what the recipe names: {'; '.join(sorted(lost))}",
            "put it on the storage that all nodes share and name it by its full path, or beside the recipe, from where it is sent along",
        )
    _check_memory(plan, reports)
    skewed = {report.host: report.clock - now for report in reports if abs(report.clock - now) > MOST_SKEW_S}
    if skewed:
        named = ", ".join(f"{host} by {skew:+.0f} s" for host, skew in skewed.items())
        raise ClusterError(f"clocks differ from the head's: {named} (at most {MOST_SKEW_S:.0f} s)", "run chrony or ntpd on the nodes")


def _check_versions(reports: Sequence[NodeReport]) -> None:
    names = sorted({name for report in reports for name in report.versions})
    faults = []
    for name in names:
        hosts: dict[str, list[str]] = {}
        for report in reports:
            hosts.setdefault(report.versions.get(name, "none"), []).append(report.host)
        if len(hosts) > 1:
            faults.append(f"{name} is " + ", ".join(f"{version} on {', '.join(where)}" for version, where in hosts.items()))
    if faults:
        raise ClusterError("nodes differ in what they run: " + "; ".join(faults), "use one image, or install from one constraints.txt")


def _check_storage(plan: Plan, reports: Sequence[NodeReport], arrived: set[str]) -> None:
    remedy = "mount one file system at the same path on every node, and name it: ray.storage in the cluster file, or --storage"
    faults = [f"{report.host} {report.storage_error}" for report in reports if report.storage_error]
    faults += [
        f"what {report.host} wrote is not there on the head"
        for report in reports
        if not report.storage_error and f"{report.host}-{report.address}" not in arrived
    ]
    if faults:
        raise ClusterError(f"{Path(plan.run_dir).parent} is not shared by all nodes: {'; '.join(faults)}", remedy)
    needed = plan.memory.disk.run_folder_bytes
    for free, least, what in (
        *((report.storage_free, needed, f"the storage, seen from {report.host},") for report in reports[:1]),
        *((report.scratch_free, SCRATCH, f"the disk of {report.host}") for report in reports),
    ):
        if free < least:
            raise BudgetError(f"{what} has {format_bytes(free)} left, and the run needs {format_bytes(least)}", "free some space there")


def _check_memory(plan: Plan, reports: Sequence[NodeReport]) -> None:
    needed = plan.memory.host.p50
    for report in reports:
        if report.memory_available < needed:
            raise BudgetError(
                f"{report.host} has {format_bytes(report.memory_available)} of memory free, and its"
                f" {plan.layout.workers_per_node} workers need about {format_bytes(needed)}",
                "free some there, use more nodes, or a smaller batch.micro_batch_size",
            )
