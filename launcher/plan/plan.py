"""Plan: what will happen. Made from a recipe and a cluster, written beside the run, read by the workers."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.storage import join_url
from launcher.cluster import Cluster
from launcher.errors import DataError, Fault, RecipeError
from launcher.plan.advise import Suggestion, suggest_changes
from launcher.plan.allocator_settings import describe_settings, has_expandable_segments, read_settings
from launcher.plan.batch import BatchPlan, check_batch
from launcher.plan.budget import MemoryPlan
from launcher.plan.calibration import apply_calibration, find_calibration, find_rates
from launcher.plan.deepspeed import choose_bucket, make_deepspeed_config
from launcher.plan.layout import Layout, make_layout
from launcher.plan.losses import changes_logits
from launcher.plan.memory import Tracer, count_trainable, has_closed_form, hold_at_least, predict_memory
from launcher.plan.shape import ModelShape, load_shape, read_text_part
from launcher.plan.solve import Choice, Floor, Predict, choose, describe_choice, find_fitting, make_candidates
from launcher.plan.source import find_missing_weights, locate_config
from launcher.plan.trainable import check_pairs, list_oddities, settle_attention, settle_dtype, settle_packing
from launcher.recipe import Recipe
from launcher.units import DTYPE_BYTES, format_bytes

SCHEMA_VERSION = 2
PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a worker needs to know. `base_dir` is where relative paths of the recipe start.

    A run continues from its own newest checkpoint; where it has none, from the one at `resume`, if that is set.
    `allow_changed` are the recipe's keys that may differ from those a checkpoint was made with.
    """

    recipe: Recipe
    cluster: Cluster
    shape: ModelShape
    layout: Layout
    batch: BatchPlan
    memory: MemoryPlan
    deepspeed: dict[str, Any]
    num_params: int
    trainable_params: int
    run_dir: str
    base_dir: str
    notes: tuple[str, ...]
    resume: str = ""
    allow_changed: tuple[str, ...] = ()
    allocator: str = ""
    """Settings of torch's allocator on GPUs, as PYTORCH_ALLOC_CONF has them."""

    @property
    def checkpoints(self) -> str:
        """The folder or URL of this run's checkpoints."""
        return checkpoints_url(self.recipe, self.run_dir)

    @property
    def digest(self) -> str:
        """Names what is trained: the recipe and its resolution, not where it is written."""
        facts = self.to_dict()
        del facts["recipe"]["output_dir"]
        for place in ("run_dir", "base_dir", "notes", "memory", "cluster", "resume", "allow_changed", "allocator"):
            del facts[place]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": self.recipe.model_dump(mode="json"),
            "cluster": self.cluster.model_dump(mode="json"),
            "shape": asdict(self.shape),
            "layout": asdict(self.layout),
            "batch": asdict(self.batch),
            "memory": self.memory.to_dict(),
            "deepspeed": self.deepspeed,
            "num_params": self.num_params,
            "trainable_params": self.trainable_params,
            "run_dir": self.run_dir,
            "base_dir": self.base_dir,
            "notes": list(self.notes),
            "resume": self.resume,
            "allow_changed": list(self.allow_changed),
            "allocator": self.allocator,
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def load_plan(path: Path) -> Plan:
    """The plan of a run folder's plan.json, equal to the one that was saved."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a plan: {error}", "name a run folder that lepton-launch made") from None
    if facts.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path} has plan schema {facts.get('schema_version')}, and this version reads {SCHEMA_VERSION}",
            "use the version that made the run",
        )
    try:
        return read_plan(facts)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise DataError(f"{path} is a plan that was changed or cut off ({problem})", "run the recipe again") from None


def read_plan(facts: dict[str, Any]) -> Plan:
    """The plan of what `to_dict` gave."""
    return Plan(
        recipe=Recipe.model_validate_json(json.dumps(facts["recipe"])),
        cluster=Cluster.model_validate_json(json.dumps(facts["cluster"])),
        shape=ModelShape(**facts["shape"]),
        layout=Layout(**facts["layout"]),
        batch=BatchPlan(**facts["batch"]),
        memory=MemoryPlan.from_dict(facts["memory"]),
        deepspeed=facts["deepspeed"],
        num_params=facts["num_params"],
        trainable_params=facts["trainable_params"],
        run_dir=facts["run_dir"],
        base_dir=facts["base_dir"],
        notes=tuple(facts["notes"]),
        resume=facts["resume"],
        allow_changed=tuple(facts["allow_changed"]),
        allocator=facts.get("allocator", ""),
    )


def checkpoints_url(recipe: Recipe, run_dir: str) -> str:
    """Where a run's checkpoints lie: in its folder, or on the recipe's storage under the folder's name."""
    if recipe.save.storage is None:
        return str(Path(run_dir) / "checkpoints")
    return join_url(recipe.save.storage, Path(run_dir).name, "checkpoints")


