"""run: from a recipe to a fine-tuned model."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from launcher.cli.app import VERBS, JsonOption, OverridesArgument, RecipeArgument, app, print_json
from launcher.errors import BudgetError, ClusterError, Fault, RecipeError

if TYPE_CHECKING:
    from launcher.cluster import Cluster
    from launcher.plan import Plan
    from launcher.run import RunFolder


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="How many machines take part.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="A cluster file; without one, this machine.", show_default=False)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers a machine; one a GPU unless told, two on CPU.")] = None,
    accelerator: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="What to compute on; a GPU where there is one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune what the recipe says; the word run may be left out."""
    from launcher.progress import make_summary
    from launcher.run import read_events
    from launcher.view import print_plan, print_summary, summary_facts

    told = sys.stderr if as_json else sys.stdout
    path, changes = locate_named_recipe(recipe), tuple(overrides or ())
    plan = make_checked_plan(path, changes, choose_cluster(cluster, nodes, workers, accelerator))
    if dry_run and as_json:
        print_json(plan.to_dict())
        return
    print_plan(plan, told)
    if dry_run:
        return
    folder = _start_run_folder(plan, path, changes)
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


def choose_cluster(file: Path | None, nodes: int | None, workers: int | None, accelerator: Literal["cpu", "cuda"] | None) -> Cluster:
    """The cluster of the file or of this machine, with what the command line asks for. Raises ClusterError."""
    from launcher.cluster import find_local_cluster, load_cluster

    cluster = load_cluster(file) if file else find_local_cluster(workers, accelerator)
    if accelerator and accelerator != cluster.accelerator:
        raise ClusterError(
            f"--accelerator {accelerator}: {file} says {cluster.accelerator}", "change the cluster file, or drop --accelerator"
        )
    changes = {"nodes": nodes, "workers_per_node": workers}
    return cluster.model_copy(update={name: value for name, value in changes.items() if value})


def make_checked_plan(path: Path, overrides: tuple[str, ...], cluster: Cluster) -> Plan:
    """The plan of a recipe whose data has been looked at too: all that can be wrong before long work."""
    from launcher.data.check import check_data
    from launcher.plan import make_plan
    from launcher.recipe import load_recipe
    from launcher.run import next_run_path

    recipe = load_recipe(path, overrides)
    run_path = next_run_path(Path(recipe.output_dir), recipe.name)
    plan = make_plan(recipe, cluster, base_dir=str(path.parent.resolve()), run_dir=str(run_path))
    check_data(recipe.data, plan.base_dir, has_chat_template=plan.shape.has_chat_template)
    return plan


def _start_run_folder(plan: Plan, recipe_path: Path, overrides: tuple[str, ...]) -> RunFolder:
    """Make the run folder with the recipe as it was given and the plan in it."""
    from launcher.run import make_run_folder

    _check_startable(plan)
    folder = make_run_folder(Path(plan.recipe.output_dir), plan.recipe.name)
    given = "".join(f"#   {line}\n" for line in (str(recipe_path.resolve()), *overrides))
    folder.recipe.write_text(f"# As it was given to lepton-launch:\n{given}{recipe_path.read_text(encoding='utf-8')}", encoding="utf-8")
    dataclasses.replace(plan, run_dir=str(folder.path)).save(folder.plan)
    return folder


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
