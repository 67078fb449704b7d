"""The cheapest changes that make a recipe fit which does not, and how many machines would do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.cluster import Cluster
from launcher.plan.batch import BatchPlan, list_divisors
from launcher.plan.devices import Device
from launcher.plan.layout import Layout, make_layout
from launcher.plan.shape import ModelShape
from launcher.plan.solve import (
    Changes,
    Floor,
    Predict,
    apply_changes,
    find_fitting,
    is_possible,
    list_quantised,
    make_candidates,
    make_micro_batch,
)
from launcher.plan.speed import estimate_step
from launcher.recipe import Lora, QLora, Recipe

ENOUGH_SUGGESTIONS = 5
MOST_CONFIRMED = 12
"""Changes that are computed exactly; a search for advice may not take longer than the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change that makes it fit: recipe keys (and `--nodes`), and what it costs."""

    changes: Changes
    step_s: float
    slowdown: float
    """Times as long for as many tokens as the recipe as it is would take, were there room for it."""
    need: int
    """Bytes of a device at P95."""
    effect: str
    """What it changes about the result; empty where only time is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One thing that may be given up. `grade` orders by what it does to the result: 0 nothing, 1 precision, 2 what is trained."""

    changes: Changes
    grade: int
    effect: str = ""


def _list_steps(recipe: Recipe, layout: Layout) -> list[list[_Step]]:
    """Ways to need less, the ones that exclude each other in one list, the mildest first."""
    stage, method, optim = layout.zero_stage, recipe.method, recipe.optim.name
    lists: list[list[_Step]] = []
    checkpointing: list[bool | str] = [] if layout.gradient_checkpointing else [True]
    if layout.accelerator == "cuda" and not layout.checkpoints_on_host:
        checkpointing.append("offload")
    lists.append([_Step(changes={"memory.gradient_checkpointing": how}, grade=0) for how in checkpointing])
    if layout.loss == "plain":
        lists.append([_Step(changes={"model.loss": "chunked"}, grade=0)])
    micro = recipe.batch.micro_batch_size
    smaller = [] if micro == "auto" else list_divisors(micro)[:-1]  # what the plan chooses anew needs no advice
    lists.append([_Step(changes={"batch.micro_batch_size": size}, grade=0) for size in dict.fromkeys(smaller[-1:] + smaller[:1])])
    if recipe.evaluate.micro_batch_size not in ("auto", 1):
        lists.append([_Step(changes={"evaluate.micro_batch_size": size}, grade=0) for size in ("auto", 1)])
    parallel = [_Step(changes={"parallel.zero_stage": s}, grade=0) for s in (1, 2, 3) if s > stage and layout.world_size > 1]
    if not layout.offload_optimizer and optim in ("adamw", "sgd", "adafactor"):
        parallel += [_Step(changes={"parallel.zero_stage": s, "parallel.offload_optimizer": True}, grade=0) for s in (max(stage, 2), 3)]
    if not layout.offload_param:
        also = {"parallel.offload_optimizer": True} if optim in ("adamw", "sgd", "adafactor") else {}
        parallel.append(_Step(changes={"parallel.zero_stage": 3, "parallel.offload_param": True, **also}, grade=0))
    lists.append(parallel)
    if optim in ("adamw", "lion"):
        lists.append([_Step(changes={"optim.name": f"{optim}_8bit"}, grade=1, effect="optimizer states in 8 bits")])
    lists.append(list(_lighter_methods(method)))
    if recipe.data.seq_len >= 512:
        halves = [recipe.data.seq_len // by for by in (2, 4, 8) if recipe.data.seq_len // by >= 256]
        lists.append([_Step(changes={"data.seq_len": length}, grade=2, effect="shorter sequences") for length in halves])
    return [steps for steps in lists if steps]


def _lighter_methods(method: Any) -> Iterator[_Step]:
    if isinstance(method, Lora):
        if method.init == "default":
            *_, in_4_bits = list_quantised(method)
            yield _Step(changes={"method": in_4_bits}, grade=1, effect="the base in 4 bits")
        return
    if isinstance(method, QLora):
        if method.bits == 8:
            yield _Step(changes={"method": method.model_copy(update={"bits": 4})}, grade=1, effect="the base in 4 bits")
        return
    yield _Step(changes={"method": Lora(kind="lora")}, grade=2, effect="adapters in place of weights are trained")
    yield _Step(changes={"method": QLora(kind="qlora")}, grade=2, effect="adapters on a 4-bit base are trained")


def suggest_changes(
    recipe: Recipe,
    batch: BatchPlan,
    shape: ModelShape,
    cluster: Cluster,
    device: Device | None,
    trained_of: Callable[[Recipe], int],
    budget: int,
    floor: Floor,
    predict: Predict,
    bound: Predict,
    confirm: Predict,
) -> list[Suggestion]:
    """The cheapest changes that make a recipe fit, best first; none where nothing does. `batch` is what it was planned with.

    First what leaves the result as it is, then what costs precision, then what trains something else, by their speed.
    A change is left out where a part of it, or a milder one, would do, and where something that gives up less is as fast.
    Where the recipe leaves the micro-batch to the plan, each change is told with the one that the plan would choose then.
    """
    layout, _ = make_layout(recipe, cluster)
    before = estimate_step(recipe, shape, layout, batch, device, trained_of(recipe)).step_s / batch.seq_len if device else 1.0
    lists, tried = _list_steps(recipe, layout), 0
    found: list[tuple[tuple[int, float, int], tuple[int, ...], Suggestion]] = []
    for picks in sorted(itertools.product(*(range(len(steps) + 1) for steps in lists)), key=lambda picks: _rank_picks(picks, lists)):
        steps = [lists[number][pick - 1] for number, pick in enumerate(picks) if pick]
        changes = _leave_out_what_is(recipe, {key: value for step in steps for key, value in step.changes.items()})
        changed = apply_changes(recipe, changes)
        milder_does = any(all(mild <= pick for mild, pick in zip(other, picks, strict=True)) for _, other, _ in found)
        if not changes or milder_does or not is_possible(changed, recipe, shape, cluster):
            continue
        least = _with_least_rows(changed, cluster)
        if tried == MOST_CONFIRMED or floor(*least) > budget or predict(*least).verdict != "FITS":
            continue
        tried += 1
        if bound(*least).verdict != "FITS":
            continue
        taken = find_fitting(make_candidates(changed, shape, cluster, device, trained_of(changed)), budget, floor, bound, confirm)
        if taken is None or taken.memory is None:
            continue
        grade = max(step.grade for step in steps)
        slowdown = taken.step_s / taken.batch.seq_len / before if device else 1.0
        suggestion = Suggestion(changes=changes, step_s=taken.step_s, slowdown=slowdown, need=taken.memory.device("total").p95,
                                effect=", ".join(step.effect for step in steps if step.effect))  # fmt: skip
        found.append(((grade, slowdown, len(changes)), picks, suggestion))
    found.sort(key=lambda item: item[0])
    worth = [
        suggestion for rank, _, suggestion in found if not device or all(other[1] > rank[1] for other, _, _ in found if other[0] < rank[0])
    ]
    return worth[:ENOUGH_SUGGESTIONS]


def _leave_out_what_is(recipe: Recipe, changes: Changes) -> Changes:
    """The changes without those that the recipe says already."""
    asked = recipe.model_dump()
    return {key: value for key, value in changes.items() if "." not in key or asked[key.partition(".")[0]][key.partition(".")[2]] != value}


def _with_least_rows(recipe: Recipe, cluster: Cluster) -> tuple[Recipe, Layout, BatchPlan]:
    """The recipe with the least micro-batch that it allows."""
    layout, _ = make_layout(recipe, cluster)
    micro = recipe.batch.micro_batch_size
    return recipe, layout, make_micro_batch(recipe, layout, 1 if micro == "auto" else micro)


def _rank_picks(picks: tuple[int, ...], lists: list[list[_Step]]) -> tuple[int, int, int]:
    """What is given up by a pick of each list (0 is none of it): milder picks come before all that contain them."""
    steps = [lists[number][pick - 1] for number, pick in enumerate(picks) if pick]
    return max((step.grade for step in steps), default=0), len(steps), sum(picks)


def suggest_nodes(cluster: Cluster, fits_on: Callable[[Cluster], bool], counts: Iterable[int] = (2, 4, 8, 16, 32, 64)) -> int | None:
    """The fewest nodes, among powers of two, on which the recipe as it is fits; None where none do."""
    wider = (cluster.model_copy(update={"nodes": nodes}) for nodes in counts if nodes > cluster.nodes)
    return next((each.nodes for each in wider if fits_on(each)), None)
