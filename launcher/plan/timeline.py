"""The run as a stream of allocations, for the allocator's replay: load, engine start, three micro-steps with their optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from launcher.plan.gathering import gathering_step, gathers, list_visits
from launcher.plan.states import Counts, Sharding, States, count_states
from launcher.plan.step import recorded_step
from launcher.plan.workload import Workload, is_quantised

Event = tuple[str, int, int]
"""Phase, bytes (below zero: an end), key."""

ITERATIONS = 2
"""The optimizer's states are made in the first; from the second on each is like the other."""


@dataclass(slots=True)
class Story:
    """Events, in the order in which a rank makes them; `side` are those of ZeRO-3's own streams, whose memory no other stream is given."""

    events: list[Event]
    side: tuple[list[Event], ...] = ()
    next_key: int = 0

    def begin(self, phase: str, size: int) -> int:
        self.next_key += 1
        if size > 0:
            self.events.append((phase, size, self.next_key))
        return self.next_key if size > 0 else 0

    def end(self, phase: str, key: int, size: int) -> None:
        if key:
            self.events.append((phase, -size, key))

    def begin_all(self, phase: str, sizes: Iterable[int]) -> list[tuple[int, int]]:
        return [(self.begin(phase, size), size) for size in sizes]

    def end_all(self, phase: str, blocks: Iterable[tuple[int, int]]) -> None:
        for key, size in blocks:
            self.end(phase, key, size)

    def passing(self, phase: str, *sizes: int) -> None:
        """What is held together for a moment."""
        keys = [(self.begin(phase, size), size) for size in sizes]
        for key, size in reversed(keys):
            self.end(phase, key, size)

    @staticmethod
    def phase_of(name: str) -> str:
        return {"evaluation": "forward", "save": "optimizer step", "resume": "engine start"}.get(name, name)


def tell_step(work: Workload, states: States, sharding: Sharding, keeps: bool, micro_steps: int) -> Story:
    """The stream of one rank. Parameters come one by one, states flat, as DeepSpeed makes them."""
    story = Story([])
    spread, optimizer = _in_blocks(work, states, sharding)
    _load(story, work, states, sharding)
    story.passing("engine start", states.start_peak)
    story.events.append(("engine start", 0, 0))  # DeepSpeed empties the cache between groups
    story.begin("engine start", states.master)
    if states.bucket_always:
        story.begin("engine start", states.bucket)
    if sharding.stage == 3:
        story.begin("engine start", states.gradients)
    story.side = list_streams(work, sharding)
    if gathers(sharding) and not story.side:
        taped = gathering_step(work, sharding, keep_gradients=keeps, gradients_exist=keeps and micro_steps > 1)
    else:
        tape = recorded_step(work, keep_gradients=keeps, gradients_exist=keeps and micro_steps > 1)
        assert tape.events is not None
        taped = tape.events
    counts = count_states(work)
    whole_gradients, flushes = work.width * counts.trained, flushes_in_backward(counts, sharding)
    step = _make_micro_step(taped, states, story.next_key, early=sharding.stage == 1 and micro_steps > 1, flushes=flushes)
    story.next_key = step.next_key
    for iteration in range(ITERATIONS):
        held = story.begin_all("forward", spread(states.gradients)) if sharding.stage != 3 else []
        resident = states.gradients if held else 0
        story.events += step.events  # what begins in it ends before the next, so that its keys may come again
        left = story.begin_all("reduce", spread(whole_gradients)) if keeps and micro_steps == 1 else []
        story.passing("reduce", states.reduce_copy)
        story.end("reduce", step.bucket, states.bucket)
        if sharding.stage == 1:  # gradients of other ranks' parts go; stage 0's stay where they are
            story.end_all("reduce", [*held, *left])
            held, resident = story.begin_all("reduce", spread(states.part_bytes)), states.part_bytes
        elif left:
            held, resident = left, whole_gradients
        if iteration == 0:
            story.begin_all("optimizer step", optimizer)
        there = resident + (states.part_bytes if step.mine else 0)
        taken = max(0, states.step_peak - there)  # the gradients are in that peak
        story.passing("optimizer step", *(spread(taken) if sharding.stage == 0 else [taken]))
        story.end_all("optimizer step", held)
        story.end("optimizer step", step.mine, states.part_bytes)
    return story