def make_plan(recipe: Recipe, cluster: Cluster, *, base_dir: str, run_dir: str, tracer: Tracer | None = None, trace: bool = False) -> Plan:
    """Decide everything. Reads the model's configuration, nothing else. Raises RecipeError or ModelError."""
    return make_explained_plan(recipe, cluster, base_dir=base_dir, run_dir=run_dir, tracer=tracer, trace=trace)[0]


def make_explained_plan(
    recipe: Recipe, cluster: Cluster, *, base_dir: str, run_dir: str, tracer: Tracer | None = None, trace: bool = False
) -> tuple[Plan, Choice]:
    """The plan, and what was looked at where the recipe says auto.

    `tracer` runs a model that the plan has no arithmetic for on the meta device, and with `trace` any model (it takes torch, and
    seconds); without one the activations of such a model are guessed.
    """
    source = locate_config(recipe.model.name_or_path, base_dir)
    shape = load_shape(source, recipe.model.revision)
    if tracer is not None and not shape.is_known:
        shape = tracer.count(shape)
    _check_length(recipe, shape)
    check_pairs(recipe, shape)
    ranks = cluster.nodes * cluster.workers_per_node
    check_batch(global_batch_size=recipe.batch.global_batch_size, micro_batch_size=recipe.batch.micro_batch_size, ranks=ranks)
    trainable = count_trainable(recipe, shape)
    if trainable == 0 and (shape.is_known or shape.is_counted):
        raise RecipeError(
            [Fault("plan", "method", f"trains no parameter of this {shape.model_type}", "check target_modules, last_layers or patterns")]
        )
    recipe, settled = settle_packing(recipe, shape, cluster)
    recipe, widened = settle_dtype(recipe, shape, cluster)
    recipe, limited = _settle_budget(recipe, cluster)
    choice = make_choice(recipe, shape, cluster)
    recipe, batch, asked = choice.taken.recipe, choice.taken.batch, recipe
    layout, notes = make_layout(recipe, cluster)
    _check_loss(recipe, shape)
    if trainable == 0:
        notes.append(f"trained parameters: not counted here, because the launcher does not know how a {shape.model_type} names its layers")
    notes += settled + widened + limited + describe_choice(asked, choice)
    if recipe.optim.name == "adafactor" and layout.zero_stage:
        notes.append("adafactor: ZeRO hands it flat partitions, so its second moment is not factored (4 bytes a parameter)")
    adapters = trainable if recipe.method.kind in ("lora", "qlora") else 0
    notes += list_oddities(shape, recipe, layout)
    allocator = _allocator_of(cluster)
    notes += describe_settings(allocator)
    if find_missing_weights(source) is not None:
        notes.append(f"weights: {source.path} holds none (*.safetensors), so that it can be planned and not run")
    traced = tracer if trace or not has_closed_form(shape) else None
    memory = choice.taken.memory if traced is None else None
    plan = Plan(
        recipe=recipe,
        cluster=cluster,
        shape=shape,
        layout=layout,
        batch=batch,
        memory=memory or make_predictor(shape, cluster, replay=True, tracer=traced)(recipe, layout, batch),
        deepspeed=configure_deepspeed(recipe, shape, layout, batch),
        num_params=shape.num_params + adapters,
        trainable_params=trainable,
        run_dir=run_dir,
        base_dir=base_dir,
        notes=tuple(notes),
        allocator=allocator,
    )
    return plan, choice


def _allocator_of(cluster: Cluster) -> str:
    """The allocator's settings that this process would train with, where it is for GPUs."""
    return read_settings(os.environ) if cluster.accelerator == "cuda" else ""


