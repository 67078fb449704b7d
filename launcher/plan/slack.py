"""What torch's allocator reserves, or glibc's heap keeps, beyond what is live: phase by phase, from the run's events."""

from __future__ import annotations

from launcher.plan.allocator import replay as replay_allocator
from launcher.plan.budget import Component, FigureName, Provenance
from launcher.plan.heap import replay as replay_heap
from launcher.plan.timeline import Event, Story

Held = list[Component]


def add_bytes(components: Held) -> int:
    return sum(component.bytes for component in components)


def part(name: str, size: int, provenance: Provenance = "exact", error: float = 0.0, counts_in: FigureName = "allocated") -> Component:
    return Component(name=name, bytes=size, provenance=provenance, error=error, counts_in=counts_in)


def make_slack(phases: dict[str, Held], story: Story | None, expandable: bool, limit: int, *, alike: bool) -> dict[str, Component]:
    """What the allocator reserves beyond what is allocated: replayed on a device of `limit` bytes, or a share where it is not.

    `alike`: the story is of the very bytes that the phases hold; otherwise the share that is reserved beyond its own is taken.
    """
    if story is None:
        return {name: part("allocator slack", int(0.06 * add_bytes(parts)), "assumed", 1.0, "reserved") for name, parts in phases.items()}
    least = max(map(add_bytes, phases.values()))
    beside = [sum(_reserve(events, mode) for events in story.side) for mode in (False, True)]
    limit -= max(beside)
    within = limit if limit > least else None  # what cannot fit shows what it would take
    native, growing = (replay_allocator(story.events, expandable=mode, limit=within) for mode in (False, True))
    chosen = growing if expandable else native
    slack: dict[str, Component] = {}
    reserved = 0
    for name, parts in phases.items():
        told = story.phase_of(name)
        reserved = chosen[told][0] if told in chosen else reserved
        aside = beside[expandable] if name not in ("load", "engine start", "resume") else 0
        held = add_bytes(parts)
        exact = alike or told not in chosen
        size = max(0, reserved + aside - held) if exact else int(held * (reserved / max(1, chosen[told][1]) - 1))
        # How far apart the allocator's two modes are says how much this depends on the order of events.
        spread = max(0.02 * reserved, abs(native[told][0] - growing[told][0] + beside[0] - beside[1]) / 2 if told in native else 0)
        if within is not None:  # near the limit torch gives cached segments back: slack alone does not pass it by more
            spread = min(spread, max(0.02 * reserved, within - reserved))
        slack[name] = part("allocator slack", size, "source", spread / size if size else 0.0, "reserved")
    return slack


def make_heap_slack(phases: dict[str, Held], story: Story, threshold: int, beside: int) -> dict[str, Component]:
    """What glibc's heap keeps in holes, replayed (heap.py), and what threads' heaps keep `beside` it. What an earlier phase left stays, so each
    has the most until then."""
    peaks = replay_heap(story.events, threshold)
    slack: dict[str, Component] = {}
    for name in phases:
        resident, live = peaks.get(story.phase_of(name), (0, 0))
        slack[name] = part("allocator slack", max(0, resident - live) + beside, "fitted", 0.5, "reserved")
    return slack


def _reserve(events: list[Event], expandable: bool) -> int:
    """What a stream of its own reserves."""
    return max((reserved for reserved, _ in replay_allocator(events, expandable=expandable).values()), default=0)
