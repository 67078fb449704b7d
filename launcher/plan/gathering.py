"""ZeRO-3's gathered parameters: what a rank holds whole while it computes, and when (launcher/plan/coordinator.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from launcher.plan.coordinator import Direction, Module, Rules, Shard, Visit, visit_modules
from launcher.plan.shape import ModelShape, adapter_rank, is_head
from launcher.plan.states import Sharding, quantised_bytes
from launcher.plan.step import recorded_step
from launcher.plan.tape import Mark
from launcher.plan.workload import MethodFacts, Workload, is_quantised

Event = tuple[str, int, int]
"""Phase, bytes (below zero: an end), key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Bytes held whole in each phase: of forward and backward the least that is whole while a layer is computed, of the loss what is whole then.
    `largest` is the largest single parameter, which loading and exporting gather; `largest_layer` is what a 4-bit model's loading quantises at once.
    """

    forward: int
    loss: int
    backward: int
    most: int
    """At any moment."""
    largest: int
    largest_layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Parameters that are not whole anyway: of each layer, the head, the embedding (the same one where they are tied)."""

    shards: tuple[Shard, ...]
    layers: tuple[tuple[int, ...], ...]
    head: tuple[int, ...]
    embedding: tuple[int, ...]
    largest: int

    def size_of(self, members: Iterable[int]) -> int:
        return sum(self.shards[p].size for p in members)


def gathers(sharding: Sharding) -> bool:
    """Whether parameters are gathered at all: on one rank a part is the whole, and is used where it lies (NoGatherHandle)."""
    return sharding.stage == 3 and (sharding.ranks > 1 or sharding.offload_param)


def list_shards(work: Workload, sharding: Sharding) -> Inventory:
    return _list_shards(work.shape, work.method, work.width, sharding.persistence)


