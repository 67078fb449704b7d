"""Whether a checkpoint is whole: every byte of it read and compared with its hash. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from launcher.checkpoint.commit import COMMIT, DAMAGED, Commit, list_steps, load_commit, load_manifest, step_folder
from launcher.checkpoint.fetch import check_fragments
from launcher.checkpoint.shard import DamagedCheckpoint, Manifest, hash_bytes
from launcher.checkpoint.storage import Storage

Condition = Literal["committed", "unfinished", "damaged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint as its folder shows it, nothing verified but its COMMIT. `why` says what is wrong with a damaged one."""

    step: int
    condition: Condition
    num_bytes: int
    commit: Commit | None
    why: str = ""

    def facts(self) -> dict[str, Any]:
        """For a program to read."""
        commit = self.commit
        known = {"world_size": commit.world_size, "zero_stage": commit.zero_stage, "optimizer": commit.optimizer, "time": commit.time,
                 "samples_seen": commit.state["samples_seen"], "total_steps": commit.total_steps} if commit else {}  # fmt: skip
        return {"step": self.step, "condition": self.condition, "bytes": self.num_bytes, **known, **({"why": self.why} if self.why else {})}


def list_found(storage: Storage) -> list[Found]:
    """Every checkpoint there is, oldest first: committed ones, saves that were cut short, damaged ones."""
    sizes: dict[str, int] = {}
    for name, size in storage.list().items():
        folder = name.partition("/")[0]
        sizes[folder] = sizes.get(folder, 0) + size
    return [_look(storage, step, files, sizes[step_folder(step)]) for step, files in list_steps(storage).items()]


def _look(storage: Storage, step: int, files: set[str], size: int) -> Found:
    if COMMIT in files:
        try:
            return Found(step=step, condition="committed", num_bytes=size, commit=load_commit(storage, step))
        except DamagedCheckpoint as error:
            return Found(step=step, condition="damaged", num_bytes=size, commit=None, why=error.message)
    if DAMAGED in files:
        why = json.loads(storage.read(f"{step_folder(step)}/{DAMAGED}"))["why"]
        return Found(step=step, condition="damaged", num_bytes=size, commit=None, why=why)
    return Found(step=step, condition="unfinished", num_bytes=size, commit=None)


def find_damage(storage: Storage, step: int) -> list[str]:
    """What is wrong with a checkpoint; empty where each byte is as it was written."""
    try:
        commit = load_commit(storage, step)
    except DamagedCheckpoint as error:
        return [error.message]
    damage = []
    for shard in commit.shards:
        try:
            check_shard(storage, commit.folder, load_manifest(storage, commit, shard.rank))
        except DamagedCheckpoint as error:
            damage.append(error.message)
    return damage


def check_shard(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Read a whole shard and check each byte of it. Raises DamagedCheckpoint."""
    file = f"{folder}/{manifest.file}"
    try:
        size = storage.list(folder)[file]
        header = storage.read(file, 0, manifest.header_bytes)
    except (FileNotFoundError, KeyError):
        raise DamagedCheckpoint(f"{file} is missing") from None
    if size != manifest.num_bytes:
        raise DamagedCheckpoint(f"{file} has {size:,} bytes, and {manifest.num_bytes:,} were written")
    if hash_bytes(header) != manifest.header_hash:
        raise DamagedCheckpoint(f"{file} was changed: its header does not match its hash")
    check_fragments(storage, file, manifest.fragments)
