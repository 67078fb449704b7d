"""Runs on a cluster: started, listed, looked at, followed, stopped."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from launcher.cli.app import ClusterOption, JobArgument, JsonOption, app, print_json
from launcher.errors import ClusterError, DataError, Fault, Interrupted, LauncherError, ModelError, RecipeError, Stopped

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from launcher.cluster import Cluster
    from launcher.job.package import GoingOn
    from launcher.job.submit import Job
    from launcher.plan import Plan
    from launcher.recipe import Recipe
    from launcher.run import Event


def run_on_cluster(
    recipe: Recipe,
    path: Path,
    changes: tuple[str, ...],
    cluster: Cluster,
    workers: int | None,
    going_on: GoingOn,
    *,
    dry_run: bool,
    detach: bool,
    as_json: bool,
) -> None:
    """Plan, send and follow a run. Where only the cluster reaches the model or the data, the plan is made there."""
    from launcher.cli.planning import check_fits, show_dry_run
    from launcher.job.client import describe_access, describe_cluster, find_api_url, load_nodes, open_client
    from launcher.job.package import FILES, Order, read_secrets
    from launcher.job.submit import submit
    from launcher.view import print_plan

    told = sys.stderr if as_json else sys.stdout
    client = open_client(cluster.address)
    url = find_api_url(client)
    access, warning = describe_access(url)
    cluster = describe_cluster(load_nodes(client), cluster.model_copy(update={"address": url}), workers)
    recipe = recipe.model_copy(update={"output_dir": choose_storage(recipe, cluster)})
    plan = _try_plan(recipe, cluster, str(path.parent.resolve()))
    if plan and dry_run:
        show_dry_run(plan, as_json=as_json)
        return
    if plan:
        print_plan(plan, told)
        check_fits(plan, told)
        plan = dataclasses.replace(plan, base_dir=FILES)
    print(f"cluster    {access}", file=told)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    order = Order(recipe=recipe.model_dump(mode="json"), cluster=cluster.model_dump(mode="json"), base_dir=FILES,
                  plan=plan.to_dict() if plan else None, dry_run=dry_run, **going_on)  # fmt: skip
    given = "".join(f"#   {line}\n" for line in (str(path.resolve()), *changes))
    text = f"# As it was given to lepton-launch:\n{given}{path.read_text(encoding='utf-8')}"
    job, is_new = submit(client, order, text, path.parent.resolve(), read_secrets(cluster.ray.secrets))
    verb = "sent as" if is_new else "is running already, as"
    print(f"run        {job.run} {verb} {job.submission_id}", file=told)
    if detach and not dry_run:
        print("\n".join(describe_handles(job, url)), file=told)
        if as_json:
            print_json(_facts(job))
        return
    _follow(client, job, url, told, as_json=as_json, planned=plan is not None, dry_run=dry_run)


def choose_storage(recipe: Recipe, cluster: Cluster) -> str:
    """Where run folders are made on a cluster. Raises RecipeError where nothing says a folder that all nodes share."""
    if cluster.ray.storage:
        return cluster.ray.storage
    if Path(recipe.output_dir).is_absolute():
        return recipe.output_dir
    problem = f"{recipe.output_dir} is a folder of this machine, and the run is on {cluster.nodes} others"
    raise RecipeError(
        [
            Fault(
                "cluster", "ray.storage", problem, "name a folder that all nodes share: --storage /mnt/nfs/runs, or ray.storage in the file"
            )
        ]
    )


def _try_plan(recipe: Recipe, cluster: Cluster, base_dir: str) -> Plan | None:
    """The plan, or None where the model or the data are not here: they may be where the cluster is."""
    from launcher.data.check import check_data
    from launcher.plan import make_plan

    try:
        plan = make_plan(recipe, cluster, base_dir=base_dir, run_dir=str(Path(recipe.output_dir) / recipe.name))
        check_data(recipe.data, base_dir, has_chat_template=plan.shape.has_chat_template)
    except (ModelError, DataError):
        return None
    return plan


def describe_handles(job: Job, url: str) -> list[str]:
    """What to type to come back to a run, and to end it."""
    return [f"{verb:<11}lepton-launch {verb} {job.run} --cluster {url}" for verb in ("attach", "logs", "stop")]


def _follow(client: JobSubmissionClient, job: Job, url: str, told: TextIO, *, as_json: bool, planned: bool, dry_run: bool = False) -> None:
    """Show a run until it ends; raises the error that it ended with. Ctrl-C lets go of it."""
    from launcher.job.submit import follow
    from launcher.progress import make_display, make_summary
    from launcher.run import RunFolder
    from launcher.view import print_summary, summary_facts

    events: list[Event] = []
    plans: list[Plan] = []
    display = make_display(told)

    def show(event: Event) -> None:
        if event["event"] == "plan":
            plans.append(_read_plan(event, None if planned or (dry_run and as_json) else told))
        else:
            events.append(event)
            display.show(event)

    try:
        error = follow(client, job.submission_id, show)
    except KeyboardInterrupt:
        display.close()
        raise Interrupted(f"detached; {job.run} goes on", "\n    ".join(describe_handles(job, url))) from None
    finally:
        display.close()
    if error is not None:
        raise error
    if dry_run:
        if as_json and plans:
            print_json(plans[0].to_dict())
        return
    summary, folder = make_summary(events), RunFolder(Path(plans[0].run_dir if plans else job.folder))
    adapter = bool(plans) and plans[0].recipe.method.kind in ("lora", "qlora")
    print_summary(summary, folder, told, adapter=adapter)
    if as_json:
        print_json(summary_facts(summary, folder))


def _read_plan(event: Event, told: TextIO | None) -> Plan:
    from launcher.plan import read_plan
    from launcher.view import print_plan

    plan = read_plan(event["plan"])
    if told is not None:
        print_plan(plan, told)
    return plan


def _open(cluster: str | None) -> tuple[JobSubmissionClient, str]:
    """The cluster of --cluster, or the one this machine belongs to, and its URL."""
    import os

    from launcher.cluster import load_cluster, locate_cluster
    from launcher.job.client import find_api_url, open_client

    name = cluster or os.environ.get("RAY_ADDRESS", "auto")
    file = locate_cluster(name)
    address = load_cluster(file).address if file else name
    if address == "local":
        raise ClusterError(f"{name} runs on this machine only, without a cluster", "look into its run folder, or name a cluster")
    client = open_client(address)
    return client, find_api_url(client)


def _facts(job: Job) -> dict[str, Any]:
    return dataclasses.asdict(job)


@app.command(name="list")
def list_runs(cluster: ClusterOption = None, as_json: JsonOption = False) -> None:
    """The runs that a cluster knows, the newest first."""
    from launcher.job.submit import list_jobs
    from launcher.view import print_jobs

    client, url = _open(cluster)
    jobs = list_jobs(client)
    if as_json:
        print_json([_facts(job) for job in jobs])
    elif jobs:
        print_jobs(jobs, sys.stdout)
    else:
        print(f"no runs on {url}")


@app.command()
def status(run: JobArgument, cluster: ClusterOption = None, as_json: JsonOption = False) -> None:
    """How far a run on a cluster is."""
    from launcher.job.submit import find_job, load_progress
    from launcher.view import print_status

    client, url = _open(cluster)
    job = find_job(client, run)
    progress = load_progress(client, job)
    if as_json:
        print_json({**_facts(job), **progress})
    else:
        print_status(job, progress, sys.stdout)
        if not job.is_over:
            print("\n".join(describe_handles(job, url)))


@app.command()
def logs(
    run: JobArgument,
    cluster: ClusterOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="All that this rank printed, noise included.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a run said; of one rank with --rank. With --json an event a line."""
    import json

    from launcher.job.submit import find_job, load_events
    from launcher.job.submit import follow as follow_job
    from launcher.progress import describe_event

    def show(event: Event) -> None:
        if rank is not None and rank not in event.get("ranks", ()):
            return
        text = event["text"] if rank is not None else describe_event(event)
        if as_json:
            print(json.dumps(event), flush=True)
        elif text:
            print(text, flush=True)

    client, _ = _open(cluster)
    job = find_job(client, run)
    if not follow:
        events = load_events(client, job)
        if rank is not None:
            _check_rank(job, events, rank)
        for event in events:
            show(event)
        return
    error = follow_job(client, job.submission_id, show)
    if error is not None:
        raise error


