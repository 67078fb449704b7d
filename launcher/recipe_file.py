"""A recipe from its YAML file: read, overridden, and checked as a whole, every fault at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from launcher.errors import Fault, RecipeError
from launcher.recipe import Batch, Data, Evaluate, Freeze, Lora, Optim, Parallel, QLora, Recipe, Save, Schedule
from launcher.schema import Document, check_document, find_tagged, load_document


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe of a YAML file with `section.key=value` overrides. Raises RecipeError with every fault."""
    document = load_document(path, overrides, tagged=find_tagged(Recipe))
    recipe, faults = check_document(Recipe, document)
    faults += [
        Fault(document.locate(tuple(key.split("."))), key, problem, remedy)
        for key, problem, remedy in _find_conflicts(_valid_sections(document))
    ]
    if faults or recipe is None:
        raise RecipeError(sorted(faults, key=lambda fault: _line_number(fault.where)))
    return recipe


def _line_number(where: str) -> tuple[str, int]:
    path, _, line = where.rpartition(":")
    return (path, int(line)) if line.isdigit() else (where, 0)


def _valid_sections(document: Document) -> dict[str, Any]:
    """The sections of a recipe that are right in themselves, so that conflicts show beside other faults."""
    from pydantic import TypeAdapter, ValidationError

    sections: dict[str, Any] = {}
    for name, info in Recipe.model_fields.items():
        if not info.is_required() and name not in document.data:
            sections[name] = info.default
            continue
        try:
            annotation: Any = Annotated[info.annotation, info] if info.discriminator else info.annotation
            adapter: TypeAdapter[Any] = TypeAdapter(annotation)
            sections[name] = adapter.validate_python(document.data.get(name), strict=False)
        except ValidationError:
            continue
    return sections


Conflict = tuple[str, str, str]
"""Key, what is wrong, what to do."""


def find_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What does not go together in a whole recipe, such as one that a plan has changed."""
    return _find_conflicts(dict(recipe))


def _find_conflicts(sections: dict[str, Any]) -> Iterator[Conflict]:
    """What no section can see by itself. Each check takes the sections it names."""
    for check in _CHECKS:
        needs = list(inspect.signature(check).parameters)
        if all(name in sections for name in needs):
            yield from check(**{name: sections[name] for name in needs})


def _check_method(method: Any) -> Iterator[Conflict]:
    if isinstance(method, Freeze) and not method.last_layers and not method.patterns:
        yield "method", "freeze trains nothing", "set method.last_layers or method.patterns"
    if isinstance(method, QLora) and method.bits == 8 and method.quant_type != "nf4":
        yield "method.quant_type", "is a 4-bit code, and method.bits is 8", "drop method.quant_type or set method.bits to 4"
    if isinstance(method, Lora) and method.quantization and method.init == "pissa":
        yield (
            "method.quantization",
            "pissa takes the adapters from the weights as they are, which a quantised base has not",
            "drop one of the two",
        )
    if isinstance(method, Lora) and method.dora and method.init == "pissa":
        yield "method.init", "pissa changes the base, and method.dora measures it: no plain adapter says the two", "drop one of the two"


def _check_parallel(parallel: Parallel) -> Iterator[Conflict]:
    stage = parallel.zero_stage
    if parallel.offload == "auto" and (parallel.offload_optimizer or parallel.offload_param):
        key = "offload_optimizer" if parallel.offload_optimizer else "offload_param"
        yield f"parallel.{key}", "is chosen by the plan where parallel.offload is auto", "drop one of the two"
    if stage == "auto":
        return
    if parallel.offload_param and stage != 3:
        yield "parallel.offload_param", f"needs ZeRO stage 3, and parallel.zero_stage is {stage}", "set parallel.zero_stage to 3"
    if parallel.offload_optimizer and stage == 0:
        yield "parallel.offload_optimizer", "needs ZeRO stage 1, 2 or 3, and parallel.zero_stage is 0", "set parallel.zero_stage to 2"
    if parallel.nvme_path and stage != 3:
        yield "parallel.nvme_path", f"needs ZeRO stage 3, and parallel.zero_stage is {stage}", "set parallel.zero_stage to 3, or drop it"
    elif parallel.nvme_path and parallel.offload != "auto" and not (parallel.offload_optimizer or parallel.offload_param):
        yield (
            "parallel.nvme_path",
            "nothing is offloaded that could be kept there",
            "set parallel.offload_optimizer or parallel.offload_param",
        )
    if parallel.leaf_modules is True and stage != 3:
        yield "parallel.leaf_modules", f"needs ZeRO stage 3, and parallel.zero_stage is {stage}", "drop it, or set parallel.zero_stage to 3"


def _check_offloaded_weights(parallel: Parallel, method: Any) -> Iterator[Conflict]:
    if parallel.offload_param and isinstance(method, QLora) and method.bits == 8:
        yield (
            "parallel.offload_param",
            "LLM.int8() weights cannot live in host memory between uses (their scales are bound to the device)",
            "set method.bits to 4, or parallel.offload_param to false",
        )


def _check_offloaded_states(parallel: Parallel, optim: Optim) -> Iterator[Conflict]:
    if parallel.offload_optimizer and optim.name not in ("adamw", "sgd", "adafactor"):
        yield (
            "optim.name",
            f"{optim.name} is bitsandbytes', made for states in GPU memory, and parallel.offload_optimizer moves them to the host",
            "use adamw, or drop the offload: 8-bit states are already four times smaller",
        )


def _check_schedule(schedule: Schedule) -> Iterator[Conflict]:
    if schedule.max_steps and schedule.warmup_steps and schedule.warmup_steps >= schedule.max_steps:
        yield "schedule.warmup_steps", f"{schedule.warmup_steps} warm-up steps, and the run has {schedule.max_steps}", "make it smaller"


def _check_held_out(evaluate: Evaluate, data: Data) -> Iterator[Conflict]:
    if data.eval and data.eval_fraction:
        yield "data.eval_fraction", "a held-out set is named by data.eval already", "drop one of the two"
    held_out = bool(data.eval or data.eval_fraction)
    if not held_out and (evaluate.early_stopping or evaluate.keep_best is True or evaluate.every_steps):
        key = "early_stopping" if evaluate.early_stopping else "keep_best" if evaluate.keep_best is True else "every_steps"
        yield f"evaluate.{key}", "needs a held-out set", "set data.eval or data.eval_fraction"


def _check_evaluate(evaluate: Evaluate) -> Iterator[Conflict]:
    if evaluate.every_steps is None and (evaluate.early_stopping or evaluate.keep_best is True):
        key = "early_stopping" if evaluate.early_stopping else "keep_best"
        yield f"evaluate.{key}", "needs evaluations during the run", "set evaluate.every_steps"


def _check_save(save: Save, evaluate: Evaluate) -> Iterator[Conflict]:
    if save.keep_best and evaluate.every_steps is None:
        yield "save.keep_best", "needs evaluations during the run", "set evaluate.every_steps"


def _check_batch(batch: Batch) -> Iterator[Conflict]:
    micro = batch.micro_batch_size
    if micro != "auto" and batch.global_batch_size % micro:
        yield (
            "batch.micro_batch_size",
            f"{micro} does not divide batch.global_batch_size {batch.global_batch_size}",
            "global_batch_size = micro_batch_size × gradient_accumulation_steps × ranks",
        )


_CHECKS: tuple[Callable[..., Iterator[Conflict]], ...] = (
    _check_method,
    _check_parallel,
    _check_offloaded_weights,
    _check_offloaded_states,
    _check_schedule,
    _check_held_out,
    _check_evaluate,
    _check_save,
    _check_batch,
)
