"""run: from a recipe to a fine-tuned model."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from launcher.cli.app import VERBS, ClusterOption, JsonOption, OverridesArgument, RecipeArgument, app, print_json
from launcher.errors import BudgetError, ClusterError, Fault, RecipeError

if TYPE_CHECKING:
    from launcher.cluster import Cluster
    from launcher.job.package import GoingOn
    from launcher.plan import Plan
    from launcher.plan.solve import Choice as Considered
    from launcher.recipe import Recipe
    from launcher.resuming import Choice
    from launcher.run import RunFolder


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[
        str | None, typer.Option(metavar="N or N..M", help="How many machines take part; 2..4 goes on with what is there.")
    ] = None,
    cluster: ClusterOption = None,
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
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="How many a machine has, with --gpu; how many of a machine take part, on a cluster.")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="SIZE", help="Plan for, and hold each device to, this much, such as 24GiB.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="A dry run that also shows what was considered for each auto.")] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="A dry run that takes activations from a trace on torch's meta device. It takes torch, and seconds."),
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="A dry run that also writes a page with the memory's timeline.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUES", help="Plan at each of several values: seq_len=2k,8k,32k nodes=1..8.")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="A folder that all nodes share, for run folders.", show_default=False)] = None,
    capacity_timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long to wait for nodes: 90s, 10m, 2h. [default: 10m]")
    ] = None,
    cpus_per_worker: Annotated[int | None, typer.Option(min=1, help="Cores that Ray sets aside for a worker. [default: 1]")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only nodes with this Ray label; may be repeated.")] = None,
    secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An environment variable for the workers, never printed; may be repeated.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the cluster has the run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune what the recipe says; the word run may be left out."""
    from launcher.cli.planning import check_fits, make_budget_override, show_dry_run, show_sweep
    from launcher.plan.sweep import is_axis
    from launcher.recipe_file import load_recipe
    from launcher.resuming import choose_run, continue_plan

    path, changes = locate_named_recipe(recipe), tuple(overrides or ()) + make_budget_override(budget)
    dry_run = dry_run or explain or trace or bool(html) or bool(sweep)
    options = make_ray_options(storage, capacity_timeout, cpus_per_worker, label, secret)

    def cluster_of(machines: dict[str, str]) -> Cluster:
        """The cluster, with what a sweep says of it in place of the command line."""
        many = machines.get("nodes", nodes)
        each = int(machines.get("gpus_per_node", gpus_per_node or 0)) or None
        return choose_cluster(
            cluster, many, workers, accelerator, options, gpu=machines.get("gpu", gpu), gpus_per_node=each, dry_run=dry_run
        )

    if sweep:
        if html or explain:
            raise typer.BadParameter("--sweep prints a table, or with --json its rows; --html and --explain are of one plan")
        axes = [*sweep, *(change for change in changes if is_axis(change))]
        kept = tuple(change for change in changes if not is_axis(change))

        def plan_with(more: tuple[str, ...], where: Cluster) -> Plan:
            varied = load_recipe(path, kept + more)
            return make_checked_plan(varied, path, where, Path(varied.output_dir).absolute() / varied.name, trace=trace)[0]

        show_sweep(axes, plan_with, cluster_of, as_json=as_json)
        return
    loaded, chosen = load_recipe(path, changes), cluster_of({})
    if is_elsewhere(chosen, dry_run):
        from launcher.cli.jobs import run_on_cluster

        going_on: GoingOn = {"fresh": fresh, "resume": resume or "", "allow_changed": tuple(allow_changed or ())}
        each = workers or gpus_per_node
        run_on_cluster(loaded, path, changes, chosen, each, going_on, dry_run=dry_run, detach=detach, as_json=as_json)
        return
    choice = choose_run(loaded, fresh=fresh or resume is not None)
    plan, considered = make_checked_plan(loaded, path, chosen, choice.path, trace=trace)
    plan = continue_plan(plan, choice, resume=resume, allow_changed=tuple(allow_changed or ()))
    if dry_run:
        show_dry_run(plan, considered if explain else None, html=html, as_json=as_json)
        return
    _run_plan(plan, choice, path, changes, as_json=as_json, check=check_fits)


