"""glibc's heap, replayed: what a CPU worker keeps of memory beyond its live tensors.

From malloc's source (glibc 2.36, malloc/malloc.c). A block of M_MMAP_THRESHOLD bytes or more, for which the heap has no place, is mapped by itself and
given back when it is freed. Smaller ones lie on one heap: the smallest hole that is large enough, otherwise the top; freed neighbours are joined,
and the top alone goes back to the system, once it is M_TRIM_THRESHOLD long. Workers set both thresholds, for loading and anew for the steps
(`choose_threshold`), because glibc's own rule moves them with what a process has freed so far.

torch asks for places at 64 bytes (posix_memalign). glibc looks for a hole that is 96 bytes longer and gives both ends back as pieces, where small
objects settle: of each tensor one that lives as long, its version counter, and most nodes of autograd's graph, until their backward pass. A hole
between two of them is too short for a tensor of the size that it came from: that, and little else, is why a heap grows to several times of what a
layer needs. glibc's cache of a thread would keep some pieces for good, by chance: workers start without it (`ENVIRONMENT`).
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping

from launcher.plan.tape import GRAPH_OBJECT
from launcher.plan.workload import Workload
from launcher.units import MIB

LOADING_THRESHOLD = 128 << 10
"""Until the engine stands, when a block is written once: what was read, cast and sharded leaves no holes then. They would be places for a step's
blocks, also for those that are to be mapped by themselves. It is what glibc begins with (DEFAULT_MMAP_THRESHOLD_MIN)."""
LEAST_THRESHOLD, MOST_THRESHOLD = 4 * MIB, 32 * MIB
"""malloc takes no larger one than the second (DEFAULT_MMAP_THRESHOLD_MAX)."""
ALIGNMENT, HEADER, LEAST_CHUNK, PAGE, TOP_PAD = 64, 16, 32, 4096, 128 << 10
PIECES = (32, 48, 64)
PIECES_AT_HAND = 2
"""As many as a tensor leaves: the others are joined with what is free beside them, as malloc_consolidate does at the next large block. Chosen with the
rows of docs/dry-run.md in sight."""
NODES_IN_PIECES = 0.6
"""Share of the graph's nodes that settle in one: fitted on four runs that no table of results has: SmolLM2-135M, QLoRA in bf16 of 256 tokens with and
without checkpointing, LoRA in bf16 of 1,024 and in fp32 of 512 (+5, +3, -1 and -8 % with it)."""
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


def heap_environment(accelerator: str, present: Mapping[str, str]) -> dict[str, str]:
    """What a CPU worker's process is to begin with: glibc reads it then and no later. What is there already stays."""
    return {name: value for name, value in ENVIRONMENT.items() if accelerator == "cpu" and name not in present}


def choose_threshold(work: Workload) -> int:
    """M_MMAP_THRESHOLD for a worker's steps: above the activations of a layer, because a mapped block costs 0.25 ms a MiB each time, which doubles or triples
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

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold
        self.mapped = self.live = self.peak_live = self.peak_resident = 0
        self.end = self.top = 0
        """Where the last chunk ends, and how much lies free beyond it."""
        self.last: _Chunk | None = None
        self.holes: list[tuple[int, int, _Chunk]] = []
        self.held: dict[int, tuple[int, _Chunk | None]] = {}
        self.pieces: list[_Chunk] = []
        """Those that an object made now is given."""
        self.taken: dict[int, _Chunk] = {}
        self.random = random.Random(0)

    def allocate(self, key: int, size: int) -> None:
        if size == GRAPH_OBJECT:
            if self.random.random() < NODES_IN_PIECES:
                self._take_piece(key)
            return
        need = max(LEAST_CHUNK, -(-(size + HEADER // 2) // HEADER) * HEADER)
        wanted = need + ALIGNMENT + LEAST_CHUNK
        index = bisect_left(self.holes, (wanted,))
        if index < len(self.holes):
            self._place(key, size, need, self.holes.pop(index)[2])
        elif wanted < self.threshold or self.top >= wanted:
            self._extend(key, size, need, wanted)
        else:
            self.hold(key, size)
        self._take_piece(key)
        self._note()

    def hold(self, key: int, size: int) -> None:
        """A block by itself."""
        self.held[key] = (size, None)
        self.mapped += -(-size // PAGE) * PAGE
        self.live += size

    def free(self, key: int) -> None:
        if key in self.taken:
            self._leave_piece(self.taken.pop(key))
        if key not in self.held:
            return
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
        """The block in this chunk: what malloc was not asked for is a hole again, and the ends of the rest are pieces."""
        chunk.free = False
        wanted = need + ALIGNMENT + LEAST_CHUNK
        if chunk.size - wanted >= LEAST_CHUNK:
            self._free(self._split(chunk, wanted))
        block = self._split(chunk, self.random.choice(PIECES))
        self._leave_piece(chunk)
        if block.size - need >= LEAST_CHUNK:
            self._leave_piece(self._split(block, need))
        self.held[key] = (size, block)
        self.live += size

    def _leave_piece(self, piece: _Chunk) -> None:
        self.pieces.append(piece)
        if len(self.pieces) > PIECES_AT_HAND:
            self._free(self.pieces.pop(0))

    def _take_piece(self, key: int) -> None:
        if self.pieces:
            self.taken[key] = self.pieces.pop()

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


def replay(events: Iterable[tuple[str, int, int]], threshold: int) -> dict[str, tuple[int, int]]:
    """Of (phase, size or -size, key) events: by phase, the most that was resident and the most that was live.

    What was made before the first forward pass lies by itself, as workers load (`LOADING_THRESHOLD`).
    """
    heap = Heap(threshold)
    peaks: dict[str, tuple[int, int]] = {}
    current, begun = "", False
    for phase, size, key in events:
        if phase != current:
            _note(peaks, current, heap)
            current, begun = phase, begun or phase == "forward"
            fresh = True
        if size > 0 and begun:
            heap.allocate(key, size)
        elif size > GRAPH_OBJECT:
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
