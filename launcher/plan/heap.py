"""glibc's heap, replayed: what a CPU worker keeps of memory beyond its live tensors.

From malloc's source (glibc 2.36, malloc/malloc.c). A block of M_MMAP_THRESHOLD bytes or more, for which the heap has no place, is mapped by itself and
given back when it is freed. Smaller ones lie on one heap: the smallest hole that is large enough, otherwise the top; freed neighbours are joined,
and the top alone goes back to the system, once it is M_TRIM_THRESHOLD long. Workers set both thresholds (`choose_threshold`), because glibc's own
rule moves them with what a process has freed so far.

torch asks for places at 64 bytes (posix_memalign). glibc looks for a hole that is 96 bytes longer and gives the ends back as small pieces, where
small objects, such as the nodes of autograd's graph, settle for a while. A hole between two of them is too short for a tensor of the size that it
came from: that, and little else, is why a heap grows to several times of what a layer needs. How long a piece stays taken is the one constant here.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable
from heapq import heappop, heappush

from launcher.plan.workload import Workload
from launcher.units import MIB

LEAST_THRESHOLD, MOST_THRESHOLD = 4 * MIB, 32 * MIB
"""malloc takes no larger one than the second (DEFAULT_MMAP_THRESHOLD_MAX)."""
ALIGNMENT, HEADER, LEAST_CHUNK, PAGE, TOP_PAD = 64, 16, 32, 4096, 128 << 10
PIECES = (32, 48, 64)
PIECE_LIFE = 0.2
"""How long a piece stays taken on average: this share of a step's allocations, because graphs live from their forward pass to their backward.
Fitted on three runs that no table of results has: SmolLM2-135M, QLoRA of 256 and LoRA of 1,024 tokens, and a LoRA of 24 layers 64 wide."""


def choose_threshold(work: Workload) -> int:
    """M_MMAP_THRESHOLD for a worker: above the activations of a layer, because a mapped block costs 0.25 ms a MiB each time, which doubles or triples
    an elementwise operator; no higher than that, so that logits and flat gradients leave nothing behind."""
    widest = work.tokens * work.shape.intermediate_size * work.width
    return min(MOST_THRESHOLD, max(LEAST_THRESHOLD, 1 << widest.bit_length()))


GLOO_THREADS = 2
"""Of torch's process group over gloo, for one network interface (torch 2.13, ProcessGroupGloo.cpp)."""


GLOO_SEGMENT = MIB
"""gloo reduces in at least two segments a rank, of so many bytes at most, and receives two of them beside the tensor (gloo, allreduce.cc, ring)."""


