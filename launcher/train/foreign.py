"""Other libraries' errors, named in ours: one table, at the boundary of the training side."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from launcher.errors import DataError, LauncherError, ModelError, OutOfMemory, TrainingError

SMALLER = "lower batch.micro_batch_size or data.seq_len, raise parallel.zero_stage, or use method.kind qlora"

TABLE: tuple[tuple[Callable[[BaseException], bool], type[LauncherError], str], ...] = (
    (lambda e: type(e).__name__ in ("OutOfMemoryError", "MemoryError"), OutOfMemory, SMALLER),
    (lambda e: isinstance(e, RuntimeError) and "allocate memory" in str(e), OutOfMemory, SMALLER),
    (lambda e: isinstance(e, RuntimeError) and "CUDA out of memory" in str(e), OutOfMemory, SMALLER),
    (
        lambda e: isinstance(e, OSError) and e.errno == errno.ENOSPC,
        DataError,
        "the disk is full: free space there, or set output_dir elsewhere",
    ),
    (
        lambda e: type(e).__name__ == "SafetensorError" and "No space left" in str(e),
        DataError,
        "the disk is full: free space there, or set output_dir elsewhere",
    ),
    (lambda e: type(e).__name__ == "SafetensorError", ModelError, "the weights are damaged: download them again"),
    (
        lambda e: type(e).__name__ in ("GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError"),
        ModelError,
        "check model.name_or_path, model.revision and HF_TOKEN",
    ),
)
"""What an error looks like, what it is here, and what to do. The first that matches counts."""


@contextmanager
def naming_foreign_errors(rank: int, *, step: int | None = None, sample_ids: Sequence[int] = ()) -> Iterator[None]:
    """Raises LauncherErrors only. What the table does not know is a TrainingError that names the rank.

    Within a step, what ran out of memory names the step and the samples that were in it."""
    try:
        yield
    except LauncherError:
        raise
    except Exception as error:
        named = name_error(error, rank)
        if isinstance(named, OutOfMemory) and step is not None:
            named = OutOfMemory(f"{named.message}; at step {step}, {say_samples(sample_ids)} in it", named.remedy)
        raise named from error


def say_samples(sample_ids: Sequence[int]) -> str:
    """The first of a step's samples, by their ids, and how many there are."""
    shown = ", ".join(str(sample) for sample in sample_ids[:8])
    return f"samples {shown} and {len(sample_ids) - 8} more were" if len(sample_ids) > 8 else f"samples {shown} were"


def name_error(error: Exception, rank: int) -> LauncherError:
    first = next(iter(str(error).strip().splitlines()), "")
    what = f"rank {rank}: {type(error).__name__}: {first}"
    for matches, kind, remedy in TABLE:
        if matches(error):
            return kind(what, remedy)
    return TrainingError(what, "the traceback is in the run's logs/")
