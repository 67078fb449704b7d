"""A rank's part of a checkpoint: a safetensors file, and a manifest that says what each tensor in it is.

A tensor is a fragment: elements [start, start + length) of a named parameter, flattened, of one kind (the fp32
master, an optimizer state, ...). Each is hashed in chunks, so that a reader can check just the range it reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from launcher.checkpoint.storage import Storage
from launcher.errors import CheckpointError

FORMAT_VERSION = 1
CHUNK_BYTES = 4 << 20
"""A range is read and checked in whole chunks: small enough to waste little, large enough for an object store."""
BLOCK_ELEMENTS = 256
"""Elements that share a scale in an 8-bit optimizer state (bitsandbytes 0.50, optim/optimizer.py, blocksize)."""
DTYPE_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8, "F64": 8}
"""Names are safetensors'."""


class DamagedCheckpoint(CheckpointError):
    """A file is missing, cut off or changed since it was committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A fragment that is about to be written. `shape` is the whole parameter's.

    `block_offset` is the place of its first element in its 8-bit block, for states that are kept in blocks.
    """

    name: str
    kind: str
    start: int
    length: int
    shape: tuple[int, ...]
    dtype: str
    block_offset: int = 0
    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A fragment on storage: the `num_bytes` bytes at `offset` of its rank's file, hashed chunk by chunk."""

    name: str
    kind: str
    start: int
    length: int
    shape: tuple[int, ...]
    dtype: str
    block_offset: int
    offset: int
    num_bytes: int
    hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a rank wrote. `attempt` tells this save from one of the same step that a kill cut short."""

    rank: int
    attempt: str
    file: str
    num_bytes: int
    header_bytes: int
    header_hash: str
    fragments: tuple[Fragment, ...]

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, separators=(",", ":")).encode()


def manifest_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def hash_bytes(data: bytes | memoryview) -> str:
    """xxh3, 128 bits: finds any accidental change at memory speed. It is no defence against a forger."""
    return xxhash.xxh3_128_hexdigest(data)


def write_shard(storage: Storage, folder: str, rank: int, attempt: str, pieces: list[Piece]) -> Manifest:
    """Write a rank's safetensors file and then its manifest; both are durable when it returns."""
    header, offsets = _make_header(pieces)
    hashes: list[list[str]] = [[] for _ in pieces]

    def parts() -> Iterator[bytes | memoryview]:
        yield header
        for index, piece in enumerate(pieces):
            for begin in range(0, len(piece.data), CHUNK_BYTES):
                chunk = piece.data[begin : begin + CHUNK_BYTES]
                hashes[index].append(hash_bytes(chunk))
                yield chunk

    storage.write(f"{folder}/{shard_name(rank)}", parts())
    fragments = tuple(
        Fragment(name=p.name, kind=p.kind, start=p.start, length=p.length, shape=p.shape, dtype=p.dtype, block_offset=p.block_offset,
                 offset=offset, num_bytes=len(p.data), hashes=tuple(found))
        for p, offset, found in zip(pieces, offsets, hashes, strict=True)
    )  # fmt: skip
    manifest = Manifest(
        rank=rank,
        attempt=attempt,
        file=shard_name(rank),
        num_bytes=len(header) + sum(len(piece.data) for piece in pieces),
        header_bytes=len(header),
        header_hash=hash_bytes(header),
        fragments=fragments,
    )
    storage.write(f"{folder}/{manifest_name(rank)}", [manifest.to_json()])
    return manifest


def _make_header(pieces: list[Piece]) -> tuple[bytes, list[int]]:
    """The head of a safetensors file (8 bytes of length, JSON, padded to 8 bytes), and where each tensor begins in the file."""
    entries: dict[str, Any] = {}
    end = 0
    for piece in pieces:
        entries[f"{piece.kind}/{piece.name}"] = {
            "dtype": piece.dtype,
            "shape": [len(piece.data) // DTYPE_BYTES[piece.dtype]],
            "data_offsets": [end, end + len(piece.data)],
        }
        end += len(piece.data)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets, at = [], len(header)
    for piece in pieces:
        offsets.append(at)
        at += len(piece.data)
    return header, offsets


def read_manifest(data: bytes, name: str) -> Manifest:
    """The manifest in these bytes. Raises DamagedCheckpoint."""
    try:
        facts = json.loads(data)
        if facts.pop("format") != FORMAT_VERSION:
            raise CheckpointError(f"{name} has another format than {FORMAT_VERSION}", "use the version that wrote it")
        entries = facts.pop("fragments")
        fragments = tuple(Fragment(**{**entry, "shape": tuple(entry["shape"]), "hashes": tuple(entry["hashes"])}) for entry in entries)
        return Manifest(**facts, fragments=fragments)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{name} is no manifest ({type(error).__name__}: {error})") from None
