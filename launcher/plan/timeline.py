"""The run as a stream of allocations, for the allocator's replay: load, engine start, three micro-steps with their optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan.gathering import gather
from launcher.plan.states import Sharding, States
from launcher.plan.step import recorded_step
from launcher.plan.workload import Workload, is_quantised

Event = tuple[str, int, int]
"""Phase, bytes (below zero: an end), key."""

ITERATIONS = 2
"""The optimizer's states are made in the first; from the second on each is like the other."""


@dataclass(slots=True)
class Story:
    """Events, in the order in which a rank makes them."""

    events: list[Event]
    next_key: int = 0

    def begin(self, phase: str, size: int) -> int:
        self.next_key += 1
        if size > 0:
            self.events.append((phase, size, self.next_key))
        return self.next_key if size > 0 else 0

    def end(self, phase: str, key: int, size: int) -> None:
        if key:
            self.events.append((phase, -size, key))

    def passing(self, phase: str, *sizes: int) -> None:
        """What is held together for a moment."""
        keys = [(self.begin(phase, size), size) for size in sizes]
        for key, size in reversed(keys):
            self.end(phase, key, size)

    @staticmethod
    def phase_of(name: str) -> str:
        return {"evaluation": "forward", "save": "optimizer step"}.get(name, name)


def tell_step(work: Workload, states: States, sharding: Sharding, keeps: bool, micro_steps: int) -> Story:
    """The stream of one rank. Parameters come one by one, states flat, as DeepSpeed makes them."""
    story = Story([])
    _load(story, work, states, sharding)
    story.passing("engine start", states.start_peak)
    story.events.append(("engine start", 0, 0))  # DeepSpeed empties the cache between groups
    story.begin("engine start", states.master)
    if states.bucket_always:
        story.begin("engine start", states.bucket)
    if sharding.stage == 3:
        story.begin("engine start", states.gradients)
    tape = recorded_step(work, keep_gradients=keeps, gradients_exist=keeps and micro_steps > 1)
    assert tape.events is not None
    whole = gather(work, sharding).backward
    computed = _make_micro_step(tape.events, states, story.next_key + 1)
    story.next_key += len(computed) + 1
    for iteration in range(ITERATIONS):
        held = story.begin("forward", states.gradients) if sharding.stage != 3 else 0
        gathered = story.begin("forward", whole)
        story.events += computed  # all that begins in it ends in it, so that its keys may come again
        story.end("reduce", gathered, whole)
        left = story.begin("reduce", states.part_bytes) if keeps else 0
        story.passing("reduce", states.reduce_copy)
        if iteration == 0:
            story.begin("optimizer step", states.optimizer)
        story.passing("optimizer step", states.step_peak)
        story.end("optimizer step", left, states.part_bytes)
        story.end("optimizer step", held, states.gradients)
    return story


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


def _make_micro_step(taped: list[Event], states: States, offset: int) -> list[Event]:
    """The tape of one micro-step, with the bucket that comes with the first gradient. Keys begin at `offset`."""
    names = {"loss backward": "loss"}
    events = [(names.get(phase, phase), size, key + offset) for phase, size, key in taped]
    first = next((index for index, event in enumerate(events) if event[0] == "backward"), None)
    if states.bucket and not states.bucket_always and first is not None:
        events.insert(first, ("backward", states.bucket, offset))
        events.append(("reduce", -states.bucket, offset))
    return events
