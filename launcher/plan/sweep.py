"""A recipe planned at every combination of a few values: what fits where."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from launcher.errors import Fault, LauncherError, RecipeError
from launcher.plan.plan import Plan
from launcher.plan.speed import Speed

SHORT = {
    "seq_len": "data.seq_len",
    "global_batch_size": "batch.global_batch_size",
    "micro_batch_size": "batch.micro_batch_size",
    "zero_stage": "parallel.zero_stage",
    "offload": "parallel.offload",
    "gradient_checkpointing": "memory.gradient_checkpointing",
    "budget": "memory.budget",
    "r": "method.r",
    "bits": "method.bits",
    "quantization": "method.quantization",
    "optim": "optim.name",
    "loss": "model.loss",
}
"""Axes that may be written without their section."""
MACHINES = ("nodes", "gpus_per_node", "gpu")
"""Axes that are no recipe key but an option of the command."""
MOST = 200
"""Combinations of a sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A key and what it becomes in turn. `name` as it was written, `key` as the recipe has it (or one of MACHINES)."""

    name: str
    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One combination: its plan, or why there is none."""

    values: tuple[str, ...]
    plan: Plan | None
    speed: Speed | None
    problem: str = ""


def is_axis(text: str) -> bool:
    """Whether an argument after --sweep is an axis (`nodes=1..8`) rather than an override (`optim.lr=1e-4`)."""
    name, equals, _ = text.partition("=")
    return bool(equals) and (name in SHORT or name in MACHINES)


def read_axis(text: str) -> Axis:
    """The axis of `seq_len=2k,8k,32k`, `nodes=1..8` or `parallel.zero_stage=2,3`. Raises RecipeError."""
    name, equals, values = text.partition("=")
    if not equals or not values or (name not in SHORT and name not in MACHINES and "." not in name):
        names = ", ".join((*SHORT, *MACHINES))
        raise RecipeError(
            [Fault("--sweep", "", f"{text!r} is no axis", f"write KEY=VALUE,VALUE or KEY=1..8; KEY is section.key or one of {names}")]
        )
    return Axis(name=name, key=SHORT.get(name, name), values=tuple(_read_values(name, values)))


def _read_values(name: str, text: str) -> list[str]:
    values: list[str] = []
    for part in text.split(","):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if span and int(span[1]) <= int(span[2]):
            values += [str(number) for number in range(int(span[1]), int(span[2]) + 1)]
        elif span or not part:
            raise RecipeError([Fault("--sweep", name, f"{part!r} is no value", "write 1..8 from the smaller to the larger, or 2k,8k,32k")])
        else:
            thousands = re.fullmatch(r"(\d+)k", part, re.IGNORECASE)
            values.append(str(int(thousands[1]) * 1024) if thousands else part)
    return values


def make_sweep(axes: list[Axis], plan_at: Callable[[dict[str, str]], tuple[Plan, Speed | None]]) -> list[Cell]:
    """A cell each combination; one that cannot be planned says why in its place. Raises RecipeError for too many, or a key that is there twice."""
    twice = {axis.key for axis in axes if sum(other.key == axis.key for other in axes) > 1}
    if twice:
        raise RecipeError([Fault("--sweep", min(twice), "is there twice", "name all its values at once: KEY=VALUE,VALUE")])
    combinations = list(itertools.product(*(axis.values for axis in axes)))
    if len(combinations) > MOST:
        raise RecipeError([Fault("--sweep", "", f"{len(combinations)} combinations, and a table holds {MOST}", "name fewer values")])
    cells = []
    for values in combinations:
        try:
            plan, speed = plan_at({axis.key: value for axis, value in zip(axes, values, strict=True)})
            cells.append(Cell(values=values, plan=plan, speed=speed))
        except RecipeError as error:
            cells.append(Cell(values=values, plan=None, speed=None, problem="; ".join(fault.problem for fault in error.faults)))
        except LauncherError as error:
            cells.append(Cell(values=values, plan=None, speed=None, problem=error.message))
    return cells
