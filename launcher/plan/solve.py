"""What fits: the settings that `auto` leaves to the plan, and the cheapest changes where nothing does.

Pure functions. A candidate is the recipe with every `auto` replaced; candidates are ordered by the estimated time of a
step (launcher.plan.speed) and their memory is predicted in that order, so most of them never need it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from launcher.cluster import Cluster
from launcher.plan.batch import BatchPlan, list_micro_batches, make_batch
from launcher.plan.budget import VERDICTS, MemoryPlan, Verdict
from launcher.plan.devices import Device
from launcher.plan.layout import Layout, make_layout
from launcher.plan.shape import ModelShape
from launcher.plan.speed import estimate_step
from launcher.recipe import Lora, QLora, Recipe, find_conflicts
from launcher.units import format_bytes

Changes = dict[str, Any]
"""Recipe keys, dotted, with their values. `method` stands for the whole section."""
Predict = Callable[[Recipe, Layout, BatchPlan], MemoryPlan]
"""What a recipe needs."""
Floor = Callable[[Recipe, Layout, BatchPlan], int]
"""Bytes of a device that a recipe needs at least."""

AUTO_STAGES = (1, 2, 3)
"""Stage 0 is left out: in bf16 DeepSpeed takes another optimizer path there, and the numbers drift."""
OFFLOADS = ((False, False), (True, False), (True, True))
"""offload_optimizer, offload_param."""
ENOUGH_SUGGESTIONS = 5
MOST_CONFIRMED = 12
"""Changes that are computed exactly; a search for advice may not take longer than the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A recipe that leaves nothing to choose, with what is known of its memory."""

    changes: Changes
    recipe: Recipe
    layout: Layout
    batch: BatchPlan
    step_s: float
    floor: int = 0
    """Bytes of a device that it needs whatever its activations are; 0 where nobody asked."""
    memory: MemoryPlan | None = None
    """None where nobody had to know."""
    is_exact: bool = False
    """Whether `memory` is the exact prediction and not the quick one."""

    @property
    def verdict(self) -> Verdict | None:
        """The exact prediction's; of what was ruled out, what rules it out."""
        if self.memory is None:
            return "DOES NOT FIT" if self.floor else None
        return self.memory.verdict if self.is_exact else self.memory.without_slack.verdict

    @property
    def excess(self) -> float:
        """How far the need at P95 is above what there is, as a share; of device or host, whichever is worse. Never too much."""
        memory = self.memory if self.memory is None or self.is_exact else self.memory.without_slack
        if memory is None:
            return 0.0
        shares = [memory.device("total").p95 / memory.budget]
        if memory.host_budget:
            shares.append(memory.host.p95 / memory.host_budget)
        return max(shares) - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The candidate that was taken, and those that were looked at, fastest first."""

    taken: Candidate
    considered: tuple[Candidate, ...]
    total: int
    """How many there were to choose from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change that makes it fit: recipe keys (and `--nodes`), and what it costs."""

    changes: Changes
    step_s: float
    slowdown: float
    """Times as long as the recipe as it is would take, were there room for it."""
    need: int
    """Bytes of a device at P95."""
    effect: str
    """What it changes about the result; empty where only time is lost."""


def apply_changes(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with other values for some keys. `method.KEY` and whole sections may be given too."""
    sections: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if not name:
            sections[section] = value
            continue
        before = sections.get(section, recipe.__dict__[section])
        sections[section] = before.model_copy(update={name: value})
    return recipe.model_copy(update=sections)


def has_auto(recipe: Recipe) -> bool:
    """Whether the plan has anything to choose that bears on memory."""
    return any(len(values) > 1 for _, values in make_axes(recipe)) or recipe.batch.micro_batch_size == "auto"


