"""run: from a recipe to a fine-tuned model."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from launcher.cli.app import VERBS, JsonOption, OverridesArgument, RecipeArgument, app, print_json
from launcher.errors import BudgetError, ClusterError, Fault, RecipeError

if TYPE_CHECKING:
    from launcher.cli.resuming import Choice
    from launcher.cluster import Cluster
    from launcher.plan import Plan
    from launcher.recipe import Recipe
    from launcher.run import RunFolder


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="How many machines take part.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="A cluster file; without one, this machine.", show_default=False)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers a machine; one a GPU unless told, two on CPU.")] = None,
    accelerator: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="What to compute on; a GPU where there is one.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new folder, whatever an unfinished run has saved.")] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="PATH", help="A new run that begins with this checkpoint (or a run's newest).", show_default=False)
    ] = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Go on although this key of the recipe differs from the checkpoint's.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan with the memory it needs, and stop. Exit code 3: it does not fit.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Plan for this device, such as h100-80gb or rtx-4090.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="With --gpu: how many a machine has; 1 unless told.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="SIZE", help="Plan for, and hold each device to, this much, such as 24GiB.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="A dry run that also shows what was considered for each auto.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="A dry run that also writes a page with the memory's timeline.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUES", help="Plan at each of several values: seq_len=2k,8k,32k nodes=1..8.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune what the recipe says; the word run may be left out."""
    from launcher.cli.planning import check_fits, make_budget_override, show_dry_run, show_sweep
    from launcher.cli.resuming import choose_run, continue_plan
    from launcher.plan.sweep import is_axis
    from launcher.recipe import load_recipe

    path, changes = locate_named_recipe(recipe), tuple(overrides or ()) + make_budget_override(budget)
    dry_run = dry_run or explain or bool(html) or bool(sweep)

    def cluster_of(machines: dict[str, str]) -> Cluster:
        """The cluster, with what a sweep says of it in place of the command line."""
        many = int(machines.get("nodes", nodes or 0)) or None
        each = int(machines.get("gpus_per_node", gpus_per_node or 0)) or None
        return choose_cluster(cluster, many, workers, accelerator, gpu=machines.get("gpu", gpu), gpus_per_node=each, dry_run=dry_run)

    if sweep:
        axes = [*sweep, *(change for change in changes if is_axis(change))]
        kept = tuple(change for change in changes if not is_axis(change))

        def plan_with(more: tuple[str, ...], where: Cluster) -> Plan:
            varied = load_recipe(path, kept + more)
            return make_checked_plan(varied, path, where, Path(varied.output_dir).absolute() / varied.name)

        show_sweep(axes, plan_with, cluster_of, as_json=as_json)
        return
    loaded, chosen = load_recipe(path, changes), cluster_of({})
    choice = choose_run(loaded, fresh=fresh or resume is not None)
    plan = make_checked_plan(loaded, path, chosen, choice.path)
    plan = continue_plan(plan, choice, resume=resume, allow_changed=tuple(allow_changed or ()))
    if dry_run:
        show_dry_run(loaded, plan, explain=explain, html=html, as_json=as_json)
        return
    _run_plan(plan, choice, path, changes, as_json=as_json, check=check_fits)


def _run_plan(
    plan: Plan, choice: Choice, path: Path, changes: tuple[str, ...], *, as_json: bool, check: Callable[[Plan, TextIO], None]
) -> None:
    from launcher.cli.resuming import open_run_folder
    from launcher.progress import make_summary
    from launcher.run import hold_run, read_events
    from launcher.view import print_plan, print_summary, summary_facts

    told = sys.stderr if as_json else sys.stdout
    print_plan(plan, told)
    check(plan, told)
    _check_startable(plan)
    folder = open_run_folder(choice, plan.recipe)
    with hold_run(folder):
        _fill_run_folder(folder, plan, path, changes)
        _run_job(folder, told)
    summary = make_summary(read_events(folder))
    print_summary(summary, folder, told, adapter=plan.recipe.method.kind in ("lora", "qlora"))
    if as_json:
        print_json(summary_facts(summary, folder))


