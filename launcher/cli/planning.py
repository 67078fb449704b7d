"""What `run` does with --dry-run, --gpu, --budget, --explain, --html and --sweep: plan for devices that may not be here, and show it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from launcher.cli.app import print_json
from launcher.errors import BudgetError, ClusterError, Fault, ModelError, RecipeError

if TYPE_CHECKING:
    from launcher.cluster import Cluster
    from launcher.plan import Plan
    from launcher.plan.dry_run import DryRun
    from launcher.plan.profile import StepProfile
    from launcher.plan.shape import ModelShape
    from launcher.plan.solve import Choice
    from launcher.plan.workload import Workload

DOES_NOT_FIT = BudgetError.exit_code


@dataclasses.dataclass(frozen=True, slots=True)
class MetaTracer:
    """A launcher.plan.memory.Tracer that imports torch when it is needed. `asked`: with --trace, so that what cannot be traced is an error."""

    asked: bool = False

    def profile(self, work: Workload, *, keep_gradients: bool) -> StepProfile | str:
        profiling = _import_profiling(must=self.asked or not work.shape.is_known, kind=work.shape.model_type)
        if profiling is None:
            return "torch is not installed"
        found: StepProfile | str = profiling.profile(work, keep_gradients=keep_gradients)
        if isinstance(found, str) and self.asked:
            raise ModelError(f"a {work.shape.model_type} cannot be traced on the meta device: {found}", "plan without --trace")
        return found

    def count(self, shape: ModelShape) -> ModelShape:
        profiling = _import_profiling(must=True, kind=shape.model_type)
        counted: ModelShape = profiling.count(shape)
        return counted


def _import_profiling(*, must: bool, kind: str) -> Any:
    """launcher.train.profiling, or None without torch. Raises ModelError where it `must` be there."""
    try:
        from launcher.train import profiling
    except ImportError as error:
        if not must:
            return None
        raise ModelError(
            f"a {kind} can be planned by a trace on torch's meta device only, and {error.name or 'torch'} is not installed",
            "pip install torch transformers peft (the CPU build does), or plan for an architecture that docs/dry-run.md lists",
        ) from None
    return profiling


def make_budget_override(budget: str | None) -> tuple[str, ...]:
    """`--budget 24GiB` as the recipe's key. Raises RecipeError for what is no size."""
    from launcher.units import make_bytes

    if budget is None:
        return ()
    try:
        make_bytes(budget)
    except ValueError as error:
        raise RecipeError([Fault("command line", "--budget", str(error))]) from None
    return (f"memory.budget={budget}",)


def choose_planned_cluster(gpu: str, nodes: int | None, gpus_per_node: int | None, *, file: Path | None, dry_run: bool) -> Cluster:
    """Machines with this device, to plan for. For a real run they must be this machine's. Raises ClusterError."""
    from launcher.cluster import find_gpus, find_local_cluster
    from launcher.plan.devices import find_device, make_cluster

    if file is not None:
        raise ClusterError("--gpu and --cluster both say what there is", "name one of the two")
    device = find_device(gpu)
    if dry_run:
        return make_cluster(device, nodes=nodes or 1, gpus_per_node=gpus_per_node or 1)
    here = find_gpus()
    if not here or find_device(here[0][0]) != device:
        found = f"this machine has {len(here)} × {here[0][0]}" if here else "this machine has no GPU"
        raise ClusterError(f"--gpu {gpu}: {found}", "add --dry-run to plan for that device, or name a running cluster with --cluster FILE")
    return find_local_cluster(gpus_per_node, "cuda").model_copy(update={"nodes": nodes or 1})


def show_dry_run(plan: Plan, choice: Choice | None = None, *, html: Path | None = None, as_json: bool) -> None:
    """Print (and write) the dry run of a plan; exit 3 where it does not fit."""
    from launcher.plan.dry_run import make_document, make_dry_run
    from launcher.view import print_plan
    from launcher.view_plan import print_dry_run

    dry = make_dry_run(plan, choice)
    if html is not None:
        _write_page(dry, html)
    if as_json:
        print_json(make_document(dry))
    else:
        print_plan(plan, sys.stdout, without=("memory",))
        print_dry_run(dry, sys.stdout)
        if html is not None:
            print(f"\nwritten: {html}")
    if plan.memory.verdict == "DOES NOT FIT":
        raise typer.Exit(DOES_NOT_FIT)
    _warn_of(plan, sys.stderr)