def make_axes(recipe: Recipe) -> list[tuple[str, list[Changes]]]:
    """What `auto` leaves open: for each key what it may become. One value where the recipe says it."""
    axes: list[tuple[str, list[Changes]]] = []
    if recipe.parallel.zero_stage == "auto":
        axes.append(("parallel.zero_stage", [{"parallel.zero_stage": stage} for stage in AUTO_STAGES]))
    if recipe.parallel.offload == "auto":
        axes.append(("parallel.offload", [_offload(*pair) for pair in OFFLOADS]))
    if recipe.memory.gradient_checkpointing == "auto":
        axes.append(("memory.gradient_checkpointing", [{"memory.gradient_checkpointing": on} for on in (False, True)]))
    if isinstance(recipe.method, Lora) and recipe.method.quantization == "auto":
        axes.append(("method.quantization", [{"method": method} for method in _quantised(recipe.method)]))
    return axes


def _offload(optimizer: bool, param: bool) -> Changes:
    return {"parallel.offload": None, "parallel.offload_optimizer": optimizer, "parallel.offload_param": param}


def _quantised(method: Lora) -> Iterator[Lora | QLora]:
    yield method.model_copy(update={"quantization": None})
    same = {name: value for name, value in method if name in QLora.model_fields and name != "kind"}
    for bits in (8, 4):
        yield QLora(kind="qlora", bits=bits, **same)


def make_candidates(recipe: Recipe, shape: ModelShape, cluster: Cluster, device: Device | None, trained: int) -> list[Candidate]:
    """Every way to fill in the `auto`s of a recipe, fastest first; of equally fast ones the one that gives up least."""
    candidates: list[Candidate] = []
    for combination in itertools.product(*(values for _, values in make_axes(recipe))):
        changes: Changes = {key: value for change in combination for key, value in change.items()}
        settled = apply_changes(recipe, changes)
        if any(True for _ in find_conflicts(settled)):
            continue
        layout, _ = make_layout(settled, cluster)
        for micro in list_micro_batches(
            settled.batch, ranks=layout.world_size, seq_len=settled.data.seq_len, accelerator=layout.accelerator
        ):
            batch = _make_batch(settled, layout, micro)
            step_s = estimate_step(settled, shape, layout, batch, device, trained).step_s if device else 1.0 / micro
            both = changes | ({"batch.micro_batch_size": micro} if recipe.batch.micro_batch_size == "auto" else {})
            candidates.append(Candidate(changes=both, recipe=settled, layout=layout, batch=batch, step_s=step_s))
    return sorted(candidates, key=lambda candidate: (candidate.step_s, -candidate.batch.micro_batch_size))


def _make_batch(recipe: Recipe, layout: Layout, micro: int) -> BatchPlan:
    return make_batch(
        global_batch_size=recipe.batch.global_batch_size, micro_batch_size=micro, ranks=layout.world_size, seq_len=recipe.data.seq_len
    )


def choose(candidates: list[Candidate], budget: int, floor: Floor, predict: Predict, confirm: Predict) -> Choice:
    """The fastest that fits; else the fastest that fits tightly; else the one that needs least. `confirm` has the last word on each.

    Most candidates are ruled out by less: `floor`, what they hold whatever their activations are, or `predict`, which
    leaves out what the allocator adds. Neither is ever too high. Stops at the first that fits: what is slower is not looked at.
    """
    seen: list[Candidate] = []
    for candidate in candidates:
        looked_at = replace(candidate, floor=floor(candidate.recipe, candidate.layout, candidate.batch))
        if looked_at.floor <= budget:
            looked_at = _confirm(_see(looked_at, predict), confirm, worst="FITS")
        seen.append(looked_at)
        if looked_at.verdict == "FITS":
            return Choice(taken=looked_at, considered=tuple(seen), total=len(candidates))
    for index, candidate in enumerate(seen):
        seen[index] = candidate if candidate.memory is None else _confirm(candidate, confirm, worst="TIGHT")
        if seen[index].verdict == "TIGHT":
            return Choice(taken=seen[index], considered=tuple(seen), total=len(candidates))
    return Choice(taken=_find_least(seen, budget, predict, confirm), considered=tuple(seen), total=len(candidates))


