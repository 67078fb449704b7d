"""checkpoints: what a run has saved; checking, pruning and turning it into a plain model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from launcher.cli.app import JsonOption, app, print_json
from launcher.errors import CheckpointError

if TYPE_CHECKING:
    from launcher.checkpoint.storage import Storage

RunOrPlace = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder or name, or a path or URL of checkpoints.", show_default=False)
]
StepOption = Annotated[int | None, typer.Option(help="Which step's; the newest unless told.", show_default=False)]


class _RunFirst(TyperGroup):
    """`checkpoints RUN` lists; the verb may stand before the run or after it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [args[1], args[0], *args[2:]] if len(args) > 1 and args[1] in self.commands else ["list", *args]
        return super().parse_args(ctx, args)


checkpoints_app = typer.Typer(
    cls=_RunFirst, no_args_is_help=True, help="List a run's checkpoints; verify, prune, inspect or consolidate them."
)
app.add_typer(checkpoints_app, name="checkpoints")


def open_run_storage(run: str) -> Storage:
    """The storage of a run's checkpoints. Raises DataError for a run that is not there."""
    from launcher.checkpoint.commit import list_steps
    from launcher.checkpoint.storage import join_url, open_storage
    from launcher.plan import load_plan
    from launcher.run import find_run

    if "://" in run or not (Path(run) / "plan.json").is_file():
        for place in (run, join_url(run, "checkpoints")):
            if ("://" in run or Path(place).is_dir()) and list_steps(storage := open_storage(place)):
                return storage
        if "://" in run:
            raise CheckpointError(f"{run} holds no checkpoint", "name the folder of a run on the storage, or of its checkpoints")
    return open_storage(load_plan(find_run(run).plan).checkpoints)


def _choose_step(storage: Storage, step: int | None) -> int:
    from launcher.checkpoint.commit import list_committed

    steps = list_committed(storage)
    if not steps:
        raise CheckpointError(f"{storage.url} holds no committed checkpoint", "a run saves by save.every_steps and save.every_minutes")
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step}", f"there are those of step {', '.join(map(str, steps))}")
    return max(steps) if step is None else step


@checkpoints_app.command("list")
def checkpoints_list(
    run: RunOrPlace,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare it with its hash.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Step, size, world size, and whether each is whole."""
    from launcher.checkpoint.verify import find_damage, list_found
    from launcher.view import print_checkpoints

    storage = open_run_storage(run)
    rows = []
    for found in list_found(storage):
        damage = find_damage(storage, found.step) if verify and found.condition == "committed" else None
        verified = None if damage is None else not damage
        rows.append({**found.facts(), "verified": verified, **({"why": "; ".join(damage)} if damage else {})})
    print_json({"checkpoints": storage.url, "steps": rows}) if as_json else print_checkpoints(storage.url, rows, sys.stdout)


@checkpoints_app.command("verify")
def checkpoints_verify(run: RunOrPlace, step: StepOption = None, as_json: JsonOption = False) -> None:
    """Read every byte and compare it with its hash; exit code 9 where one differs."""
    from launcher.checkpoint.commit import list_committed
    from launcher.checkpoint.verify import find_damage

    storage = open_run_storage(run)
    steps = list_committed(storage) if step is None and list_committed(storage) else [_choose_step(storage, step)]
    damage = {}
    for one in steps:
        damage[one] = find_damage(storage, one)
        if not as_json:
            print(f"step {one}: {'whole' if not damage[one] else 'DAMAGED'}", *damage[one], sep="\n  ", flush=True)
    if as_json:
        print_json(
            {"checkpoints": storage.url, "steps": [{"step": one, "verified": not found, "damage": found} for one, found in damage.items()]}
        )
    if any(damage.values()):
        raise typer.Exit(CheckpointError.exit_code)


@checkpoints_app.command("prune")
def checkpoints_prune(
    run: RunOrPlace,
    keep: Annotated[int, typer.Option(min=1, help="How many stay, the newest.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete all but the newest checkpoints; the best evaluation's stays where the newest remembers one."""
    from launcher.checkpoint.commit import choose_kept, list_steps, load_commit, prune
    from launcher.checkpoint.lease import find_owner

    storage = open_run_storage(run)
    newest = load_commit(storage, _choose_step(storage, None))
    if (owner := find_owner(storage)) is not None:
        raise CheckpointError(
            f"the run is at work: process {owner['pid']} on {owner['host']}", "it prunes by save.keep itself; stop it first"
        )
    best = newest.best_step
    kept = choose_kept([found for found in list_steps(storage)], keep, best)
    gone = [step for step in list_steps(storage) if step not in kept and step < newest.step] if dry_run else prune(storage, keep, best)
    if as_json:
        print_json({"checkpoints": storage.url, "deleted": gone, "dry_run": dry_run})
    else:
        told = ", ".join(map(str, gone)) or "none"
        print(f"{'would delete' if dry_run else 'deleted'} the checkpoints of step: {told}")


@checkpoints_app.command("inspect")
def checkpoints_inspect(run: RunOrPlace, step: StepOption = None, as_json: JsonOption = False) -> None:
    """What a checkpoint holds: where the run was, what it was made from, tensors by kind, bytes by rank."""
    from launcher.checkpoint.commit import load_commit
    from launcher.checkpoint.reshard import Reader
    from launcher.units import format_bytes

    storage = open_run_storage(run)
    commit = load_commit(storage, _choose_step(storage, step))
    kinds: dict[str, dict[str, int]] = {}
    for manifest in Reader(storage, commit).manifests:
        for fragment in manifest.fragments:
            held = kinds.setdefault(fragment.kind, {"fragments": 0, "elements": 0, "bytes": 0})
            held["fragments"] += 1
            held["elements"] += fragment.length
            held["bytes"] += fragment.num_bytes
    if as_json:
        print_json({**dataclasses.asdict(commit), "bytes": commit.num_bytes, "kinds": kinds})
        return
    print(f"step {commit.step} of {commit.total_steps}, {format_bytes(commit.num_bytes)}, ZeRO-{commit.zero_stage} on {commit.world_size} ranks, {commit.optimizer}")  # fmt: skip
    for title, facts in (
        ("state", commit.state),
        ("made from", {"model.name_or_path": commit.base_model} | commit.identity),
        ("versions", commit.versions),
    ):
        print(f"\n{title}")
        for key, value in facts.items():
            print(f"  {key:<32}{value}")
    print("\nholds")
    for kind, held in sorted(kinds.items()):
        print(f"  {kind:<16}{held['fragments']:>6} fragments {held['elements']:>14,} elements  {format_bytes(held['bytes'])}")


@checkpoints_app.command("consolidate")
def checkpoints_consolidate(
    run: RunOrPlace,
    step: StepOption = None,
    output: Annotated[Path | None, typer.Option(help="Where to write it; RUN/step-N unless told.", show_default=False)] = None,
    best: Annotated[bool, typer.Option("--best", help="The weights of the best evaluation before it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a plain adapter or model folder, on this machine and without a cluster."""
    from launcher.plan import load_plan
    from launcher.run import find_run
    from launcher.view import show_path

    folder = find_run(run)
    storage = open_run_storage(run)
    chosen = _choose_step(storage, step)
    from launcher.train.consolidate import consolidate
    from launcher.train.generate import quiet_libraries

    quiet_libraries()
    target = (output or folder.path / f"step-{chosen}").absolute()
    written = consolidate(load_plan(folder.plan), storage, chosen, target, best=best)
    print_json({"step": chosen, "model": str(written)}) if as_json else print(show_path(written))
