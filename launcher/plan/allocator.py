"""PyTorch's CUDA caching allocator, replayed: what it reserves for a stream of allocations (one stream, torch 2.13).

From c10/cuda/CUDACachingAllocator.cpp: sizes are rounded up to 512 bytes; up to 1 MiB they come from segments of 2 MiB, below
10 MiB from segments of 20 MiB, else from a segment of their own, rounded up to 2 MiB. A block is split where enough is left; freed
neighbours are joined; the best fit is taken. With expandable segments a pool is one segment that grows at its end, and gives pages back within.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any

from launcher.units import MIB

SMALL_LIMIT, SMALL_SEGMENT, LARGE_LIMIT, LARGE_SEGMENT, ROUND_LARGE = MIB, 2 * MIB, 10 * MIB, 20 * MIB, 2 * MIB
ROUND_TO = 512


def round_up(size: int, to: int) -> int:
    return -(-size // to) * to


class _Block:
    __slots__ = ("after", "before", "free", "offset", "pool", "segment", "size")

    def __init__(self, pool: _Pool, segment: int, offset: int, size: int, before: Any = None, after: Any = None) -> None:
        self.pool, self.segment, self.offset, self.size = pool, segment, offset, size
        self.free = True
        self.before: Any = before
        self.after: Any = after


class _Pool:
    """Blocks of one of torch's two pools. `free` is in order of size, then place: the first that is large enough is the best fit."""

    __slots__ = ("free", "holes", "least", "small", "tail")

    def __init__(self, small: bool, expandable: bool) -> None:
        self.small = small
        self.free: list[tuple[int, int, int, _Block]] = []
        self.tail: _Block | None = None
        self.holes: list[_Block] = []
        """Of expandable segments: addresses without memory, where pages were given back."""
        self.least = ROUND_TO if small or expandable else SMALL_LIMIT + 1
        """A block is split where so much is left."""


