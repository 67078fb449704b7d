"""Everything this program raises on purpose, and the exit code of each.

    LauncherError                1
    ├── RecipeError              2   the recipe (or cluster file) is wrong
    ├── BudgetError              3   it does not fit the memory there is
    ├── TrainingError            4   training started and failed
    │   ├── OutOfMemory          4
    │   └── NotFinite            4   the loss became NaN or infinite
    ├── ClusterError             5   no such cluster, device or node, or it refused
    ├── Stopped                  6   somebody asked the run to stop
    ├── CapacityTimeout          7   the nodes did not come in time
    ├── DataError                8   a data file, a row, a split
    │   └── ModelError           8   a model folder, a tokenizer, a template
    ├── CheckpointError          9   nothing to resume from, or not this run's
    └── Interrupted            130   Ctrl-C while attached

A message says what is wrong, the numbers, where they come from, and what would work.
Errors cross processes, so each survives pickle: its arguments are its facts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


class LauncherError(Exception):
    """What is wrong (`message`) and what to do about it (`remedy`)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a file a person wrote: `where` is file:line (or `--set`), `key` dotted."""

    where: str
    key: str
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        head = f"{self.where}  {self.key}: {self.problem}" if self.key else f"{self.where}  {self.problem}"
        return f"{head}\n    → {self.remedy}" if self.remedy else head


class RecipeError(LauncherError):
    """A recipe or cluster file that cannot be run; carries every fault found in it."""

    exit_code = 2

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        count = f"{len(self.faults)} faults" if len(self.faults) != 1 else "1 fault"
        LauncherError.__init__(self, "\n".join([count, *(f"  {fault}" for fault in self.faults)]))
        self.args = (self.faults,)


class BudgetError(LauncherError):
    exit_code = 3


class TrainingError(LauncherError):
    exit_code = 4


class OutOfMemory(TrainingError):
    pass


class NotFinite(TrainingError):
    pass


class ClusterError(LauncherError):
    exit_code = 5


class Stopped(LauncherError):
    exit_code = 6


class CapacityTimeout(LauncherError):
    exit_code = 7


class DataError(LauncherError):
    exit_code = 8


class ModelError(DataError):
    pass


class CheckpointError(LauncherError):
    exit_code = 9


class Interrupted(LauncherError):
    exit_code = 130