def _in_blocks(work: Workload, states: States, sharding: Sharding) -> tuple[Callable[[int], list[int]], list[int]]:
    """How gradients come in blocks, and the optimizer's states. On a CPU, whose heap tells small blocks from large: gradients that lie in their
    parameters, and all that stage 0 has, a block a parameter; flat states in two."""
    if work.device != "cpu":
        return lambda size: [size], [states.optimizer]
    counts = count_states(work)
    trained = counts.decayed + counts.spared

    def spread(size: int) -> list[int]:
        return [size * count // sum(trained) for count in trained]

    if sharding.stage == 0:
        return spread, spread(states.optimizer)
    return spread if sharding.stage == 1 else lambda size: [size], [states.optimizer // 2] * 2


def _load(story: Story, work: Workload, states: States, sharding: Sharding) -> None:
    total = states.weights + states.adapters + states.persistent + states.quant_state
    ranks = sharding.ranks if sharding.stage == 3 else 1
    for block in work.shape.inventory:
        for _ in block.layers or (0,):
            for weight in block.weights:
                quantised = work.method.bits != 16 and is_quantised(block.prefix, weight)
                size = min(total, weight.count * (1 if work.method.bits == 8 else 0.5 if quantised else work.width) // ranks)
                story.begin("load", int(size))
                total -= int(size)
    story.begin("load", int(total))


NORM_CHUNK = 250_000_000
"""Elements of a gradient whose norm is taken at a time, in fp64 (stage3.py, _constant_buffered_norm2)."""


def list_streams(work: Workload, sharding: Sharding) -> tuple[list[Event], ...]:
    """The events of ZeRO-3's own streams: what is gathered, and what is reduced."""
    if sharding.stage != 3 or not sharding.overlap:
        return ()
    return (_fetch(work, sharding) if gathers(sharding) else [], _reduce(work, sharding))


def _fetch(work: Workload, sharding: Sharding) -> list[Event]:
    """The stream that parameters are gathered on, buffers and their copies."""
    return [("forward", size, key) for visit in list_visits(work, sharding) for size, key in visit.entering + visit.leaving]


def _reduce(work: Workload, sharding: Sharding) -> list[Event]:
    """The stream that gradients are reduced on: a bucket's copy; with offload each rank's part comes back for its norm and for its fp32 copy."""
    counts, story = count_states(work), Story([])
    trained = counts.decayed + counts.spared
    if sharding.ranks > 1 or len(trained) > 1:
        story.passing("reduce", work.width * min(sharding.bucket, max(trained, default=0)))
    for part in (-(-count // sharding.ranks) for count in reversed(trained) if sharding.offload_optimizer):
        key = story.begin("reduce", work.width * part)
        story.passing("reduce", 8 * min(part, NORM_CHUNK))
        story.passing("reduce", 4 * part)
        story.end("reduce", key, work.width * part)
    return story.events


def flushes_in_backward(counts: Counts, sharding: Sharding) -> bool:
    """Whether stage 2's bucket is reduced while the backward pass still runs: a copy of it then lies beside the activations."""
    return sharding.stage == 2 and counts.trained > sharding.bucket


@dataclass(slots=True)
class _MicroStep:
    """Its events; `bucket` and `mine` (the rank's own gradients) begin in them and end later, with these keys (0: there is none)."""

    events: list[Event]
    bucket: int
    mine: int
    next_key: int


def _make_micro_step(taped: list[Event], states: States, key: int, *, early: bool, flushes: bool) -> _MicroStep:
    """The tape of one micro-step, with the bucket that comes with the first gradient, or before where there are micro-steps before."""
    names = {"loss backward": "loss", "early backward": "backward"}
    bucket, mine, copied = key + 1, key + 2, key + 3
    events = [(names.get(phase, phase), size, number + copied) for phase, size, number in taped]
    first = next((index for index, event in enumerate(taped) if event[0] == "backward"), None)
    if first is None:
        return _MicroStep(events, 0, 0, copied + len(events))
    if flushes and states.reduce_copy:
        at = _find_top(events, first)
        events[at:at] = [("backward", states.reduce_copy, copied), ("backward", -states.reduce_copy, copied)]
    has_mine = flushes and bool(states.part_bytes)
    if has_mine:
        events.insert(first, ("backward", states.part_bytes, mine))
    has_bucket = bool(states.bucket) and not states.bucket_always
    if has_bucket:
        events.insert(0 if early else first, ("forward" if early else "backward", states.bucket, bucket))
    return _MicroStep(events, bucket if has_bucket else 0, mine if has_mine else 0, copied + len(events))


def _find_top(events: list[Event], first: int) -> int:
    """The place right after the moment in the backward pass when most is live."""
    live = most = 0
    top = first
    for index in range(first, len(events)):
        live += events[index][1]
        if live > most:
            most, top = live, index
    return top + 1