def locate_named_recipe(name_or_path: str) -> Path:
    """The recipe's file. What is no recipe may have been meant as a verb."""
    from launcher.gallery import locate_recipe

    try:
        return locate_recipe(name_or_path)
    except RecipeError:
        near = difflib.get_close_matches(name_or_path, VERBS, 1)
        if near:
            fault = Fault(name_or_path, "", "no verb, no such file and no shipped recipe of this name", f"did you mean {near[0]}?")
            raise RecipeError([fault]) from None
        raise


def choose_cluster(
    file: Path | None,
    nodes: int | None,
    workers: int | None,
    accelerator: Literal["cpu", "cuda"] | None,
    *,
    gpu: str | None = None,
    gpus_per_node: int | None = None,
    dry_run: bool = False,
) -> Cluster:
    """The cluster of the file, of this machine, or of a device of the catalogue, with what the command line asks for. Raises ClusterError."""
    from launcher.cli.planning import choose_planned_cluster
    from launcher.cluster import find_local_cluster, load_cluster

    if gpu is not None:
        return choose_planned_cluster(gpu, nodes, gpus_per_node or workers, file=file, dry_run=dry_run)
    if gpus_per_node is not None:
        raise ClusterError("--gpus-per-node says how many of a device that --gpu names", "add --gpu NAME, or use --workers")
    cluster = load_cluster(file) if file else find_local_cluster(workers, accelerator)
    if accelerator and accelerator != cluster.accelerator:
        raise ClusterError(
            f"--accelerator {accelerator}: {file} says {cluster.accelerator}", "change the cluster file, or drop --accelerator"
        )
    changes = {"nodes": nodes, "workers_per_node": workers}
    return cluster.model_copy(update={name: value for name, value in changes.items() if value})


def make_checked_plan(recipe: Recipe, path: Path, cluster: Cluster, run_path: Path) -> Plan:
    """The plan of a recipe whose data has been looked at too: all that can be wrong before long work."""
    from launcher.data.check import check_data
    from launcher.plan import make_plan

    plan = make_plan(recipe, cluster, base_dir=str(path.parent.resolve()), run_dir=str(run_path))
    check_data(recipe.data, plan.base_dir, has_chat_template=plan.shape.has_chat_template)
    return plan


def _fill_run_folder(folder: RunFolder, plan: Plan, recipe_path: Path, overrides: tuple[str, ...]) -> None:
    """Write the recipe as it was given and the plan."""
    given = "".join(f"#   {line}\n" for line in (str(recipe_path.resolve()), *overrides))
    folder.recipe.write_text(f"# As it was given to lepton-launch:\n{given}{recipe_path.read_text(encoding='utf-8')}", encoding="utf-8")
    dataclasses.replace(plan, run_dir=str(folder.path)).save(folder.plan)


def _check_startable(plan: Plan) -> None:
    """What stands between a good plan and its start: nodes that are not there, a tracker not installed, a disk too full."""
    import shutil

    from launcher.train.metrics import check_trackers
    from launcher.units import DTYPE_BYTES, format_bytes

    if plan.cluster.address == "local" and plan.layout.nodes > 1:
        raise ClusterError(f"the plan needs {plan.layout.nodes} nodes, and this machine is one",
                           "name a running cluster with --cluster FILE, drop --nodes, or add --dry-run to see the plan only")  # fmt: skip
    check_trackers(plan.recipe.track.to)
    saved = plan.trainable_params if plan.recipe.method.kind in ("lora", "qlora") else plan.num_params
    needed = saved * DTYPE_BYTES[plan.layout.dtype]
    place = next(folder for folder in (Path(plan.run_dir), *Path(plan.run_dir).parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BudgetError(f"{place} has {format_bytes(free)} of disk left, and the trained weights take {format_bytes(needed)}"
                          f" ({saved:,} parameters in {plan.layout.dtype})", "free some, or set output_dir to another disk")  # fmt: skip


def _run_job(folder: RunFolder, told: TextIO) -> None:
    from launcher.job.local import run_job
    from launcher.plan import load_plan
    from launcher.progress import make_display

    display = make_display(told)
    try:
        display.show({"event": "phase", "name": "starting Ray"})
        run_job(load_plan(folder.plan), display.show)
    finally:
        display.close()