def _check_rank(job: Job, events: list[Event], rank: int) -> None:
    """Raises DataError for a rank that no group of the run has had."""
    sizes = [event["plan"]["layout"]["world_size"] for event in events if event["event"] == "plan"]
    if sizes and rank >= max(sizes):
        raise DataError(f"{job.run} has no rank {rank}", f"its ranks are 0 to {max(sizes) - 1}")


@app.command()
def attach(run: JobArgument, cluster: ClusterOption = None, as_json: JsonOption = False) -> None:
    """Follow a run to its end; the exit code is the run's. Ctrl-C lets go of it."""
    from launcher.job.submit import find_job

    client, url = _open(cluster)
    _follow(client, find_job(client, run), url, sys.stderr if as_json else sys.stdout, as_json=as_json, planned=True)


@app.command()
def stop(
    run: JobArgument,
    cluster: ClusterOption = None,
    grace: Annotated[str | None, typer.Option(metavar="TIME", help="How long it may take to save. [default: 60s]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a run to save, wait for it, and see it end. The same command as before continues it later."""
    from launcher.job import submit
    from launcher.units import make_seconds

    try:
        grace_s = make_seconds(grace) if grace else None
    except ValueError as error:
        raise ClusterError(f"--grace: {error}", "write 60s or 5m") from None
    client, _ = _open(cluster)
    job = submit.find_job(client, run)
    if not job.is_over:
        print(f"{job.run}: asked to save and stop", file=sys.stderr)
        submit.stop(client, job, grace_s)
        job = submit.wait_until_over(client, job, within_s=(grace_s if grace_s is not None else submit.DEFAULT_GRACE_S) + submit.GIVE_UP_S)
    ended = submit.load_end(client, job)
    if as_json:
        print_json({**_facts(job), "ended_with": ended.message if ended else ""})
    elif not job.is_over:
        raise ClusterError(f"{job.run} has not stopped yet", "see lepton-launch logs")
    else:
        print(f"{job.run}: {_describe_end(job, ended)}")


def _describe_end(job: Job, ended: LauncherError | None) -> str:
    if isinstance(ended, Stopped):
        return f"{ended.message}" + (f"; {ended.remedy}" if ended.remedy else "")
    if ended is None:
        return "had finished" if job.state == "SUCCEEDED" else "stopped"
    return f"had failed: {ended.message}"
