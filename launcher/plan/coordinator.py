"""ZeRO-3's order of gathering, replayed: what a rank's modules fetch, fetch ahead and let go of, in one forward and backward pass.

From DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py, partition_parameters.py, parameter_offload.py). Each module that is entered
fetches its parameters, waits for them, and sends for those of the modules after it, parameter by parameter, until `prefetch` elements are under way;
modules without parameters of their own (peft's wrappers, the model) do so too. Several parameters come in one flat buffer and are copied out of it
when the first is waited for; the buffer goes when the last was. One parameter alone is used where it arrives. A module that is left lets go of its
parameters, but for those that a module within `max_reuse` elements needs again.

That choice is remembered by module and step (functools.lru_cache, __params_to_release) whatever the order of modules was at the time. A run whose
first passes are forward passes alone (an evaluation, or the check that packed examples are kept apart) has DeepSpeed remember the choices of those:
nothing is kept from forward to backward then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["forward", "backward"]
Module = int | Literal["root", "embedding", "norm", "head"]
"""A layer's number, or what lies outside of layers."""
MAX_LIVE = 1_000_000_000
"""Elements (stage3_max_live_parameters)."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A parameter that is gathered: its elements and bytes when it is whole."""

    elements: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a run gathers. `copies_again`: gloo gathers into a buffer of its own. `releases_all`: the first passes were forward passes alone.
    `pins_head`: torch's linear keeps the head's gathered weight for its backward pass."""

    is_cut: bool
    """Whether a parameter is in parts; otherwise it comes whole from host memory."""
    prefetch: int
    max_reuse: int
    copies_again: bool
    releases_all: bool
    pins_head: bool


@dataclass(slots=True)
class Visit:
    """A module that is entered and left, and what begins (bytes) and ends (below zero) then: (bytes, key)."""

    direction: Direction
    module: Module
    entering: list[tuple[int, int]] = field(default_factory=list)
    leaving: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Handle:
    """A gather under way: its flat buffer (0: none), gloo's copy of it (0: none), the parameters that were not waited for."""

    members: tuple[int, ...]
    size: int
    flat: int = 0
    again: int = 0
    complete: bool = False
    waiting: set[int] = field(default_factory=set)


def visit_modules(
    order: list[tuple[Direction, Module]], shards: list[Shard], members: dict[Module, list[int]], rules: Rules
) -> list[Visit]:
    """The visits of a pass once DeepSpeed knows the order of modules, from the third step on. `members`: a module's parameters, as indices."""
    forward = [visit for visit in order if visit[0] == "forward"]
    remembered = _Pass(forward, shards, members, rules, {}).run()[1] if rules.releases_all else {}
    return _Pass(order, shards, members, rules, remembered).run()[0]