def _confirm(candidate: Candidate, confirm: Predict, worst: Verdict) -> Candidate:
    """Computed exactly, where its verdict may be `worst` or better."""
    if candidate.is_exact or VERDICTS.index(candidate.verdict or "FITS") > VERDICTS.index(worst):
        return candidate
    return replace(_see(candidate, confirm), is_exact=True)


def _find_least(seen: list[Candidate], budget: int, predict: Predict, confirm: Predict) -> Candidate:
    """The one that is least above what there is. What is known of a candidate is never too much, so that most need no more than that."""
    least: int | None = None

    def rank(index: int) -> tuple[float, int]:
        return max(seen[index].excess, seen[index].floor / budget - 1.0), seen[index].batch.micro_batch_size

    for index in sorted(range(len(seen)), key=rank):
        if least is not None and rank(index) >= rank(least):
            break
        for look in (predict, confirm):
            if not seen[index].is_exact and (least is None or rank(index) < rank(least)):
                seen[index] = replace(_see(seen[index], look), is_exact=look is confirm)
        if seen[index].is_exact and (least is None or rank(index) < rank(least)):
            least = index
    assert least is not None, "nothing to choose from"
    return seen[least]


def describe_choice(recipe: Recipe, choice: Choice) -> list[str]:
    """A note for each key that the plan chose: the value, and the fastest other value with what came of it."""
    notes = []
    axes = [key for key, _ in make_axes(recipe)]
    for key in axes + (["batch.micro_batch_size"] if recipe.batch.micro_batch_size == "auto" else []):
        value = describe_setting(key, choice.taken)
        others = [c for c in choice.considered if describe_setting(key, c) != value and c.verdict != "FITS"]
        reason = f"; {describe_setting(key, others[0])} {_fate(others[0])}" if others else ""
        notes.append(f"{key}: {value} ({_WHY[choice.taken.verdict]}{reason})")
    return notes


def _see(candidate: Candidate, predict: Predict) -> Candidate:
    return replace(candidate, memory=predict(candidate.recipe, candidate.layout, candidate.batch))


_WHY: dict[Verdict | None, str] = {
    "FITS": "the fastest that fits",
    "TIGHT": "the fastest that fits, tightly",
    "DOES NOT FIT": "what needs least, and it does not fit",
    None: "there is no other",
}


def _fate(candidate: Candidate) -> str:
    if candidate.memory is None:
        return f"would need {format_bytes(candidate.floor)} before any activation"
    need, budget = candidate.memory.device("total").p95, candidate.memory.budget
    if need > budget or not candidate.memory.host_budget:
        return f"would need {format_bytes(need)} of {format_bytes(budget)}"
    return f"would need {format_bytes(candidate.memory.host.p95)} of {format_bytes(candidate.memory.host_budget)} of host memory"


def describe_setting(key: str, candidate: Candidate) -> str:
    """The value of a key in a candidate, in words."""
    layout = candidate.layout
    if key == "parallel.zero_stage":
        return str(layout.zero_stage)
    if key == "parallel.offload":
        return "all" if layout.offload_param else "optimizer" if layout.offload_optimizer else "none"
    if key == "memory.gradient_checkpointing":
        return "on" if layout.gradient_checkpointing else "off"
    if key == "method.quantization":
        method = candidate.recipe.method
        return f"{method.bits} bits" if isinstance(method, QLora) else "as it is"
    batch = candidate.batch
    return f"{batch.micro_batch_size} × {batch.gradient_accumulation_steps} accumulation on {batch.data_parallel_size} ranks"


# ------------------------------------------------------------------------------------------- where nothing fits


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
    if not layout.gradient_checkpointing:
        lists.append([_Step(changes={"memory.gradient_checkpointing": True}, grade=0)])
    smaller = [size for size in range(1, _micro_of(recipe, layout)) if _micro_of(recipe, layout) % size == 0]
    lists.append([_Step(changes={"batch.micro_batch_size": size}, grade=0) for size in dict.fromkeys(smaller[-1:] + smaller[:1])])
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


