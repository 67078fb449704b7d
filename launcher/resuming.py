"""Which run a command means: the unfinished one of that name, or a new one."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.checkpoint.commit import Commit
    from launcher.plan import Plan
    from launcher.recipe import Recipe
    from launcher.run import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The run folder, and the newest checkpoint in it; a new run has none. `note` says why this folder."""

    path: Path
    newest: Commit | None
    note: str


def choose_run(recipe: Recipe, *, fresh: bool) -> Choice:
    """The newest run of the recipe's name if it is unfinished and has a checkpoint, else a new folder.

    A run on a storage of its own is found there too, without its folder: by any machine. Raises CheckpointError where
    the newest run is at work.
    """
    from launcher.checkpoint.find import find_newest
    from launcher.checkpoint.storage import open_storage
    from launcher.plan import checkpoints_url
    from launcher.run import RunFolder, hold_run, read_status

    output_dir = Path(recipe.output_dir).absolute()
    last: Choice | None = None
    for number in itertools.count(1):
        path = output_dir / (recipe.name if number == 1 else f"{recipe.name}-{number}")
        newest = find_newest(open_storage(checkpoints_url(recipe, str(path))))
        if newest is None and not path.exists():
            break
        last = Choice(path=path, newest=newest, note="")
    if last is None or fresh:
        return Choice(path=path, newest=None, note="")
    if last.path.is_dir():
        with hold_run(RunFolder(last.path)):
            state = read_status(RunFolder(last.path)).get("state", "unfinished")
    else:
        state = "unfinished"
    if state == "finished":
        return Choice(path=path, newest=None, note=f"{last.path.name} is finished: this is a new run, {path.name}")
    if last.newest is None:
        return Choice(path=path, newest=None, note=f"{last.path.name} ended before its first checkpoint: this is a new run, {path.name}")
    what = "was cut short" if state == "running" else state if state == "unfinished" else f"is {state}" if state == "stopped" else "failed"
    note = f"goes on: {last.path.name} {what}; its newest checkpoint is of step {last.newest.step} of {last.newest.total_steps} (--fresh starts over)"
    return dataclasses.replace(last, note=note)


def continue_plan(plan: Plan, choice: Choice, *, resume: str | None, allow_changed: tuple[str, ...]) -> Plan:
    """The plan with where it begins. Raises CheckpointError for a checkpoint of another recipe, as far as can be told before it runs."""
    from launcher.checkpoint.commit import load_commit
    from launcher.checkpoint.find import find_checkpoint, split_step_url
    from launcher.checkpoint.identity import check_keys, check_same, make_identity
    from launcher.checkpoint.storage import open_storage

    check_keys(allow_changed)
    named = find_checkpoint(resume) if resume else ""
    commit = choice.newest
    if named:
        place, step = split_step_url(named)
        commit = load_commit(open_storage(place), step)
    notes = plan.notes
    if commit is not None:
        what = f"the checkpoint {named}" if named else f"the unfinished run {choice.path}"
        check_same(commit.identity, make_identity(plan.recipe, dtype=plan.layout.dtype), allow_changed, what)
    if named:
        notes = (*notes, f"begins with the checkpoint {named}")
    elif choice.note:
        notes = (*notes, choice.note)
    return dataclasses.replace(plan, resume=named, allow_changed=allow_changed, notes=notes)


def open_run_folder(choice: Choice, recipe: Recipe) -> RunFolder:
    """The folder of the run that goes on, or a new one. Raises RecipeError where none can be made."""
    from launcher.run import RunFolder, make_run_folder

    if choice.newest is None:
        return make_run_folder(Path(recipe.output_dir), recipe.name, choice.path)
    (choice.path / "logs").mkdir(parents=True, exist_ok=True)
    return RunFolder(choice.path.resolve())
