"""glibc's heap, as the plan replays it and as workers set it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import plan_tiny

from launcher.plan import heap as heap_module
from launcher.plan.heap import ENVIRONMENT, LEAST_THRESHOLD, MOST_THRESHOLD, Heap, choose_threshold, heap_environment, keep_beside, replay
from launcher.plan.memory import make_workload
from launcher.plan.tape import GRAPH_OBJECT

MIB = 1 << 20
IN_WAVES = """
import json, sys
import torch
from pathlib import Path
from launcher.plan import load_plan
from launcher.train.budget import bound_heap, forget_peak, read_anonymous, read_peak_anonymous, return_heap
bound_heap(load_plan(Path(sys.argv[1])), loading=False)
events, held = json.loads(sys.argv[2]), {}
return_heap()
forget_peak()
base = read_anonymous()
for _, size, key in events:
    if size > 0:
        held[key] = torch.ones(size, dtype=torch.uint8)
    else:
        del held[key]
print(read_peak_anonymous() - base, read_anonymous() - base)
"""


def make_waves() -> list[tuple[str, int, int]]:
    """Small blocks, of which the last stays above the hole of the others; large ones beside it, each larger than it; small ones of another size in it."""
    small, large, other = range(40), range(40, 42), range(42, 72)
    events = [("forward", (880 + key) << 10, key) for key in small] + [("forward", -(880 + key) << 10, key) for key in small[:-1]]
    for keys, size in ((large, 40 * MIB), (other, 300 << 10), (large, 40 * MIB)):
        events += [("forward", size, key) for key in keys]
        events += [("forward", -size, key) for key in keys]
    return events


@pytest.fixture
def saved(tiny: Path, tmp_path: Path) -> Path:
    plan_tiny(tiny, tmp_path, ranks=1).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def run(code: str, *words: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, env=os.environ | ENVIRONMENT)
    return [int(word) for word in done.stdout.split()]


def test_a_process_grows_by_what_the_replay_has(saved: Path) -> None:
    """One in which nothing small settles between tensors (what does is fitted); no block is of a size that a hole just takes."""
    events = make_waves()
    peak, after = run(IN_WAVES, str(saved), json.dumps(events))
    resident, live = replay(events, LEAST_THRESHOLD)["forward"]
    assert peak == pytest.approx(resident, rel=0.05) and resident > live + 25 * MIB
    assert after < peak - 60 * MIB, "large blocks went back"


def test_a_large_block_is_given_back_whatever_was_freed_before(saved: Path) -> None:
    """By glibc's own rule a freed block of 24 MiB makes the heap the place of the next; something small above it then keeps it there."""
    code = """
import sys
from pathlib import Path
import torch
from launcher.plan import load_plan
from launcher.train.budget import bound_heap, read_anonymous
if sys.argv[2] == "bound":
    bound_heap(load_plan(Path(sys.argv[1])), loading=False)
base = read_anonymous()
large = torch.ones(24 << 20, dtype=torch.uint8)
del large
large, small = torch.ones(24 << 20, dtype=torch.uint8), torch.ones(300 << 10, dtype=torch.uint8)
del large
print(read_anonymous() - base)
"""
    (bound,), (free,) = (run(code, str(saved), mode) for mode in ("bound", "free"))
    assert bound < 4 * MIB and free > 20 * MIB


def test_blocks_of_the_threshold_leave_nothing_behind() -> None:
    heap = Heap(4 * MIB)
    for key in range(8):
        heap.allocate(key, 5 * MIB)
    for key in range(8):
        heap.free(key)
    heap.forget_peak()
    assert heap.peak_resident == heap.live == 0


def test_what_is_freed_is_joined_and_the_top_goes_back() -> None:
    heap = Heap(4 * MIB)
    for key in range(40):
        heap.allocate(key, MIB)
    assert heap.peak_resident == pytest.approx(40 * MIB, rel=0.02)
    for key in range(40):
        heap.free(key)
    while heap.pieces:
        heap._free(heap.pieces.pop())
    assert not heap.holes and heap.end == 0 and heap.top < 4 * MIB


def test_a_hole_that_stays_is_slack() -> None:
    """A block that lives on above freed ones keeps them, until as much is wanted again."""
    events = [("forward", MIB, key) for key in range(10)] + [("forward", -MIB, key) for key in range(9)]
    events += [("backward", 8 * MIB, 20), ("backward", -8 * MIB, 20)]
    peaks = replay(events, 16 * MIB)
    resident, live = peaks["backward"]
    assert live == 9 * MIB and resident == pytest.approx(10 * MIB, rel=0.05), "the hole of 9 MiB is taken again"
    resident, live = replay([event for event in events if event[0] == "forward"] + [("backward", MIB // 4, 20)], 16 * MIB)["backward"]
    assert live == MIB + MIB // 4 and resident == pytest.approx(10 * MIB, rel=0.05), "and stays whole where little is wanted"


@pytest.mark.parametrize(("backward", "most"), [(False, 6), (True, 40)])
def test_nodes_in_pieces_keep_a_hole_from_its_own_size(monkeypatch: pytest.MonkeyPatch, backward: bool, most: int) -> None:
    """Thirty tensors, each gone before the next comes; their nodes with them, or not before the backward pass."""
    monkeypatch.setattr(heap_module, "NODES_IN_PIECES", 1.0)
    events = []
    for turn in range(0, 120, 4):
        events += [("forward", MIB, turn), ("forward", GRAPH_OBJECT, turn + 1), ("forward", 64 << 10, turn + 2), ("forward", -MIB, turn)]
        events += [] if backward else [("forward", -GRAPH_OBJECT, turn + 1)]
    events += [("backward", -GRAPH_OBJECT, turn + 1) for turn in range(0, 120, 4) if backward]
    resident, live = replay(events, 4 * MIB)["forward"]
    assert live == pytest.approx(MIB + 30 * (64 << 10), rel=0.01)
    assert most / 2 * MIB < resident < most * MIB


def test_what_a_process_begins_with() -> None:
    assert heap_environment("cpu", {}) == ENVIRONMENT and heap_environment("cuda", {}) == {}
    assert heap_environment("cpu", {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}) == {}, "what the user has set stays"


def test_what_gloos_threads_keep() -> None:
    """Two threads: of gathering no more than is not mapped by itself, of reducing two segments of a quarter of the tensor, or a MiB each."""
    assert keep_beside(10 * MIB, 0, 2, 4 * MIB) == 8 * MIB and keep_beside(MIB, 0, 2, 4 * MIB) == 2 * MIB
    assert keep_beside(0, MIB, 2, 4 * MIB) == MIB and keep_beside(0, 1 << 30, 2, 4 * MIB) == 4 * MIB
    assert keep_beside(10 * MIB, MIB, 1, 4 * MIB) == 0


def test_the_threshold_lies_above_a_layers_activations(tiny: Path, tmp_path: Path) -> None:
    plan = plan_tiny(tiny, tmp_path)
    work = make_workload(plan.recipe, plan.shape, plan.layout, plan.batch)
    assert choose_threshold(work) == LEAST_THRESHOLD
    from dataclasses import replace

    long = replace(work, seq_len=(9 * MIB) // (work.shape.intermediate_size * work.width * work.micro_batch_size))
    assert choose_threshold(long) == 16 * MIB
    assert choose_threshold(replace(work, seq_len=1 << 24)) == MOST_THRESHOLD
