"""A plan is worth what the kernel says: TinyLlama's geometry in a memory cgroup of its predicted peak and a tenth."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.memory_cgroup import measure, why_not
from benchmarks.memory_matrix import STEPS


@pytest.mark.long
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can")
def test_qlora_of_a_billion_weights_trains_where_full_fine_tuning_is_killed(tmp_path: Path) -> None:
    found = measure(tmp_path)
    qlora, full = found["qlora"], found["full"]
    # Its P95 is above the limit, which is the expected need (P50) and a tenth.
    assert qlora["predicted"] < found["limit"] < full["predicted"] and (qlora["ended"], qlora["steps"]) == (0, STEPS), qlora["said"]
    assert qlora["peak"] <= found["limit"]
    assert full["verdict"] == "DOES NOT FIT" and full["ended"] in (-9, 137) and full["steps"] == 0
