"""Reading ranges of fragments: in whole chunks, each checked, neighbours in one request, several requests at a time. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from launcher.checkpoint.shard import CHUNK_BYTES, DTYPE_BYTES, DamagedCheckpoint, Fragment, hash_bytes
from launcher.checkpoint.storage import Storage

REQUEST_BYTES = 4 * CHUNK_BYTES
"""Neighbouring chunks are read together up to this size: an adapter's thousand small tensors are few round trips to a bucket."""
MAX_BUFFERS = 512
"""Chunks in a request: half of what one readv call takes (IOV_MAX)."""
THREADS = 8
"""Requests under way at once: what hides a bucket's latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Elements [start, stop) of a parameter, which `fragment` of `file` holds, and the bytes to put them into."""

    file: str
    fragment: Fragment
    start: int
    stop: int
    target: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """A chunk on storage; its bytes from `skip` on go into `target`, as many as that holds."""

    file: str
    offset: int
    length: int
    hash: str
    label: str
    target: memoryview
    skip: int


def fetch(storage: Storage, wanted: Iterable[Wanted]) -> None:
    """Fill every target. Raises DamagedCheckpoint where a byte differs from what was written, or is not there."""
    chunks = [chunk for one in wanted for chunk in _cut(one)]
    _read(storage, sorted(chunks, key=lambda chunk: (chunk.file, chunk.offset)))


def check_fragments(storage: Storage, file: str, fragments: Iterable[Fragment]) -> None:
    """Read fragments whole and keep nothing. Raises DamagedCheckpoint."""
    nothing = memoryview(bytearray())
    _read(
        storage,
        [
            _Chunk(file=file, offset=fragment.offset + begin, length=end - begin, hash=fragment.hashes[begin // CHUNK_BYTES],
                   label=f"{fragment.kind} of {fragment.name}", target=nothing, skip=0)
            for fragment in fragments
            for begin, end in _cut_bytes(fragment, 0, fragment.num_bytes)
        ],
    )  # fmt: skip


def _cut(wanted: Wanted) -> Iterator[_Chunk]:
    fragment = wanted.fragment
    size = DTYPE_BYTES[fragment.dtype]
    first, last = (wanted.start - fragment.start) * size, (wanted.stop - fragment.start) * size
    for begin, end in _cut_bytes(fragment, first, last):
        target = wanted.target[max(begin, first) - first : min(end, last) - first]
        yield _Chunk(file=wanted.file, offset=fragment.offset + begin, length=end - begin, hash=fragment.hashes[begin // CHUNK_BYTES],
                     label=f"{fragment.kind} of {fragment.name}", target=target, skip=max(first - begin, 0))  # fmt: skip


def _cut_bytes(fragment: Fragment, first: int, last: int) -> Iterator[tuple[int, int]]:
    """The chunks, begin and end, that hold bytes [first, last) of a fragment."""
    for begin in range(first // CHUNK_BYTES * CHUNK_BYTES, last, CHUNK_BYTES):
        yield begin, min(begin + CHUNK_BYTES, fragment.num_bytes)


def _read(storage: Storage, chunks: list[_Chunk]) -> None:
    requests = list(_join(chunks))
    if len(requests) == 1:
        _read_request(storage, requests[0])
        return
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read") as pool:
        readings = [pool.submit(_read_request, storage, request) for request in requests]
        try:
            for reading in readings:
                reading.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # one damaged chunk is enough
            raise


def _join(chunks: list[_Chunk]) -> Iterator[list[_Chunk]]:
    """Runs of chunks that lie one after the other in a file."""
    run: list[_Chunk] = []
    for chunk in chunks:
        follows = run and chunk.file == run[-1].file and chunk.offset == run[-1].offset + run[-1].length
        if run and not (follows and chunk.offset + chunk.length - run[0].offset <= REQUEST_BYTES and len(run) < MAX_BUFFERS):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


def _read_request(storage: Storage, chunks: list[_Chunk]) -> None:
    """Straight into the targets; a chunk of which only a part is wanted goes by way of a buffer."""
    buffers = [chunk.target if len(chunk.target) == chunk.length else memoryview(bytearray(chunk.length)) for chunk in chunks]
    try:
        left = storage.read_into(chunks[0].file, chunks[0].offset, buffers)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{chunks[0].file} is missing") from None
    for chunk, buffer in zip(chunks, buffers, strict=True):
        left -= chunk.length
        if left < 0 or hash_bytes(buffer) != chunk.hash:
            raise DamagedCheckpoint(f"{chunk.file} was changed or cut off: {chunk.label} does not match its hash")
        if buffer is not chunk.target:
            chunk.target[:] = buffer[chunk.skip : chunk.skip + len(chunk.target)]
