"""What torch's allocator reserves, or glibc's heap keeps, beyond what is live: phase by phase, from the run's events."""

from __future__ import annotations

from functools import lru_cache

from launcher.plan.allocator import replay as replay_allocator
from launcher.plan.budget import Component, FigureName, Provenance
from launcher.plan.heap import replay as replay_heap
from launcher.plan.timeline import Event, Story

Held = list[Component]


def add_bytes(components: Held) -> int:
    return sum(component.bytes for component in components)


def part(name: str, size: int, provenance: Provenance = "exact", error: float = 0.0, counts_in: FigureName = "allocated") -> Component:
    return Component(name=name, bytes=size, provenance=provenance, error=error, counts_in=counts_in)


def make_slack(
    phases: dict[str, Held], story: Story | None, expandable: bool, limit: int, *, alike: bool, until: int | None = None
) -> dict[str, Component]:
    """What the allocator reserves beyond what is allocated: replayed on a device of `limit` bytes, or a share where it is not.

    `alike`: the story is of the very bytes that the phases hold; otherwise the share that is reserved beyond its own is taken.
    The replay ends where more is reserved than `until`: then all that is told is at least as much.
    """
    if story is None:
        return {name: part("allocator slack", int(0.06 * add_bytes(parts)), "assumed", 1.0, "reserved") for name, parts in phases.items()}
    least = max(map(add_bytes, phases.values()))
    beside = [reserve_beside(story.side, mode) for mode in (False, True)]
    limit -= max(beside)
    within = limit if limit > least else None  # what cannot fit shows what it would take
    until = None if until is None else until - beside[expandable]
    chosen = replay_allocator(story.events, expandable=expandable, limit=within, until=until)
    passed = until is not None and max(most for most, _ in chosen.values()) > until
    other = chosen if passed else replay_allocator(story.events, expandable=not expandable, limit=within)
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
        apart = chosen[told][0] - other[told][0] + beside[expandable] - beside[not expandable] if told in chosen else 0
        spread = max(0.02 * reserved, abs(apart) / 2)
        if within is not None:  # near the limit torch gives cached segments back: slack alone does not pass it by more
            spread = min(spread, max(0.02 * reserved, within - reserved))
        slack[name] = part("allocator slack", size, "source", spread / size if size else 0.0, "reserved")
    return slack


def bound_slack(phases: dict[str, Held], streams: tuple[list[Event], ...], expandable: bool) -> dict[str, Component]:
    """What a replay finds at least: in a micro-step, that ZeRO-3's own streams reserve more than is gathered just then."""
    beside = reserve_beside(streams, expandable)

    def least(name: str, parts: Held) -> int:
        gathered = sum(component.bytes for component in parts if component.name == "gathered parameters")
        return max(0, beside - gathered) if name in ("forward", "loss", "backward") else 0

    return {name: part("allocator slack", least(name, parts), "source", counts_in="reserved") for name, parts in phases.items()}


def make_heap_slack(phases: dict[str, Held], story: Story, threshold: int, beside: int) -> dict[str, Component]:
    """What glibc's heap keeps in holes, replayed (heap.py), and what threads' heaps keep `beside` it. What an earlier phase left stays, so each
    has the most until then."""
    peaks = replay_heap(story.events, threshold)
    slack: dict[str, Component] = {}
    for name in phases:
        resident, live = peaks.get(story.phase_of(name), (0, 0))
        slack[name] = part("allocator slack", max(0, resident - live) + beside, "fitted", 0.5, "reserved")
    return slack


def reserve_beside(streams: tuple[list[Event], ...], expandable: bool) -> int:
    return sum(_reserve(tuple(events), expandable) for events in streams)


@lru_cache(maxsize=8)
def _reserve(events: tuple[Event, ...], expandable: bool) -> int:
    """What a stream of its own reserves: the same in most of a search's candidates."""
    return max((reserved for reserved, _ in replay_allocator(events, expandable=expandable).values()), default=0)
