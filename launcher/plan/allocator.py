"""PyTorch's CUDA caching allocator, replayed: what it reserves for a stream of allocations (one stream, torch 2.13).

From c10/cuda/CUDACachingAllocator.cpp: sizes are rounded up to 512 bytes; up to 1 MiB they come from segments of 2 MiB, below
10 MiB from segments of 20 MiB, else from a segment of their own, rounded up to 2 MiB. A block is split where enough is left; freed
neighbours are joined; the best fit is taken. With expandable segments a pool is one segment that grows at its end.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from launcher.units import MIB

SMALL_LIMIT, SMALL_SEGMENT, LARGE_LIMIT, LARGE_SEGMENT, ROUND_LARGE = MIB, 2 * MIB, 10 * MIB, 20 * MIB, 2 * MIB
ROUND_TO = 512


def round_up(size: int, to: int) -> int:
    return -(-size // to) * to


class _Block:
    __slots__ = ("after", "before", "free", "offset", "segment", "size")

    def __init__(self, segment: int, offset: int, size: int) -> None:
        self.segment, self.offset, self.size = segment, offset, size
        self.free = True
        self.before: _Block | None = None
        self.after: _Block | None = None


class _Pool:
    """Free blocks in the order of the search: by size, then by place."""

    __slots__ = ("free", "small", "tail")

    def __init__(self, small: bool) -> None:
        self.small = small
        self.free: list[tuple[int, int, int]] = []
        self.tail: _Block | None = None


class Allocator:
    """What is reserved and allocated, now and at most."""

    def __init__(self, *, expandable: bool, limit: int | None = None) -> None:
        self.expandable, self.limit = expandable, limit
        self.reserved = self.allocated = 0
        self.peak_reserved = self.peak_allocated = 0
        self.segments = 0
        self.pools = (_Pool(False), _Pool(True))
        self.blocks: dict[tuple[int, int], _Block] = {}
        self.held: dict[int, tuple[_Block, _Pool]] = {}

    def allocate(self, key: int, size: int) -> None:
        size = max(ROUND_TO, round_up(size, ROUND_TO))
        pool = self.pools[size <= SMALL_LIMIT]
        block = self._find(pool, size) or self._grow(pool, size)
        rest = block.size - size
        if rest >= ROUND_TO if (pool.small or self.expandable) else rest > SMALL_LIMIT:
            self._split(pool, block, size)
        block.free = False
        self.held[key] = (block, pool)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def free(self, key: int) -> None:
        block, pool = self.held.pop(key)
        self.allocated -= block.size
        block.free = True
        if block.after is not None and block.after.free:
            self._take(pool, block.after)
            self._join(pool, block, block.after)
        if block.before is not None and block.before.free:
            before = block.before
            self._take(pool, before)
            self._join(pool, before, block)
            block = before
        self._give(pool, block)

    def _find(self, pool: _Pool, size: int) -> _Block | None:
        index = bisect_left(pool.free, (size, -1, -1))
        if index == len(pool.free):
            return None
        _, segment, offset = pool.free.pop(index)
        return self.blocks[segment, offset]

    def _grow(self, pool: _Pool, size: int) -> _Block:
        if self.expandable:
            return self._extend(pool, size)
        length = SMALL_SEGMENT if pool.small else LARGE_SEGMENT if size < LARGE_LIMIT else round_up(size, ROUND_LARGE)
        if self.limit is not None and self.reserved + length > self.limit:
            self.empty_cache()  # what torch does before it gives up
        self.segments += 1
        self.reserved += length
        return self._make(self.segments, 0, length)

    def _extend(self, pool: _Pool, size: int) -> _Block:
        page = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        tail = pool.tail
        if tail is not None and tail.free:
            self._take(pool, tail)
            more = round_up(size - tail.size, page)
            tail.size += more
            self.reserved += more
            return tail
        length = round_up(size, page)
        self.reserved += length
        block = self._make(-1 if pool.small else 0, tail.offset + tail.size if tail is not None else 0, length)
        if tail is not None:
            tail.after, block.before = block, tail
        pool.tail = block
        return block

    def _make(self, segment: int, offset: int, size: int) -> _Block:
        block = _Block(segment, offset, size)
        self.blocks[segment, offset] = block
        return block

    def _split(self, pool: _Pool, block: _Block, size: int) -> None:
        rest = self._make(block.segment, block.offset + size, block.size - size)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        if pool.tail is block:
            pool.tail = rest
        self._give(pool, rest)

    def _join(self, pool: _Pool, left: _Block, right: _Block) -> None:
        left.size += right.size
        left.after = right.after
        if right.after is not None:
            right.after.before = left
        if pool.tail is right:
            pool.tail = left
        del self.blocks[right.segment, right.offset]

    def _give(self, pool: _Pool, block: _Block) -> None:
        insort(pool.free, (block.size, block.segment, block.offset))

    def _take(self, pool: _Pool, block: _Block) -> None:
        del pool.free[bisect_left(pool.free, (block.size, block.segment, block.offset))]

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache: whole free segments go back to the driver."""
        for pool in self.pools:
            for size, segment, offset in list(pool.free):
                block = self.blocks[segment, offset]
                if block.before is None and block.after is None and not self.expandable:
                    pool.free.remove((size, segment, offset))
                    del self.blocks[segment, offset]
                    self.reserved -= size


def replay(events: Iterable[tuple[str, int, int]], *, expandable: bool, limit: int | None = None) -> dict[str, tuple[int, int]]:
    """Of (phase, size or -size, key) events: by phase, the most that was reserved and the most that was allocated.

    Size 0 empties the cache. `limit` is what the device has: before it is passed, cached segments are given back.
    """
    allocator = Allocator(expandable=expandable, limit=limit)
    peaks: dict[str, tuple[int, int]] = {}
    for phase, size, key in events:
        if size > 0:
            allocator.allocate(key, size)
        elif size < 0:
            allocator.free(key)
        else:
            allocator.empty_cache()
        reserved, allocated = peaks.get(phase, (0, 0))
        if allocator.reserved > reserved or allocator.allocated > allocated:
            peaks[phase] = (max(reserved, allocator.reserved), max(allocated, allocator.allocated))
    return peaks