class Allocator:
    """What is reserved and allocated, now and at most. A replay makes a hundred thousand calls: hence no helpers on its way."""

    def __init__(self, *, expandable: bool, limit: int | None = None) -> None:
        self.expandable, self.limit = expandable, limit
        self.reserved = self.allocated = 0
        self.peak_reserved = self.peak_allocated = 0
        self.segments = 0
        self.large, self.small = _Pool(False, expandable), _Pool(True, expandable)
        self.held: dict[int, _Block] = {}

    def allocate(self, key: int, size: int) -> None:
        size = -(-size // ROUND_TO) * ROUND_TO or ROUND_TO
        pool = self.small if size <= SMALL_LIMIT else self.large
        free = pool.free
        index = bisect_left(free, (size,))
        block = free.pop(index)[3] if index < len(free) else self._grow(pool, size)
        left = block.size - size
        if left >= pool.least:
            after = block.after
            rest = _Block(pool, block.segment, block.offset + size, left, block, after)
            if after is not None:
                after.before = rest
            block.after, block.size = rest, size
            if pool.tail is block:
                pool.tail = rest
            insort(free, (left, rest.segment, rest.offset, rest))
        block.free = False
        self.held[key] = block
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved

    def free(self, key: int) -> None:
        block = self.held.pop(key)
        pool, size = block.pool, block.size
        free = pool.free
        self.allocated -= size
        after, before = block.after, block.before
        if after is not None and after.free:
            del free[bisect_left(free, (after.size, after.segment, after.offset))]
            size += after.size
            block.size = size
            if pool.tail is after:
                pool.tail = block
            block.after = after = after.after
            if after is not None:
                after.before = block
        if before is not None and before.free:
            del free[bisect_left(free, (before.size, before.segment, before.offset))]
            size += before.size
            before.size = size
            if pool.tail is block:
                pool.tail = before
            before.after = after
            if after is not None:
                after.before = before
            block = before
        block.free = True
        insort(free, (size, block.segment, block.offset, block))

    def _grow(self, pool: _Pool, size: int) -> _Block:
        if self.expandable:
            return self._extend(pool, size)
        length = SMALL_SEGMENT if pool.small else LARGE_SEGMENT if size < LARGE_LIMIT else round_up(size, ROUND_LARGE)
        if self.limit is not None and self.reserved + length > self.limit:
            self.empty_cache()  # what torch does before it gives up
        self.segments += 1
        self.reserved += length
        return _Block(pool, self.segments, 0, length)

    def _extend(self, pool: _Pool, size: int) -> _Block:
        page = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        for hole in pool.holes:
            if sum(block.size for block in (hole.before, hole, hole.after) if block is hole or (block is not None and block.free)) >= size:
                return self._fill(pool, hole)
        tail = pool.tail
        if tail is not None and tail.free:
            del pool.free[bisect_left(pool.free, (tail.size, tail.segment, tail.offset))]
            more = round_up(size - tail.size, page)
            tail.size += more
            self.reserved += more
            return tail
        length = round_up(size, page)
        self.reserved += length
        block = _Block(pool, 0, tail.offset + tail.size if tail is not None else 0, length, tail)
        if tail is not None:
            tail.after = block
        pool.tail = block
        return block

    def _fill(self, pool: _Pool, hole: _Block) -> _Block:
        """A hole with its pages again, joined with what is free beside it; not among the free ones."""
        pool.holes.remove(hole)
        self.reserved += hole.size
        for beside in (hole.before, hole.after):
            if beside is not None and beside.free:
                del pool.free[bisect_left(pool.free, (beside.size, beside.segment, beside.offset))]
                hole.offset, hole.size = min(hole.offset, beside.offset), hole.size + beside.size
                self._unlink(pool, beside)
        return hole

    @staticmethod
    def _unlink(pool: _Pool, block: _Block) -> None:
        if block.before is not None:
            block.before.after = block.after
        if block.after is not None:
            block.after.before = block.before
        if pool.tail is block:
            pool.tail = block.before

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache: whole free segments go back to the driver; of expandable ones, the pages that are free from end to end."""
        for pool in (self.large, self.small):
            if self.expandable:
                for *_, block in list(pool.free):
                    self._unmap(pool, block)
                continue
            kept = [entry for entry in pool.free if entry[3].before is not None or entry[3].after is not None]
            self.reserved -= sum(entry[0] for entry in pool.free) - sum(entry[0] for entry in kept)
            pool.free[:] = kept

    def _unmap(self, pool: _Pool, block: _Block) -> None:
        """Free block: its whole pages become a hole; what is left at either end stays free."""
        page = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        begin, end = round_up(block.offset, page), (block.offset + block.size) // page * page
        if end <= begin:
            return
        self.reserved -= end - begin
        del pool.free[bisect_left(pool.free, (block.size, block.segment, block.offset))]
        if block.offset < begin:
            self._cut_off(pool, block, begin - block.offset, first=True)
        if block.offset + block.size > end:
            self._cut_off(pool, block, block.offset + block.size - end, first=False)
        block.free = False
        if block.after is None:  # nothing beyond: the segment ends before it
            self._unlink(pool, block)
        else:
            pool.holes.append(block)

    @staticmethod
    def _cut_off(pool: _Pool, block: _Block, size: int, *, first: bool) -> None:
        """Its first or last bytes as a free block of their own."""
        block.size -= size
        if first:
            rest = _Block(pool, block.segment, block.offset, size, block.before, block)
            block.offset += size
            block.before = rest
            if rest.before is not None:
                rest.before.after = rest
        else:
            rest = _Block(pool, block.segment, block.offset + block.size, size, block, block.after)
            block.after = rest
            if rest.after is not None:
                rest.after.before = rest
            if pool.tail is block:
                pool.tail = rest
        insort(pool.free, (size, rest.segment, rest.offset, rest))


def replay(
    events: Iterable[tuple[str, int, int]], *, expandable: bool, limit: int | None = None, until: int | None = None
) -> dict[str, tuple[int, int]]:
    """Of (phase, size or -size, key) events: by phase, the most that was reserved and the most that was allocated.

    Size 0 empties the cache. `limit` is what the device has: before it is passed, cached segments are given back.
    After a phase in which more is reserved than `until`, no other is replayed.
    """
    allocator = Allocator(expandable=expandable, limit=limit)
    allocate, free = allocator.allocate, allocator.free
    peaks: dict[str, tuple[int, int]] = {}
    current = ""
    for phase, size, key in events:
        if phase != current:
            _note(peaks, current, allocator)
            if until is not None and allocator.peak_reserved > until:
                return peaks
            current, began = phase, True
        if size > 0:
            allocate(key, size)
        elif size < 0:
            free(key)
        else:
            allocator.empty_cache()
        if began:  # what is left from the phase before is not this one's
            allocator.peak_reserved, allocator.peak_allocated, began = allocator.reserved, allocator.allocated, False
    _note(peaks, current, allocator)
    return peaks


def _note(peaks: dict[str, tuple[int, int]], phase: str, allocator: Allocator) -> None:
    if phase:
        reserved, allocated = peaks.get(phase, (0, 0))
        peaks[phase] = (max(reserved, allocator.peak_reserved), max(allocated, allocator.peak_allocated))