class _Pass:
    def __init__(
        self, order: list[tuple[Direction, Module]], shards: list[Shard], members: dict[Module, list[int]], rules: Rules,
        remembered: dict[int, set[int]],
    ) -> None:  # fmt: skip
        self.order, self.shards, self.members, self.rules, self.remembered = order, shards, members, rules, remembered
        self.queue = deque((p, step) for step, (_, module) in enumerate(order) for p in members[module])
        self.traversed = [0]
        self.uses: dict[int, list[int]] = {}
        for step, (_, module) in enumerate(order):
            self.traversed.append(self.traversed[-1] + sum(shards[p].elements for p in members[module]))
            for p in members[module]:
                self.uses.setdefault(p, []).append(step)
        self.fetched_for: dict[int, int] = {}
        self.whole: dict[int, int] = {}
        """The key of a parameter's own bytes."""
        self.inflight: dict[int, _Handle] = {}
        self.live = self.key = 0
        self.pinned: int | None = None
        self.events: list[tuple[int, int]] = []

    def run(self) -> tuple[list[Visit], dict[int, set[int]]]:
        visits, released = [], {}
        for step, (direction, module) in enumerate(self.order):
            visit = Visit(direction, module)
            self.events = visit.entering
            self._enter(step, self.members[module])
            self.events = visit.leaving
            released[step] = self._leave(step, direction, module)
            visits.append(visit)
        self.events = visits[-1].leaving  # the rest goes before the optimizer's step (stage3.py, partition_all_parameters)
        for p in list(self.inflight):
            if p in self.inflight:
                self._wait(p)
        for p in list(self.whole):
            self._let_go(p)
        return visits, released

    def _begin(self, size: int) -> int:
        self.key += 1
        self.events.append((size, self.key))
        return self.key

    def _end(self, key: int, size: int) -> None:
        self.events.append((-size, key))

    def _enter(self, step: int, needed: list[int]) -> None:
        self._gather([p for p in needed if p not in self.whole and p not in self.inflight])
        for p in needed:
            if p in self.inflight:
                self._wait(p)
        unseen = {p for p in needed if self.fetched_for.get(p, -1) < step}
        taken: set[int] = set()
        while self.queue and len(taken) < len(unseen):
            p, used = self.queue.popleft()
            self.fetched_for[p] = used
            taken.add(p)
        ahead: list[int] = []
        elements, most = 0, min(MAX_LIVE - self.live, self.rules.prefetch)
        while self.queue and elements < most:
            p, used = self.queue.popleft()
            self.fetched_for[p] = max(used, self.fetched_for.get(p, -1))
            if p not in self.whole and p not in self.inflight and p not in ahead:
                ahead.append(p)
                elements += self.shards[p].elements
        self._gather(ahead)

    def _gather(self, wanted: list[int]) -> None:
        if not wanted:
            return
        handle = _Handle(tuple(wanted), sum(self.shards[p].size for p in wanted), waiting=set(wanted))
        self.live += sum(self.shards[p].elements for p in wanted)
        if len(wanted) > 1 and self.rules.is_cut:
            handle.flat = self._begin(handle.size)
        else:
            for p in wanted:
                self.whole[p] = self._begin(self.shards[p].size)
        if self.rules.copies_again:
            handle.again = self._begin(handle.size)
        self.inflight |= dict.fromkeys(wanted, handle)

    def _wait(self, waited: int) -> None:
        for handle in {id(h): h for h in self.inflight.values()}.values():  # gathers that were sent for are done by now, or soon
            if handle.again:
                self._end(handle.again, handle.size)
                handle.again = 0
        handle = self.inflight.pop(waited)
        if handle.flat and not handle.complete:
            for p in handle.members:
                self.whole[p] = self._begin(self.shards[p].size)
        handle.complete = True
        handle.waiting.discard(waited)
        if not handle.waiting and handle.flat:
            self._end(handle.flat, handle.size)

    def _leave(self, step: int, direction: Direction, module: Module) -> set[int]:
        kept = {p for p in self.members[module] if self.fetched_for.get(p, -1) > step + 1 or self._is_near(p, step + 1)}
        released = self.remembered.get(step, set(self.members[module]) - kept)
        if module == "embedding" and direction == "backward":  # nothing tells that its backward pass is over
            released = set()
        for p in self.members[module]:
            pins = module == "head" and direction == "forward" and self.rules.pins_head
            if p in released and p in self.whole:
                if pins:
                    self.pinned = self.whole.pop(p)
                    self.live -= self.shards[p].elements
                else:
                    self._let_go(p)
            if module == "head" and direction == "backward" and self.pinned is not None:
                self._end(self.pinned, self.shards[p].size)
                self.pinned = None
        return released

    def _is_near(self, p: int, step: int) -> bool:
        again = next((use for use in self.uses[p] if use >= step), None)
        return again is not None and self.traversed[again] - self.traversed[step] < self.rules.max_reuse

    def _let_go(self, p: int) -> None:
        self._end(self.whole.pop(p), self.shards[p].size)
        self.live -= self.shards[p].elements
