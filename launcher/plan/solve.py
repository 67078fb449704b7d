"""What fits: the settings that `auto` leaves to the plan.

Pure functions. A candidate is the recipe with every `auto` replaced; candidates are ordered by the estimated time of a
step (launcher.plan.speed) and their memory is predicted in that order, so most of them never need it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from launcher.cluster import Cluster
from launcher.plan.batch import BatchPlan, list_micro_batches, make_batch
from launcher.plan.budget import VERDICTS, MemoryPlan, Verdict
from launcher.plan.devices import Device
from launcher.plan.layout import Layout, is_installed, make_layout, trains_sharded_on_cpu
from launcher.plan.losses import changes_logits
from launcher.plan.shape import ModelShape, read_text_part
from launcher.plan.speed import estimate_step
from launcher.recipe import Lora, QLora, Recipe
from launcher.recipe_file import find_conflicts
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
BUCKETS = (None, 100_000_000, 20_000_000)
"""Elements of parallel.reduce_bucket_size; None is what a recipe that says nothing gets."""


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
        if self.memory is None:
            return 0.0
        memory = self.memory if self.is_exact else self.memory.without_slack
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
        places = (None,) if recipe.parallel.nvme_path is None else (None, recipe.parallel.nvme_path)
        axes.append(("parallel.offload", [_offload(*pair, nvme) for nvme in places for pair in OFFLOADS if pair[0] or nvme is None]))
    if recipe.memory.gradient_checkpointing == "auto":
        axes.append(("memory.gradient_checkpointing", [{"memory.gradient_checkpointing": how} for how in (False, True, "offload")]))
    if recipe.model.loss == "auto":
        axes.append(("model.loss", [{"model.loss": loss} for loss in ("plain", "chunked", "liger")]))
    if recipe.parallel.reduce_bucket_size == "auto":
        axes.append(("parallel.reduce_bucket_size", [{"parallel.reduce_bucket_size": size} for size in BUCKETS]))
    if isinstance(recipe.method, Lora) and recipe.method.quantization == "auto":
        axes.append(("method.quantization", [{"method": method} for method in list_quantised(recipe.method)]))
    return axes


def _offload(optimizer: bool, param: bool, nvme: str | None) -> Changes:
    return {"parallel.offload": None, "parallel.offload_optimizer": optimizer, "parallel.offload_param": param, "parallel.nvme_path": nvme}


def list_quantised(method: Lora) -> Iterator[Lora | QLora]:
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
        size = settled.parallel.reduce_bucket_size
        if not is_possible(settled, recipe, shape, cluster) or (
            size in BUCKETS[1:] and size != recipe.parallel.reduce_bucket_size and int(size) >= trained
        ):
            continue
        layout, _ = make_layout(settled, cluster)
        for micro in list_micro_batches(
            settled.batch, ranks=layout.world_size, seq_len=settled.data.seq_len, accelerator=layout.accelerator
        ):
            batch = make_micro_batch(settled, layout, micro)
            step_s = estimate_step(settled, shape, layout, batch, device, trained).step_s if device else 1.0 / micro
            both = changes | ({"batch.micro_batch_size": micro} if recipe.batch.micro_batch_size == "auto" else {})
            candidates.append(Candidate(changes=both, recipe=settled, layout=layout, batch=batch, step_s=step_s))
    return sorted(candidates, key=lambda candidate: (candidate.step_s, -candidate.batch.micro_batch_size))


def is_possible(settled: Recipe, recipe: Recipe, shape: ModelShape, cluster: Cluster) -> bool:
    """Whether a changed recipe goes together, and needs nothing that its cluster or its model has not. What `recipe` asks for is kept."""
    gpu, loss = cluster.accelerator == "cuda", settled.model.loss
    fused = loss == "liger" and not (gpu and is_installed("liger_kernel"))
    if loss not in (recipe.model.loss, "plain") and (fused or changes_logits(read_text_part(shape.config))):
        return False
    if settled.memory.gradient_checkpointing == "offload" and not gpu:
        return False
    if settled.parallel.zero_stage == 3 != recipe.parallel.zero_stage and not gpu and not trains_sharded_on_cpu(settled):
        return False
    return not any(True for _ in find_conflicts(settled))


def make_micro_batch(recipe: Recipe, layout: Layout, micro: int) -> BatchPlan:
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


def find_fitting(candidates: list[Candidate], budget: int, floor: Floor, bound: Predict, confirm: Predict) -> Candidate | None:
    """The fastest that fits: `choose` where no other is of use. `floor` and `bound` are never above what `confirm` says."""
    for candidate in candidates:
        of = candidate.recipe, candidate.layout, candidate.batch
        if floor(*of) <= budget and bound(*of).verdict == "FITS" and (memory := confirm(*of)).verdict == "FITS":
            return replace(candidate, memory=memory, is_exact=True)
    return None


def _confirm(candidate: Candidate, confirm: Predict, worst: Verdict) -> Candidate:
    """Computed exactly, where its verdict may be `worst` or better."""
    if candidate.is_exact or VERDICTS.index(candidate.verdict or "FITS") > VERDICTS.index(worst):
        return candidate
    return replace(_see(candidate, confirm), is_exact=True)


def _find_least(seen: list[Candidate], budget: int, predict: Predict, confirm: Predict) -> Candidate:
    """The one that is least above what there is, before what the allocator adds. A floor is never too high, so that most need no more than that."""
    least: int | None = None

    def rank(index: int) -> tuple[float, int]:
        candidate = seen[index]
        bare = candidate if candidate.memory is None else replace(candidate, is_exact=False)
        return max(bare.excess, candidate.floor / budget - 1.0), candidate.batch.micro_batch_size

    for index in sorted(range(len(seen)), key=rank):
        if least is not None and rank(index) >= rank(least):
            break
        if seen[index].memory is None:
            seen[index] = _see(seen[index], predict)
        if least is None or rank(index) < rank(least):
            least = index
    assert least is not None, "nothing to choose from"
    if not seen[least].is_exact:
        seen[least] = replace(_see(seen[least], confirm), is_exact=True)
    return seen[least]


def describe_choice(recipe: Recipe, choice: Choice) -> list[str]:
    """A note for each key that the plan chose: the value, and the fastest that differs in this key alone, with what came of it."""
    notes = []
    keys = [key for key, _ in make_axes(recipe)] + (["batch.micro_batch_size"] if recipe.batch.micro_batch_size == "auto" else [])
    told = [
        (candidate, [describe_setting(key, candidate) for key in keys]) for candidate in choice.considered if candidate.verdict != "FITS"
    ]
    taken = [describe_setting(key, choice.taken) for key in keys]
    for place, (key, value) in enumerate(zip(keys, taken, strict=True)):
        others = [c for c, settings in told if [i for i in range(len(keys)) if settings[i] != taken[i]] == [place]]
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
        return f"would need more than {format_bytes(candidate.floor)}"
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
        place = " on NVMe" if layout.nvme_path else ""
        return f"all{place}" if layout.offload_param else f"optimizer{place}" if layout.offload_optimizer else "none"
    if key == "memory.gradient_checkpointing":
        return "offload" if layout.checkpoints_on_host else "on" if layout.gradient_checkpointing else "off"
    if key == "model.loss":
        return layout.loss
    if key == "parallel.reduce_bucket_size":
        size = candidate.recipe.parallel.reduce_bucket_size
        return "as many as there are" if size is None else f"{size:,}"
    if key == "method.quantization":
        method = candidate.recipe.method
        return f"{method.bits} bits" if isinstance(method, QLora) else "as it is"
    batch = candidate.batch
    return f"{batch.micro_batch_size} × {batch.gradient_accumulation_steps} accumulation on {batch.data_parallel_size} ranks"
