"""The errors a run can end with: their exit codes, their words, and how they cross processes; and other libraries' errors in ours."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys

import pytest

from launcher import errors
from launcher.errors import (
    BudgetError,
    CapacityTimeout,
    CheckpointError,
    ClusterError,
    DataError,
    Fault,
    Interrupted,
    LauncherError,
    ModelError,
    NotFinite,
    OutOfMemory,
    RecipeError,
    Stopped,
    TrainingError,
)
from launcher.train.foreign import TABLE, name_error, naming_foreign_errors

EXIT_CODES: dict[type[LauncherError], int] = {
    LauncherError: 1,
    RecipeError: 2,
    BudgetError: 3,
    TrainingError: 4,
    OutOfMemory: 4,
    NotFinite: 4,
    ClusterError: 5,
    Stopped: 6,
    CapacityTimeout: 7,
    DataError: 8,
    ModelError: 8,
    CheckpointError: 9,
    Interrupted: 130,
}
"""Scripts and schedulers read them: a code never changes its meaning."""
FAULTS = (Fault("r.yaml:3", "optim.lr", "'fast' should be a valid number", "Peak learning rate."), Fault("r.yaml:9", "", "the file is odd"))


def make_error(kind: type[LauncherError]) -> LauncherError:
    return RecipeError(FAULTS) if kind is RecipeError else kind("it is wrong: 3 of 4", "do better")


def test_the_table_of_exit_codes_is_complete() -> None:
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LauncherError)}
    assert classes == set(EXIT_CODES)
    assert {kind: kind.exit_code for kind in classes} == EXIT_CODES


def test_exit_codes_leave_those_of_signals_and_of_the_shell_alone() -> None:
    """0 is success; 126 to 128 and 137 (killed) mean something to a shell; 130 is its own for Ctrl-C."""
    assert all(0 < code < 126 or code == 130 for code in EXIT_CODES.values())


@pytest.mark.parametrize("kind", EXIT_CODES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickle(kind: type[LauncherError], protocol: int) -> None:
    error = make_error(kind)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind and vars(again) == vars(error) and again.args == error.args
    assert (str(again), again.exit_code) == (str(error), error.exit_code)


def test_an_error_crosses_to_another_process() -> None:
    sent = pickle.dumps(make_error(RecipeError)).hex()
    code = f"import pickle\nerror = pickle.loads(bytes.fromhex({sent!r}))\nprint(error.exit_code, len(error.faults), error.faults[0].where)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.split() == ["2", "2", "r.yaml:3"]


def test_an_error_says_what_is_wrong_and_then_what_to_do() -> None:
    assert str(DataError("a.jsonl:3 is not JSON", "one object a line")) == "a.jsonl:3 is not JSON\n  → one object a line"
    assert str(DataError("a.jsonl:3 is not JSON")) == "a.jsonl:3 is not JSON"
    assert str(RecipeError(FAULTS)) == (
        "2 faults\n  r.yaml:3  optim.lr: 'fast' should be a valid number\n    → Peak learning rate.\n  r.yaml:9  the file is odd"
    )
    assert str(RecipeError(FAULTS[1:])) == "1 fault\n  r.yaml:9  the file is odd"
    assert RecipeError(iter(FAULTS)).faults == FAULTS


# ------------------------------------------------------------------------------------------------- other libraries' errors


class OutOfMemoryError(RuntimeError):
    """torch.OutOfMemoryError, by its name."""


class SafetensorError(Exception): ...


class GatedRepoError(OSError): ...


class RepositoryNotFoundError(OSError): ...


class RevisionNotFoundError(OSError): ...


SMALLER = "lower batch.micro_batch_size"
FULL = "the disk is full"


@pytest.mark.parametrize(
    ("foreign", "kind", "remedy"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemory, SMALLER),
        (MemoryError(), OutOfMemory, SMALLER),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 9 bytes"), OutOfMemory, SMALLER),
        (RuntimeError("CUDA error: CUDA out of memory"), OutOfMemory, SMALLER),
        (OSError(errno.ENOSPC, "No space left on device"), DataError, FULL),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), DataError, FULL),
        (SafetensorError("Error while deserializing header: header too large"), ModelError, "damaged"),
        (GatedRepoError("403"), ModelError, "HF_TOKEN"),
        (RepositoryNotFoundError("404"), ModelError, "model.name_or_path"),
        (RevisionNotFoundError("404"), ModelError, "model.revision"),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}"[:40] if isinstance(value, Exception) else None,
)
def test_a_foreign_error_is_named_in_ours(foreign: Exception, kind: type[LauncherError], remedy: str) -> None:
    named = name_error(foreign, 3)
    assert type(named) is kind and remedy in named.remedy
    assert named.message.startswith(f"rank 3: {type(foreign).__name__}: ") and "\n" not in named.message
    with pytest.raises(kind) as caught, naming_foreign_errors(3):
        raise foreign
    assert caught.value.__cause__ is foreign


def test_what_ran_out_of_memory_names_the_step_and_its_samples() -> None:
    said = "at step 9, samples 5, 6, 7, 8, 9, 10, 11, 12 and 2 more were in it"
    with pytest.raises(OutOfMemory, match=said), naming_foreign_errors(3, step=9, sample_ids=range(5, 15)):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    with pytest.raises(TrainingError) as caught, naming_foreign_errors(3, step=9, sample_ids=range(3)):
        raise RuntimeError("Connection closed by peer")
    assert "samples" not in caught.value.message


def test_real_errors_of_the_libraries_have_the_names_the_table_knows() -> None:
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError as RealSafetensorError

    names = {kind.__name__ for kind in (hub.GatedRepoError, hub.RepositoryNotFoundError, hub.RevisionNotFoundError, RealSafetensorError)}
    assert names == {"GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError", "SafetensorError"}


def test_every_line_of_the_table_is_reached() -> None:
    """The first that matches counts, so no line may hide behind one above it."""
    samples: list[BaseException] = [
        MemoryError(),
        RuntimeError("can't allocate memory"),
        RuntimeError("CUDA out of memory"),
        OSError(errno.ENOSPC, ""),
        SafetensorError("No space left"),
        SafetensorError("x"),
        GatedRepoError(""),
    ]
    first = [next((line for line, (matches, _, _) in enumerate(TABLE) if matches(error)), None) for error in samples]
    assert first == list(range(len(TABLE)))


def test_what_the_table_does_not_know_is_a_training_error_that_names_the_rank() -> None:
    named = name_error(ValueError("shapes differ\nand more lines"), 1)
    assert type(named) is TrainingError and named.message == "rank 1: ValueError: shapes differ"
    assert "logs" in named.remedy
    assert name_error(KeyError(), 0).message == "rank 0: KeyError: "


@pytest.mark.parametrize("error", [Stopped("asked"), DataError("bad row"), Interrupted("x")])
def test_our_own_errors_pass_as_they_are(error: LauncherError) -> None:
    with pytest.raises(type(error)) as caught, naming_foreign_errors(0):
        raise error
    assert caught.value is error


def test_ctrl_c_is_no_error_of_the_training() -> None:
    with pytest.raises(KeyboardInterrupt), naming_foreign_errors(0):
        raise KeyboardInterrupt