def _write_page(dry: DryRun, path: Path) -> None:
    from launcher.html_plan import make_page

    try:
        path.write_text(make_page(dry), encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            [Fault("--html", str(path), f"cannot be written: {error.strerror}", "name a file in a folder that is there")]
        ) from None


def check_fits(plan: Plan, told: TextIO) -> None:
    """Refuse a run that cannot start or is expected not to fit; warn of one that may not. Raises ModelError, or BudgetError with what would fit."""
    from launcher.plan.plan import make_suggestions
    from launcher.plan.source import locate_model
    from launcher.plan.trainable import find_obstacle
    from launcher.units import format_bytes
    from launcher.view_plan import describe_verdict, format_changes

    locate_model(plan.recipe.model.name_or_path, plan.base_dir)
    if (obstacle := find_obstacle(plan.shape, plan.recipe)) is not None:
        raise ModelError(f"the run cannot start: {obstacle}", "add --dry-run to plan it all the same")
    memory = plan.memory
    known = plan.recipe.memory.budget is not None or plan.cluster.device_memory > 1
    too_much = memory.device("total").p50 > memory.budget or (memory.host_budget is not None and memory.host.p50 > memory.host_budget)
    if known and too_much:
        suggestions = make_suggestions(plan)
        remedy = "; or ".join(f"{' '.join(format_changes(item.changes))} (needs {format_bytes(item.need)})" for item in suggestions[:3])
        raise BudgetError(
            f"the run does not fit: {describe_verdict(plan)}", remedy or "take more or larger devices; --dry-run shows what needs how much"
        )
    if known:
        _warn_of(plan, told)


def _warn_of(plan: Plan, told: TextIO) -> None:
    from launcher.view_plan import describe_verdict

    if plan.memory.verdict == "TIGHT":
        print(f"warning: it fits tightly: {describe_verdict(plan)}", file=told)
    elif plan.memory.verdict == "DOES NOT FIT":
        print(f"warning: it may not fit: {describe_verdict(plan)}", file=told)


def show_sweep(
    axes: list[str],
    plan_with: Callable[[tuple[str, ...], Cluster], Plan],
    cluster_of: Callable[[dict[str, str]], Cluster],
    *,
    as_json: bool,
) -> None:
    """Print what fits where: a row each combination of the axes' values. Exit 2 where none of them can be planned."""
    from launcher.plan.dry_run import estimate_plan
    from launcher.plan.speed import Speed
    from launcher.plan.sweep import MACHINES, make_sweep, read_axis
    from launcher.view_plan import print_sweep

    read = [read_axis(axis) for axis in axes]

    def plan_at(values: dict[str, str]) -> tuple[Plan, Speed | None]:
        machines = {key: value for key, value in values.items() if key in MACHINES}
        overrides = tuple(f"{key}={value}" for key, value in values.items() if key not in MACHINES)
        plan = plan_with(overrides, cluster_of(machines))
        return plan, estimate_plan(plan)

    cells = make_sweep(read, plan_at)
    if as_json:
        rows = []
        for cell in cells:
            row = dict(zip((axis.name for axis in read), cell.values, strict=True))
            memory = None if cell.plan is None else cell.plan.memory.to_dict()
            facts = None if memory is None else {key: memory[key] for key in ("verdict", "decisive_phase", "budget_bytes", "device")}
            rows.append(
                {
                    "at": row,
                    "problem": cell.problem or None,
                    "step_s": cell.speed.step_s if cell.speed else None,
                    **(facts or {"verdict": None}),
                }
            )
        print_json({"schema_version": 1, "axes": [axis.name for axis in read], "rows": rows})
    else:
        print_sweep(cells, [axis.name for axis in read], sys.stdout)
    if all(cell.plan is None for cell in cells):
        raise typer.Exit(RecipeError.exit_code)