@lru_cache(maxsize=64)
def _list_shards(shape: ModelShape, method: MethodFacts, width: int, persistence: int) -> Inventory:
    """A layer's adapters come after its base: they are made later."""
    shards: list[Shard] = []
    layers: dict[tuple[bool, int], tuple[int, ...]] = {}
    head: tuple[int, ...] = ()
    embedding: tuple[int, ...] = ()

    def add(found: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        begin = len(shards)
        shards.extend(Shard(elements, size) for elements, size in found if elements > persistence)
        return tuple(range(begin, len(shards)))

    for block in shape.inventory:
        base, adapters = [], []
        for weight in block.weights:
            size, elements = width * weight.count, weight.count
            if method.bits != 16 and is_quantised(block.prefix, weight):
                size = quantised_bytes(weight, method)[0]
                elements = size if method.bits == 8 else size // width  # 4 bits are stored in the dtype of the other weights
            rank = adapter_rank(shape.model_type, block.prefix, weight, method.r, method.target_modules) if method.r else 0
            if rank:
                experts = weight.shape[0] if len(weight.shape) == 3 else 1
                adapters += [(experts * rank * n, experts * rank * n * width) for n in weight.shape[-2:][::-1]]
            if block.layers:
                base.append((elements, size))
            elif is_head(block.prefix, weight):
                head = add([(elements, size)])
            elif "embed" in weight.name or weight.name == "wte.weight" or (shape.is_pair and weight.name == "shared.weight"):
                embedding = embedding or add([(elements, size)])
        for layer in block.layers:
            layers[shape.is_pair and block.prefix.startswith("decoder."), layer] = add([*base, *adapters])
    return Inventory(shards=tuple(shards), layers=tuple(layers[key] for key in sorted(layers)), head=head or embedding, embedding=embedding,
                     largest=max((shard.size for shard in shards), default=0))  # fmt: skip


@lru_cache(maxsize=256)
def gather(work: Workload, sharding: Sharding) -> Gathered:
    """What is whole in each phase, from the visits alone; `add_gathers` is exact."""
    if sharding.stage != 3:
        return Gathered(forward=0, loss=0, backward=0, most=0, largest=0, largest_layer=0)
    inventory = list_shards(work, sharding)
    largest_layer = max((inventory.size_of(layer) for layer in inventory.layers), default=0)
    if not gathers(sharding) or not inventory.layers:
        return Gathered(forward=0, loss=0, backward=0, most=0, largest=inventory.largest, largest_layer=largest_layer)
    live = most = loss = 0
    least = {"forward": 1 << 62, "backward": 1 << 62}
    for visit in list_visits(work, sharding):
        for size, _ in visit.entering:
            live += size
            most = max(most, live)
        if isinstance(visit.module, int):
            least[visit.direction] = min(least[visit.direction], live)
        live += sum(size for size, _ in visit.leaving)
        if visit.direction == "forward":
            loss = live
    return Gathered(
        forward=least["forward"], loss=loss, backward=least["backward"], most=most, largest=inventory.largest, largest_layer=largest_layer
    )


def list_visits(work: Workload, sharding: Sharding) -> list[Visit]:
    """The modules of a micro-step in the order in which DeepSpeed sees them, each decoder layer as a whole (a leaf module)."""
    inventory = list_shards(work, sharding)
    on_cpu = work.device == "cpu"
    rules = Rules(
        is_cut=sharding.ranks > 1, prefetch=sharding.prefetch, max_reuse=sharding.max_reuse, copies_again=on_cpu and sharding.ranks > 1,
        releases_all=sharding.forward_first, pins_head=not sharding.efficient_linear and work.loss == "plain",
    )  # fmt: skip
    embeds_back = work.checkpointing != "off" or work.method.trains == "all"  # its output is asked for a gradient
    return _list_visits(inventory, 4 if work.method.r else 2, embeds_back, rules)


@lru_cache(maxsize=64)
def _list_visits(inventory: Inventory, roots: int, embeds_back: bool, rules: Rules) -> list[Visit]:
    """`roots`: the causal model and the model in it, and around them peft's two."""
    layers: list[Module] = list(range(len(inventory.layers)))
    root: list[Module] = ["root"]
    members: dict[Module, list[int]] = {number: list(layer) for number, layer in enumerate(inventory.layers)}
    members |= {"root": [], "norm": [], "head": list(inventory.head), "embedding": list(inventory.embedding)}
    forward: list[Module] = [*root * roots, "embedding", "root", *layers, "norm", "head"]  # the second root makes the tables of positions
    backward: list[Module] = [*root * (roots - 1), "head", "root", "norm", *reversed(layers)]
    if embeds_back:
        backward.append("embedding")
    order: list[tuple[Direction, Module]] = [("forward", module) for module in forward]
    order += [("backward", module) for module in backward]
    return visit_modules(order, list(inventory.shards), members, rules)


@lru_cache(maxsize=2)
def gathering_step(work: Workload, sharding: Sharding, *, keep_gradients: bool, gradients_exist: bool) -> list[Event]:
    """The events of a micro-step, with what is gathered."""
    tape = recorded_step(work, keep_gradients=keep_gradients, gradients_exist=gradients_exist)
    assert tape.events is not None
    return add_gathers(tape.events, tape.marks, list_visits(work, sharding))


def largest_at_once(work: Workload, sharding: Sharding) -> int:
    """Bytes of the largest buffer that parameters are gathered into."""
    if not gathers(sharding):
        return 0
    return max((size for visit in list_visits(work, sharding) for size, _ in visit.entering), default=0)


def add_gathers(events: Sequence[Event], marks: Sequence[Mark], visits: Sequence[Visit]) -> list[Event]:
    """A micro-step's events with what is gathered among them. A module whose place is not marked is visited with the next one that is."""
    first_key = max((key for _, _, key in events), default=0)
    places = {(mark.direction, mark.module): mark for mark in marks}
    at: dict[int, list[tuple[int, int]]] = {}
    place = 0
    unplaced: list[tuple[int, int]] = []
    for visit in visits:
        mark = places.get((visit.direction, visit.module))
        if mark is None:
            unplaced += visit.entering + visit.leaving
            continue
        place = max(place, mark.entering)
        at.setdefault(place, []).extend(unplaced + visit.entering)
        unplaced = []
        if mark.leaving is None:
            unplaced += visit.leaving
        else:
            place = max(place, mark.leaving)
            at.setdefault(place, []).extend(visit.leaving)
    at.setdefault(len(events), []).extend(unplaced)
    merged: list[Event] = []
    phase = events[0][0]
    before = 0
    for index in sorted(at):
        merged += events[before:index]
        before = index
        phase = merged[-1][0] if merged else phase
        merged += [(phase, size, first_key + key) for size, key in at[index]]
    merged += events[before:]
    return merged


def find_peaks(events: Iterable[Event]) -> dict[str, int]:
    """By phase the most that was live in it."""
    live = 0
    peaks: dict[str, int] = {}
    for phase, size, _ in events:
        live += size
        if live > peaks.get(phase, 0):
            peaks[phase] = live
    return peaks