def _run_plan(
    plan: Plan, choice: Choice, path: Path, changes: tuple[str, ...], *, as_json: bool, check: Callable[[Plan, TextIO], None]
) -> None:
    from launcher.progress import make_summary
    from launcher.resuming import open_run_folder
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
    name: str | None,
    nodes: str | None,
    workers: int | None,
    accelerator: Literal["cpu", "cuda"] | None,
    options: dict[str, Any] | None = None,
    *,
    gpu: str | None = None,
    gpus_per_node: int | None = None,
    dry_run: bool = False,
) -> Cluster:
    """The cluster of that name, file or address, this machine, or a device of the catalogue, with what the command line asks for.

    Without a name, a run on one node stays on this machine, whatever else runs here; one on several goes to the cluster
    that this machine belongs to; and a dry run is for machines like this one. Raises ClusterError.
    """
    from launcher.cli.planning import choose_planned_cluster
    from launcher.cluster import Cluster, find_local_cluster, load_cluster, locate_cluster, make_node_range

    least, most = make_node_range(nodes) if nodes else (None, None)
    if gpu is not None:
        return choose_planned_cluster(gpu, most, gpus_per_node or workers, file=Path(name) if name else None, dry_run=dry_run)
    file = locate_cluster(name) if name else None
    if file:
        cluster = load_cluster(file)
    elif name or "RAY_ADDRESS" in os.environ or ((most or 1) > 1 and not dry_run):
        cluster = Cluster(name=name or "auto", address=name or os.environ.get("RAY_ADDRESS", "auto"))
    else:
        cluster = find_local_cluster(workers, accelerator)
    if gpus_per_node is not None and cluster.address == "local":
        raise ClusterError("--gpus-per-node says how many of a device that --gpu names", "add --gpu NAME, or use --workers")
    workers = workers or gpus_per_node
    if accelerator and accelerator != cluster.accelerator and "accelerator" in cluster.model_fields_set:
        raise ClusterError(
            f"--accelerator {accelerator}: {file or 'this machine'} says {cluster.accelerator}",
            "change the cluster file, or drop --accelerator",
        )
    changes = {"nodes": most, "workers_per_node": workers, "accelerator": accelerator}
    asked = {**(options or {}), **({"min_nodes": least} if least != most else {})}
    ray = cluster.ray.model_copy(update=asked)
    return cluster.model_copy(update={**{key: value for key, value in changes.items() if value}, **({"ray": ray} if asked else {})})


def make_ray_options(
    storage: str | None, capacity_timeout: str | None, cpus_per_worker: int | None, labels: list[str] | None, secrets: list[str] | None
) -> dict[str, Any]:
    """What the command line says about placing a run, as fields of the cluster's `ray` section. Raises ClusterError."""
    from launcher.units import make_seconds

    told: dict[str, Any] = {"storage": storage, "cpus_per_worker": cpus_per_worker, "secrets": tuple(secrets or ())}
    for label in labels or ():
        key, mark, value = label.partition("=")
        if not mark:
            raise ClusterError(f"--label {label}: a label has a value", "write --label KEY=VALUE")
        told.setdefault("labels", {})[key] = value
    if capacity_timeout:
        try:
            told["capacity_timeout_s"] = make_seconds(capacity_timeout)
        except ValueError as error:
            raise ClusterError(f"--capacity-timeout: {error}", "write 90s, 10m or 2h") from None
    return {key: value for key, value in told.items() if value}


def is_elsewhere(cluster: Cluster, dry_run: bool) -> bool:
    """Whether a running Ray is needed: to run on, or, for a dry run, to be asked what it has."""
    from launcher.plan.devices import PLANNED

    if cluster.address in ("local", PLANNED):
        return False
    return not (dry_run and {"device_memory", "host_memory"} <= cluster.model_fields_set)


def make_checked_plan(recipe: Recipe, path: Path, cluster: Cluster, run_path: Path, *, trace: bool = False) -> tuple[Plan, Considered]:
    """The plan of a recipe whose data has been looked at too, all that can be wrong before long work, and what its autos were chosen among."""
    from launcher.cli.planning import MetaTracer
    from launcher.data.check import check_data
    from launcher.plan.plan import make_explained_plan

    plan, considered = make_explained_plan(
        recipe, cluster, base_dir=str(path.parent.resolve()), run_dir=str(run_path), tracer=MetaTracer(asked=trace), trace=trace
    )
    check_data(recipe.data, plan.base_dir, has_chat_template=plan.shape.has_chat_template)
    return plan, considered


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
    if plan.layout.nvme_path is not None:
        raise RecipeError([Fault("plan", "parallel.nvme_path", "is planned for, and not yet run: checkpoints read the states in memory",
                                 "drop it to offload to host memory; --dry-run shows what each takes")])  # fmt: skip
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