def _micro_of(recipe: Recipe, layout: Layout) -> int:
    micro = recipe.batch.micro_batch_size
    return max(1, recipe.batch.global_batch_size // layout.world_size) if micro == "auto" else micro


def _lighter_methods(method: Any) -> Iterator[_Step]:
    if isinstance(method, Lora):
        if method.init == "default":
            *_, in_4_bits = _quantised(method)
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
    shape: ModelShape,
    cluster: Cluster,
    device: Device | None,
    trained_of: Callable[[Recipe], int],
    predict: Predict,
    confirm: Predict,
) -> list[Suggestion]:
    """The cheapest changes that make a recipe fit, best first; none where nothing does.

    First what leaves the result as it is, then what costs precision, then what trains something else, by their speed.
    A change is left out where a part of it, or a milder one, would do.
    """
    layout, _ = make_layout(recipe, cluster)
    before = _time_of(recipe, shape, layout, device, trained_of)
    lists, tried = _list_steps(recipe, layout), 0
    found: list[tuple[tuple[int, float, int], tuple[int, ...], Suggestion]] = []
    for picks in sorted(itertools.product(*(range(len(steps) + 1) for steps in lists)), key=lambda picks: _rank_picks(picks, lists)):
        steps = [lists[number][pick - 1] for number, pick in enumerate(picks) if pick]
        changes: Changes = {key: value for step in steps for key, value in step.changes.items()}
        changed = apply_changes(recipe, changes)
        milder_does = any(all(mild <= pick for mild, pick in zip(other, picks, strict=True)) for _, other, _ in found)
        if not steps or milder_does or any(True for _ in find_conflicts(changed)):
            continue
        settled, _ = make_layout(changed, cluster)
        batch = _make_batch(changed, settled, _micro_of(changed, settled))
        if tried == MOST_CONFIRMED or predict(changed, settled, batch).verdict != "FITS":
            continue
        tried += 1
        memory = confirm(changed, settled, batch)
        if memory.verdict != "FITS":
            continue
        step_s = _time_of(changed, shape, settled, device, trained_of)
        grade = max(step.grade for step in steps)
        suggestion = Suggestion(changes=changes, step_s=step_s, slowdown=step_s / before, need=memory.device("total").p95,
                                effect=", ".join(step.effect for step in steps if step.effect))  # fmt: skip
        found.append(((grade, step_s, len(changes)), picks, suggestion))
    return [suggestion for _, _, suggestion in sorted(found, key=lambda item: item[0])][:ENOUGH_SUGGESTIONS]


def _rank_picks(picks: tuple[int, ...], lists: list[list[_Step]]) -> tuple[int, int, int]:
    """What is given up by a pick of each list (0 is none of it): milder picks come before all that contain them."""
    steps = [lists[number][pick - 1] for number, pick in enumerate(picks) if pick]
    return max((step.grade for step in steps), default=0), len(steps), sum(picks)


def _time_of(recipe: Recipe, shape: ModelShape, layout: Layout, device: Device | None, trained_of: Callable[[Recipe], int]) -> float:
    batch = _make_batch(recipe, layout, _micro_of(recipe, layout))
    return estimate_step(recipe, shape, layout, batch, device, trained_of(recipe)).step_s if device else 1.0


def suggest_nodes(
    recipe: Recipe, cluster: Cluster, predict_on: Callable[[Cluster], MemoryPlan | None], counts: Iterable[int] = (2, 4, 8, 16, 32, 64)
) -> int | None:
    """The fewest nodes, among powers of two, on which the recipe as it is fits; None where none do."""
    for nodes in counts:
        if nodes > cluster.nodes and (memory := predict_on(cluster.model_copy(update={"nodes": nodes}))) and memory.verdict == "FITS":
            return nodes
    return None