def keep_beside(gathered_at_once: int, reduced_at_once: int, ranks: int, threshold: int) -> int:
    """What the heaps of gloo's threads keep, where there are several ranks: each gathers into memory of its own and receives what it reduces, and
    glibc gives a thread a heap of its own, whose top it keeps up to M_TRIM_THRESHOLD."""
    received = 2 * min(GLOO_SEGMENT, reduced_at_once // (2 * ranks))
    return GLOO_THREADS * min(threshold, max(gathered_at_once, received)) if ranks > 1 else 0


class _Chunk:
    __slots__ = ("after", "before", "free", "offset", "size")

    def __init__(self, offset: int, size: int, before: _Chunk | None) -> None:
        self.offset, self.size, self.before, self.free = offset, size, before, False
        self.after: _Chunk | None = None


class Heap:
    """Bytes that are live and resident, now and at most."""

    def __init__(self, threshold: int, piece_life: int = 0) -> None:
        self.threshold, self.piece_life = threshold, piece_life
        self.mapped = self.live = self.peak_live = self.peak_resident = 0
        self.end = self.top = 0
        """Where the last chunk ends, and how much lies free beyond it."""
        self.last: _Chunk | None = None
        self.holes: list[tuple[int, int, _Chunk]] = []
        self.held: dict[int, tuple[int, _Chunk | None]] = {}
        self.pieces: list[tuple[int, int, _Chunk]] = []
        self.count = 0
        self.random = random.Random(0)

    def allocate(self, key: int, size: int) -> None:
        self._free_old_pieces()
        need = max(LEAST_CHUNK, -(-(size + HEADER // 2) // HEADER) * HEADER)
        wanted = need + ALIGNMENT + LEAST_CHUNK
        index = bisect_left(self.holes, (wanted,))
        if index < len(self.holes):
            self._place(key, size, need, self.holes.pop(index)[2])
        elif wanted < self.threshold or self.top >= wanted:
            self._extend(key, size, need, wanted)
        else:
            self.hold(key, size)
        self._note()

    def hold(self, key: int, size: int) -> None:
        """A block by itself."""
        self.held[key] = (size, None)
        self.mapped += -(-size // PAGE) * PAGE
        self.live += size

    def free(self, key: int) -> None:
        size, chunk = self.held.pop(key)
        self.live -= size
        if chunk is None:
            self.mapped -= -(-size // PAGE) * PAGE
        else:
            self._free(chunk)

    def forget_peak(self) -> None:
        self.peak_resident, self.peak_live = self.mapped + self.end + self.top, self.live

    def _note(self) -> None:
        self.peak_live = max(self.peak_live, self.live)
        self.peak_resident = max(self.peak_resident, self.mapped + self.end + self.top)

    def _extend(self, key: int, size: int, need: int, wanted: int) -> None:
        if self.top < wanted:
            self.top += -(-(wanted - self.top + TOP_PAD) // PAGE) * PAGE
        chunk = _Chunk(self.end, wanted, self.last)
        if self.last is not None:
            self.last.after = chunk
        self.last, self.end, self.top = chunk, self.end + wanted, self.top - wanted
        self._place(key, size, need, chunk)

    def _place(self, key: int, size: int, need: int, chunk: _Chunk) -> None:
        """The block in this chunk: a piece before it, which is taken for a while, and a hole after it."""
        self.count += 1
        piece = self.random.choice(PIECES)
        block = self._split(chunk, piece)
        rest = self._split(block, need) if block.size - need >= LEAST_CHUNK else None
        chunk.free = block.free = False
        self.held[key] = (size, block)
        self.live += size
        heappush(self.pieces, (self.count + self.random.randrange(2 * self.piece_life + 1), self.count, chunk))
        if rest is not None:
            self._free(rest)

    def _split(self, chunk: _Chunk, size: int) -> _Chunk:
        rest = _Chunk(chunk.offset + size, chunk.size - size, chunk)
        rest.after, chunk.after, chunk.size = chunk.after, rest, size
        if rest.after is not None:
            rest.after.before = rest
        else:
            self.last = rest
        return rest

    def _free(self, chunk: _Chunk) -> None:
        for other in (chunk.after, chunk.before):
            if other is not None and other.free:
                del self.holes[bisect_left(self.holes, (other.size, other.offset))]
                chunk = self._join(*((chunk, other) if other.offset > chunk.offset else (other, chunk)))
        chunk.free = True
        if chunk.after is not None:
            insort(self.holes, (chunk.size, chunk.offset, chunk))
            return
        self.last, self.end, self.top = chunk.before, chunk.offset, self.top + chunk.size
        if self.last is not None:
            self.last.after = None
        if self.top >= self.threshold:
            self.top = TOP_PAD

    def _join(self, first: _Chunk, second: _Chunk) -> _Chunk:
        first.size += second.size
        first.after = second.after
        if first.after is not None:
            first.after.before = first
        else:
            self.last = first
        return first

    def _free_old_pieces(self) -> None:
        while self.pieces and self.pieces[0][0] <= self.count:
            self._free(heappop(self.pieces)[2])


def replay(events: Iterable[tuple[str, int, int]], threshold: int, piece_life: int = 0) -> dict[str, tuple[int, int]]:
    """Of (phase, size or -size, key) events: by phase, the most that was resident and the most that was live.

    What was made before the first forward pass lies compact: workers give loading's holes back. `piece_life` is in allocations.
    """
    heap = Heap(threshold, piece_life)
    peaks: dict[str, tuple[int, int]] = {}
    current, begun = "", False
    for phase, size, key in events:
        if phase != current:
            _note(peaks, current, heap)
            current, begun = phase, begun or phase == "forward"
            fresh = True
        if size > 0 and begun:
            heap.allocate(key, size)
        elif size > 0:
            heap.hold(key, size)
        elif size < 0:
            heap.free(key)
        if fresh:
            heap.forget_peak()
            fresh = False
    _note(peaks, current, heap)
    return peaks


def _note(peaks: dict[str, tuple[int, int]], phase: str, heap: Heap) -> None:
    if phase:
        resident, live = peaks.get(phase, (0, 0))
        peaks[phase] = (max(resident, heap.peak_resident), max(live, heap.peak_live))
