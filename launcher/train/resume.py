"""From storage back into the engine: which checkpoint to take, and everything in it put where it was."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint.commit import Commit, list_committed, load_commit, mark_damaged
from launcher.checkpoint.find import split_step_url
from launcher.checkpoint.identity import check_same, hash_weights, make_identity
from launcher.checkpoint.reshard import Reader
from launcher.checkpoint.shard import DamagedCheckpoint
from launcher.checkpoint.storage import Storage, open_storage
from launcher.errors import CheckpointError, LauncherError
from launcher.plan import Plan
from launcher.run import Event, cache_dir
from launcher.train.fragments import Loaded, load_best, load_fragments, put_fragments, put_loss_scale
from launcher.train.model import list_weight_files
from launcher.train.randomness import load_random_states, put_random_states, seed_rank
from launcher.train.state import TrainState, read_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where the run goes on. `source` is the checkpoint's path, empty for a run that begins."""

    state: TrainState
    best_weights: dict[str, torch.Tensor]
    source: str


def make_run_identity(plan: Plan, data_hashes: list[str]) -> dict[str, Any]:
    """What this run is made from, on every rank; the base model's files are read by rank 0 alone, once."""
    held: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            weights = hash_weights(list_weight_files(plan), cache_dir() / "hashes")
            held = [make_identity(plan.recipe, dtype=plan.layout.dtype, weights=weights, data=" ".join(data_hashes))]
        except LauncherError as error:
            held = [error]
    dist.broadcast_object_list(held, src=0)
    if isinstance(held[0], LauncherError):
        raise held[0]
    identity: dict[str, Any] = held[0]
    return identity


def resume(plan: Plan, engine: Any, own: Storage, identity: dict[str, Any], report: Callable[[Event], None]) -> Resumed:
    """Continue from the newest whole checkpoint of this run, or, where it has none, from the one that the plan names.

    A damaged checkpoint is set aside, said so, and the one before is taken. Raises CheckpointError where all are damaged,
    or where what is asked for is not what a checkpoint was made from. Every rank takes part.
    """
    damaged: list[str] = []
    while (step := _ask_rank_0(partial(_newest, own))) is not None:
        found = _try(plan, engine, own, step, identity, report)
        if isinstance(found, Resumed):
            return found
        damaged.append(found)
        report({"event": "note", "text": f"checkpoint of step {step} is damaged and left out: {found}"})
        _ask_rank_0(partial(mark_damaged, own, step, found))
    if damaged:
        raise CheckpointError(f"none of the run's {len(damaged)} checkpoints is whole; the newest: {damaged[0]}", "start over with --fresh")
    if not plan.resume:
        return Resumed(state=TrainState(), best_weights={}, source="")
    place, named = split_step_url(plan.resume)
    found = _try(plan, engine, open_storage(place), named, identity, report)
    if isinstance(found, Resumed):
        return found
    raise CheckpointError(
        f"{plan.resume} is damaged: {found}", "lepton-launch checkpoints RUN verify shows which of its checkpoints are whole"
    )


def _newest(storage: Storage) -> int | None:
    return max(list_committed(storage), default=None)


def _try(plan: Plan, engine: Any, storage: Storage, step: int, identity: dict[str, Any], report: Callable[[Event], None]) -> Resumed | str:
    """Load a checkpoint into the engine, or say what is damaged in it."""
    report({"event": "phase", "name": f"reading the checkpoint of step {step}"})
    found: tuple[Commit, list[str]] | str = _ask_rank_0(partial(_load_checked, plan, storage, step, identity))
    if isinstance(found, str):
        return found
    commit, changes = found
    problem: CheckpointError | None = None
    loaded = None
    try:
        reader = Reader(storage, commit)
        loaded = load_fragments(engine, reader), load_best(engine, reader), load_random_states(reader)
    except CheckpointError as error:
        problem = error
    except OSError as error:
        problem = _judge(error, f"{storage.url}/{commit.folder}")
    problems: list[CheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        if not isinstance(problem, DamagedCheckpoint):
            raise problem
    if loaded is None or any(problems):
        return next(problem.message for problem in problems if problem)
    for change in changes:
        report({"event": "note", "text": f"changed since the checkpoint: {change}"})
    fragments, best_weights, random_states = loaded
    _put(plan, engine, commit, fragments, random_states)
    return Resumed(state=read_state(commit.state), best_weights=best_weights, source=f"{storage.url}/{commit.folder}")


def _judge(error: OSError, place: str) -> CheckpointError:
    """A disk that cannot read its own bytes has lost them; any other failure says nothing about the checkpoint, which is left as it is."""
    text = f"{place} cannot be read: {type(error).__name__}: {error}"
    return (
        DamagedCheckpoint(text) if error.errno == errno.EIO else CheckpointError(text, "the same command again, once the storage answers")
    )


def _put(plan: Plan, engine: Any, commit: Commit, fragments: Loaded, random_states: dict[str, torch.Tensor]) -> None:
    put_fragments(engine, fragments, commit.scalars)
    put_loss_scale(engine, {name: value for name, value in commit.scalars.items() if name != "step"})
    if random_states:
        put_random_states(random_states)
    else:
        seed_rank(plan.recipe.seed, dist.get_rank(), int(commit.state["samples_seen"]))


def _load_checked(plan: Plan, storage: Storage, step: int, identity: dict[str, Any]) -> tuple[Commit, list[str]] | str:
    try:
        commit = load_commit(storage, step)
    except DamagedCheckpoint as error:
        return error.message
    changes = check_same(commit.identity, identity, plan.allow_changed, f"the checkpoint {storage.url}/{commit.folder}")
    return commit, [str(change) for change in changes]


def _ask_rank_0(question: Callable[[], Any]) -> Any:
    """Rank 0's answer on every rank, or its error."""
    held: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            held[0] = question()
        except (LauncherError, OSError) as error:
            held[1] = error
    dist.broadcast_object_list(held, src=0)
    if held[1] is not None:
        raise held[1]
    return held[0]