def make_choice(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> Choice:
    """What the plan takes where the recipe says auto, and what it looked at; one candidate where it says nothing so."""
    recipe, device = settle_attention(recipe, shape, cluster), find_rates(cluster)
    candidates = make_candidates(recipe, shape, cluster, device, count_trainable(recipe, shape))
    if len(candidates) == 1:
        return Choice(taken=candidates[0], considered=(), total=1)
    budget = recipe.memory.budget_bytes
    return choose(candidates, cluster.device_memory if budget is None else budget, make_floor(shape),
                  make_predictor(shape, cluster, replay=False), make_predictor(shape, cluster, replay=True))  # fmt: skip


def make_suggestions(plan: Plan) -> list[Suggestion]:
    """What would make a plan fit that does not."""

    def trained_of(recipe: Recipe) -> int:
        return count_trainable(recipe, plan.shape)

    predict = make_predictor(plan.shape, plan.cluster, replay=False)
    return suggest_changes(plan.recipe, plan.batch, plan.shape, plan.cluster, find_rates(plan.cluster), trained_of, plan.memory.budget,
                           make_floor(plan.shape), predict, *_make_rules(plan.shape, plan.cluster))  # fmt: skip


def fits_on(plan: Plan, cluster: Cluster) -> bool:
    """Whether what is planned would fit another cluster of such devices."""
    batch, ranks = plan.recipe.batch, cluster.nodes * cluster.workers_per_node
    try:
        check_batch(global_batch_size=batch.global_batch_size, micro_batch_size=batch.micro_batch_size, ranks=ranks)
    except RecipeError:
        return False
    recipe, device = settle_attention(plan.recipe, plan.shape, cluster), find_rates(cluster)
    candidates = make_candidates(recipe, plan.shape, cluster, device, plan.trainable_params)
    return find_fitting(candidates, plan.memory.budget, make_floor(plan.shape), *_make_rules(plan.shape, cluster)) is not None


def _make_rules(shape: ModelShape, cluster: Cluster) -> tuple[Predict, Predict]:
    """What is never above the exact prediction, and the exact one of what fits."""
    return make_predictor(shape, cluster, replay=False, only_fits=True), make_predictor(shape, cluster, replay=True, only_fits=True)


def make_predictor(shape: ModelShape, cluster: Cluster, *, replay: bool, only_fits: bool = False, tracer: Tracer | None = None) -> Predict:
    """What predicts the memory of a recipe, its layout and its batch, for this model and cluster."""
    measured = find_calibration(cluster)

    def predict(recipe: Recipe, layout: Layout, batch: BatchPlan) -> MemoryPlan:
        config = configure_deepspeed(recipe, shape, layout, batch)
        memory = predict_memory(recipe, shape, layout, batch, cluster, deepspeed=config, budget=recipe.memory.budget_bytes, replay=replay,
                                only_fits=only_fits, tracer=tracer, expandable_segments=has_expandable_segments(_allocator_of(cluster)))  # fmt: skip
        return apply_calibration(memory, measured, layout.workers_per_node) if measured else memory

    return predict


def make_floor(shape: ModelShape) -> Floor:
    """What tells the bytes that a recipe, its layout and its batch need whatever their activations are: states, and the last hidden state alone."""

    def floor(recipe: Recipe, layout: Layout, batch: BatchPlan) -> int:
        hidden = batch.micro_batch_size * batch.seq_len * shape.hidden_size * DTYPE_BYTES[layout.dtype]
        return max(hidden, hold_at_least(recipe, shape, layout, batch, deepspeed=configure_deepspeed(recipe, shape, layout, batch)))

    return floor


def configure_deepspeed(recipe: Recipe, shape: ModelShape, layout: Layout, batch: BatchPlan) -> dict[str, Any]:
    size = recipe.parallel.reduce_bucket_size
    bucket = choose_bucket(count_trainable(recipe, shape)) if size is None or size == "auto" else size
    return make_deepspeed_config(layout, batch, max_grad_norm=recipe.optim.max_grad_norm, bucket=bucket, hidden_size=shape.hidden_size)


def _check_loss(recipe: Recipe, shape: ModelShape) -> None:
    if recipe.model.loss != "plain" and changes_logits(read_text_part(shape.config)):
        raise RecipeError([Fault("plan", "model.loss", f"{recipe.model.loss} makes the loss in the model's head, and a {shape.model_type} changes"
                                 " its logits after it", "set model.loss to plain")])  # fmt: skip


def _settle_budget(recipe: Recipe, cluster: Cluster) -> tuple[Recipe, list[str]]:
    """A budget above what a GPU has is none: no plan fits what is not there."""
    budget, there = recipe.memory.budget_bytes, cluster.device_memory
    if cluster.accelerator != "cuda" or budget is None or not 1 < there < budget:
        return recipe, []
    without = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"budget": None})})
    return without, [
        f"memory.budget: {recipe.memory.budget} is more than a {cluster.device_name} has; planned for its {format_bytes(there)}"
    ]


def _check_length(recipe: Recipe, shape: ModelShape) -> None:
    if shape.model_type != "vit" and recipe.data.seq_len > shape.max_positions:  # one that reads no words has no positions for them
        raise RecipeError([Fault("plan", "data.seq_len", f"{recipe.data.seq_len} is longer than the model's {shape.max_positions} positions",
                                 f"use at most {shape.max_positions}")])  # fmt: skip
