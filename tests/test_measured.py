"""A real run's memory beside its plan: a slice of benchmarks/memory_cpu.py, whose matrix goes to 1.1B parameters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.memory_cpu import CASES, LORA, TENSORS_WITHIN, follow_live, measure
from benchmarks.memory_matrix import Case


def test_bytes_of_live_tensors_are_within_three_percent(tmp_path: Path) -> None:
    """Under torch's profiler; the frozen weights lie in the model's mapped file."""
    row = measure(Case(model="tiny", method=LORA), tmp_path)
    assert abs(row["figures"]["stepping"]["error"]) <= TENSORS_WITHIN, row["figures"]


def test_what_another_thread_freed_is_gone_once_its_place_is_taken() -> None:
    assert follow_live([(1, 0xA, 100), (2, 0xB, 50), (3, 0xA, 70), (4, 0xB, -50), (5, 0xC, -8)], calls=[]) == [
        (1, 100),
        (2, 150),
        (3, 120),
        (4, 70),
        (5, 70),
    ]


def test_what_a_collective_made_is_gone_with_its_tensors() -> None:
    """100 bytes were there before the call, 40 and 20 are made in it; the 20 are freed in sight."""
    seen = [(1, 0xA, 100), (3, 0xB, 40), (4, 0xC, 20), (6, 0xC, -20), (9, 0xD, 5)]
    assert follow_live(seen, calls=[(2, 5, 8)]) == [(1, 100), (3, 140), (4, 160), (6, 140), (8, 100), (9, 105)]


def test_names_of_cases_are_their_own() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in CASES if case.model == "1.1b"], ids=lambda case: case.name)
def test_a_billion_parameters(case: Case, tmp_path: Path) -> None:
    row = measure(case, tmp_path)
    assert abs(row["figures"]["stepping"]["error"]) <= TENSORS_WITHIN, row["figures"]
