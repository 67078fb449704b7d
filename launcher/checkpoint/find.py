"""Which checkpoint a person means, and what a run has left to continue from. No torch."""

from __future__ import annotations

from launcher.checkpoint.commit import Commit, find_step, list_committed, load_commit, step_folder
from launcher.checkpoint.shard import DamagedCheckpoint
from launcher.checkpoint.storage import Storage, join_url, open_storage
from launcher.errors import CheckpointError


def split_step_url(url: str) -> tuple[str, int]:
    """The folder of checkpoints and the step of a checkpoint's path or URL. Raises CheckpointError for another path."""
    place, mark, query = url.partition("?")
    folder, _, name = place.rstrip("/").rpartition("/")
    step = find_step(name)
    if step is None:
        raise CheckpointError(f"{url} is no checkpoint", "name a folder such as runs/NAME/checkpoints/step-000120")
    return (folder or ".") + mark + query, step


def find_checkpoint(path_or_url: str) -> str:
    """The path of one checkpoint: the one named, or the newest of a run's folder or of a folder of checkpoints.

    Raises CheckpointError where there is none.
    """
    place, mark, query = path_or_url.partition("?")
    if find_step(place.rstrip("/").rpartition("/")[2]) is not None:
        folder, step = split_step_url(path_or_url)
        if step not in list_committed(open_storage(folder)):
            raise CheckpointError(f"{path_or_url} is no committed checkpoint", "lepton-launch checkpoints RUN lists those there are")
        return path_or_url
    for candidate in (path_or_url, join_url(path_or_url, "checkpoints")):
        steps = list_committed(open_storage(candidate))
        if steps:
            return join_url(candidate, step_folder(max(steps)))
    raise CheckpointError(f"{path_or_url} holds no checkpoint", "name a checkpoint, a run's folder, or the folder of its checkpoints")


def find_newest(storage: Storage) -> Commit | None:
    """The newest commit that can be read; None where there is none."""
    for step in reversed(list_committed(storage)):
        try:
            return load_commit(storage, step)
        except DamagedCheckpoint:
            continue
    return None
