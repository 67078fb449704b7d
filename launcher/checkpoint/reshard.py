"""Reading a checkpoint at any world size or stage: which ranges of which shards hold what a rank needs."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from launcher.checkpoint.commit import Commit, load_manifest
from launcher.checkpoint.fetch import Wanted, fetch
from launcher.checkpoint.shard import DTYPE_BYTES, DamagedCheckpoint, Fragment
from launcher.checkpoint.storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Elements [start, stop) of a parameter that one shard holds."""

    rank: int
    fragment: Fragment
    start: int
    stop: int


class Reader:
    """The fragments of one committed checkpoint, by name and kind. Raises DamagedCheckpoint wherever a hash does not match."""

    def __init__(self, storage: Storage, commit: Commit) -> None:
        self.storage, self.commit = storage, commit
        self.manifests = [load_manifest(storage, commit, shard.rank) for shard in commit.shards]
        found: dict[tuple[str, str], list[Span]] = {}
        for manifest in self.manifests:
            for fragment in manifest.fragments:
                span = Span(rank=manifest.rank, fragment=fragment, start=fragment.start, stop=fragment.start + fragment.length)
                found.setdefault((fragment.name, fragment.kind), []).append(span)
        self._spans = {key: sorted(spans, key=lambda span: span.start) for key, spans in found.items()}
        self._starts = {key: [span.start for span in spans] for key, spans in self._spans.items()}
        self.kinds: dict[str, set[str]] = {}
        for name, kind in found:
            self.kinds.setdefault(name, set()).add(kind)

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        return self._spans[name, kind][0].fragment.shape

    def find_spans(self, name: str, kind: str, start: int, stop: int) -> list[Span]:
        """Who holds elements [start, stop), in order and without a gap. Raises DamagedCheckpoint where there is one."""
        spans = self._spans.get((name, kind), [])
        found, at = [], start
        for span in spans[max(0, bisect_right(self._starts.get((name, kind), []), start) - 1) :]:
            if at >= stop or span.start > at:
                break
            if span.stop > at:
                end = min(span.stop, stop)
                found.append(Span(rank=span.rank, fragment=span.fragment, start=at, stop=end))
                at = end
        if at < stop:
            raise DamagedCheckpoint(f"{self.commit.folder}: no shard holds {kind} of {name} from element {at:,} on")
        return found

    def want(self, span: Span, target: memoryview) -> Wanted:
        """A read of a span into `target`, in its fragment's dtype, for fetch()."""
        file = f"{self.commit.folder}/{self.manifests[span.rank].file}"
        return Wanted(file=file, fragment=span.fragment, start=span.start, stop=span.stop, target=target)

    def read(self, span: Span) -> memoryview:
        """The bytes of a span, in its fragment's dtype."""
        target = memoryview(bytearray((span.stop - span.start) * DTYPE_BYTES[span.fragment.dtype]))
        fetch(self.storage, [self.want(span, target)])
        return target

    def find_own(self, rank: int, name: str, kind: str) -> Span | None:
        """The fragment of that name and kind in one rank's shard, whole."""
        spans = (span for span in self._spans.get((name, kind), []) if span.rank == rank)
        return next(spans, None)
