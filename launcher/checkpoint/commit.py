"""What makes a checkpoint count: COMMIT.json, written last, with the hash of every rank's manifest.

    CHECKPOINTS/step-000120/rank-00003.safetensors   rank-00003.json   ...   COMMIT.json

Ranks do not talk while they write. Each writes its shard and manifest; rank 0 waits until the manifests of this
attempt are all on storage, and commits them. A reader takes the newest step whose COMMIT and shards are whole.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.checkpoint.shard import FORMAT_VERSION, DamagedCheckpoint, Manifest, hash_bytes, manifest_name, read_manifest
from launcher.checkpoint.storage import Storage
from launcher.errors import CheckpointError

COMMIT = "COMMIT.json"
DAMAGED = "DAMAGED.json"
POLL_S = (0.02, 0.5)
"""How often rank 0 looks for manifests: at first, and at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A rank's part as COMMIT knows it."""

    rank: int
    num_bytes: int
    manifest_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A whole checkpoint. `state` is the loop's, `identity` what it was made from (see identity.py),
    `scalars` what an optimizer keeps besides tensors; `best_step` is the best evaluation's, 0 for none. `base_model` is its path in the
    recipe; its revision and the hash of its files are in `identity`."""

    step: int
    world_size: int
    zero_stage: int
    attempt: str
    time: float
    plan_digest: str
    optimizer: str
    scalars: dict[str, Any]
    state: dict[str, Any]
    identity: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    total_steps: int = 0
    best_step: int = 0
    origin: str = ""
    base_model: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return step_folder(self.step)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> bytes:
        facts = {"format": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**facts, "digest": _digest(facts)}, indent=1, allow_nan=False).encode()


def _digest(facts: dict[str, Any]) -> str:
    """Of the values, not of their spelling."""
    return hash_bytes(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())


def step_folder(step: int) -> str:
    return f"step-{step:06d}"


def find_step(name: str) -> int | None:
    """The step of a folder's name, None for another folder."""
    match = re.fullmatch(r"step-(\d{6,})", name)
    return int(match[1]) if match else None


def list_steps(storage: Storage) -> dict[int, set[str]]:
    """The files in each step's folder, oldest step first: committed or not."""
    found: dict[int, set[str]] = {}
    for name in storage.list():
        folder, _, file = name.partition("/")
        step = find_step(folder)
        if step is not None and file:
            found.setdefault(step, set()).add(file)
    return dict(sorted(found.items()))


def list_committed(storage: Storage) -> list[int]:
    """Steps that have a COMMIT, oldest first."""
    return [step for step, files in list_steps(storage).items() if COMMIT in files]


def load_commit(storage: Storage, step: int) -> Commit:
    """The commit record of a step. Raises DamagedCheckpoint where it is not there or not as it was written."""
    name = f"{step_folder(step)}/{COMMIT}"
    try:
        data = storage.read(name)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{name} is missing: the save was not finished") from None
    try:
        facts = json.loads(data)
        digest, version = facts.pop("digest"), facts["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{name} is cut off or changed") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{name} has checkpoint format {version}, and this version reads {FORMAT_VERSION}", "use the version that wrote it"
        )
    # Written again it must be the same bytes: a change that JSON does not see is a change too.
    if _digest(facts) != digest or json.dumps({**facts, "digest": digest}, indent=1).encode() != data:
        raise DamagedCheckpoint(f"{name} was changed: it does not match its digest")
    del facts["format"]
    return Commit(**{**facts, "shards": tuple(ShardRecord(**shard) for shard in facts["shards"])})


def load_manifest(storage: Storage, commit: Commit, rank: int) -> Manifest:
    """A rank's manifest, checked against COMMIT. Raises DamagedCheckpoint."""
    name = f"{commit.folder}/{manifest_name(rank)}"
    try:
        data = storage.read(name)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{name} is missing") from None
    if hash_bytes(data) != commit.shards[rank].manifest_hash:
        raise DamagedCheckpoint(f"{name} was changed: it does not match its hash in {COMMIT}")
    return read_manifest(data, name)


def wait_for_manifests(
    storage: Storage, step: int, world_size: int, attempt: str, given_up: Callable[[], bool]
) -> tuple[ShardRecord, ...] | None:
    """Each rank's record, once the manifests of this attempt are all on storage; None where `given_up` says so first."""
    records: dict[int, ShardRecord] = {}
    pause = POLL_S[0]
    while True:
        for rank in range(world_size):
            if rank not in records and (record := _find_record(storage, step, rank, attempt)):
                records[rank] = record
        if len(records) == world_size:
            return tuple(records[rank] for rank in range(world_size))
        if given_up():
            return None
        time.sleep(pause)
        pause = min(2 * pause, POLL_S[1])


def _find_record(storage: Storage, step: int, rank: int, attempt: str) -> ShardRecord | None:
    name = f"{step_folder(step)}/{manifest_name(rank)}"
    try:
        data = storage.read(name)
        manifest = read_manifest(data, name)
    except (FileNotFoundError, DamagedCheckpoint):
        return None
    if manifest.attempt != attempt:
        return None  # left by a save that was cut short
    return ShardRecord(rank=rank, num_bytes=manifest.num_bytes, manifest_hash=hash_bytes(data))


def write_commit(storage: Storage, commit: Commit) -> None:
    storage.write(f"{commit.folder}/{COMMIT}", [commit.to_json()])


def mark_damaged(storage: Storage, step: int, why: str) -> None:
    """Keep a checkpoint that failed its check from being taken again, and its files for whoever looks into it."""
    storage.write(f"{step_folder(step)}/{DAMAGED}", [json.dumps({"why": why, "time": time.time()}, indent=1).encode()])
    storage.delete(f"{step_folder(step)}/{COMMIT}")


def delete_step(storage: Storage, step: int) -> None:
    """Remove a checkpoint; its COMMIT first, so that half of it never counts."""
    storage.delete(f"{step_folder(step)}/{COMMIT}")
    storage.delete(step_folder(step))


def choose_kept(steps: list[int], keep: int, best_step: int) -> set[int]:
    """Which of the committed steps stay: the newest `keep`, and the best if it is among them all."""
    return set(sorted(steps)[-keep:]) | ({best_step} & set(steps))


def prune(storage: Storage, keep: int, best_step: int = 0) -> list[int]:
    """Delete committed checkpoints that are not kept, and what was left of saves cut short before the newest. Returns their steps."""
    steps = list_steps(storage)
    committed = [step for step, files in steps.items() if COMMIT in files]
    if not committed:
        return []
    kept = choose_kept(committed, keep, best_step)
    gone = [step for step in steps if step not in kept and step < max(committed)]
    for step in gone:
        delete_step(storage, step)
    return gone
