"""Predicted against measured memory of real training on this machine's CPU: bytes of live tensors, and resident memory.

    python benchmarks/memory_cpu.py [--only NAME ...] [--out FILE]

Each case runs twice under torchrun: as it is, where the run's own comparison gives the growth of its resident memory, and under torch's
profiler, which sees every tensor that is made and freed (and takes memory itself). benchmarks/results/memory-cpu.json has the last run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gloo import CALL, GONE
from benchmarks.memory_matrix import RESULTS, Case, describe, measure_run, run, save_results

FULL, LORA, QLORA, QLORA_8 = {"kind": "full"}, {"kind": "lora", "r": 16}, {"kind": "qlora", "r": 16}, {"kind": "qlora", "r": 16, "bits": 8}
SMALL_STATES: dict[str, Any] = {"optim": {"name": "sgd"}}
CASES = [
    *(Case(model="tiny", method=method, dtype=dtype, stage=stage, ranks=ranks, checkpointing=checkpointing)
      for method, dtype, stage, ranks, checkpointing in (
          (FULL, "fp32", 0, 1, True), (FULL, "bf16", 1, 2, False), (FULL, "bf16", 3, 1, True), (LORA, "fp32", 1, 2, True), (LORA, "bf16", 2, 1, False),
          (QLORA, "fp32", 2, 1, False), (QLORA, "bf16", 3, 2, True), (QLORA_8, "bf16", 1, 1, True))),
    Case(model="tiny", micro_steps=2, sections={"optim": {"name": "adamw_8bit"}}),
    *(Case(model="0.1b", method=method, dtype=dtype, stage=stage, ranks=ranks, checkpointing=checkpointing, seq_len=seq_len)
      for method, dtype, stage, ranks, checkpointing, seq_len in (
          (FULL, "bf16", 2, 1, False, 128), (FULL, "fp32", 0, 1, True, 128), (LORA, "bf16", 2, 1, True, 256), (LORA, "fp32", 1, 2, False, 128),
          (QLORA, "bf16", 3, 2, True, 128), (QLORA_8, "bf16", 0, 1, False, 128))),
    Case(model="0.1b", stage=1, sections={"optim": {"name": "adamw_8bit"}}),
    *(Case(model="0.4b", method=method, dtype=dtype, stage=stage, checkpointing=checkpointing, sections=sections)
      for method, dtype, stage, checkpointing, sections in (
          (FULL, "bf16", 2, True, SMALL_STATES), (LORA, "bf16", 3, True, {}), (QLORA, "bf16", 1, False, {}), (QLORA_8, "fp32", 2, True, {}))),
    *(Case(model="1.1b", method=method, dtype=dtype, stage=stage, checkpointing=checkpointing, seq_len=64, sections=sections)
      for method, dtype, stage, checkpointing, sections in (
          (FULL, "fp32", 0, True, SMALL_STATES), (LORA, "bf16", 2, True, {}), (QLORA, "bf16", 2, True, {}), (QLORA, "bf16", 3, False, {}),
          (QLORA_8, "bf16", 0, True, {}))),
]  # fmt: skip
"""Not the whole product: each method with each stage, dtype and size, and each with and without checkpointing, as far as 24 GiB take them."""
TENSORS_WITHIN, RESIDENT_WITHIN = 0.03, 0.10


def profile_rank(plan_file: Path) -> None:
    """A rank of the run under the profiler; leaves when how many bytes were live, and on rank 0 the events, in the run folder."""
    import numpy as np
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.gloo import tensors_let_go
    from launcher.plan import load_plan
    from launcher.train.worker import Rank, run_rank

    plan = load_plan(plan_file)
    me = Rank(rank=int(os.environ["RANK"]), local_rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    marks: list[dict[str, Any]] = []
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    profiler.start()
    with tensors_let_go():  # what gloo's threads free is not seen
        run_rank(plan, me, show=lambda event: marks.append({**event, "time_ns": time.time_ns()}), stop_asked=lambda: False)
    profiler.stop()
    np.save(Path(plan.run_dir) / f"live-{me.rank}.npy", np.array(read_profile(profiler), dtype=np.int64))
    if me.rank == 0:
        (Path(plan.run_dir) / "marks.json").write_text(json.dumps(marks))


def read_profile(profiler: Any) -> list[tuple[int, int]]:
    """When (ns) how many bytes were live, of what a profiler saw inside `tensors_let_go`."""
    from torch._C._profiler import _EventType

    seen: list[tuple[int, int, int]] = []
    calls: dict[str, tuple[int, int]] = {}
    gone: dict[str, int] = {}
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            if fields.total_allocated or fields.alloc_size < 0:  # a file that is mapped is told of with a total of zero
                seen.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name.startswith(CALL):
            calls[event.name.removeprefix(CALL)] = event.start_time_ns, event.end_time_ns
        elif event.name.startswith(GONE):
            gone[event.name.removeprefix(GONE)] = event.start_time_ns
        waiting += event.children
    return follow_live(sorted(seen), [(*calls[number], gone[number]) for number in gone])


def follow_live(seen: list[tuple[int, int, int]], calls: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """When how many bytes were live, of what was made or (below zero) freed at which address, and of collectives' (begin, end, gone).

    gloo's threads free, unseen, what a call made in this one: it is gone with the call's tensors, or where its address is given out
    anew if that is earlier.
    """
    held: dict[int, tuple[int, int]] = {}
    points, live = [], 0
    leaving = sorted((gone, begin, end) for begin, end, gone in calls)
    for time_ns, address, size in seen:
        while leaving and leaving[0][0] <= time_ns:
            gone, begin, end = leaving.pop(0)
            for place in [place for place, (_, made) in held.items() if begin <= made <= end]:
                live -= held.pop(place)[0]
            points.append((gone, live))
        live -= held.pop(address, (0, 0))[0]
        if size > 0:
            held[address] = size, time_ns
            live += size
        points.append((time_ns, live))
    return points


def read_live(run_dir: Path, ranks: int) -> dict[str, int]:
    """The peak of live bytes over three steps, and what is held after them: of the rank with most.

    Not while the model is built: the profiler takes a mapped file for what was allocated.
    """
    import numpy as np

    marks = json.loads((run_dir / "marks.json").read_text())
    loading = next(m["time_ns"] for m in marks if m["event"] == "phase" and m["name"] == "loading model")
    start = next(m["time_ns"] for m in marks if m["event"] == "start")
    # Clocks differ by some milliseconds, and the last step is followed by a save: the third is like it.
    last = sorted(m["time_ns"] for m in marks if m["event"] == "step")[-2]
    mapped = next(m["mapped_bytes"] for m in marks if m["event"] == "memory")  # weights in the model's file: no allocator sees them
    found: dict[str, int] = {"stepping": 0, "held": 0}
    for rank in range(ranks):
        times, live = np.load(run_dir / f"live-{rank}.npy").T
        base = int(live[times < loading][-1]) if (times < loading).any() else 0

        def peak(begin: int, end: int, times: Any = times, live: Any = live, base: int = base) -> int:
            return int(live[(times >= begin) & (times < end)].max()) - base

        seen = {"stepping": peak(start, last), "held": int(live[times < last][-1]) - base}
        found = {name: max(found[name], seen[name] + mapped) for name in found}
    return found


def predicted(plan: Any) -> dict[str, int]:
    from launcher.plan.budget import STEPPING

    return {"stepping": max(phase.allocated_bytes for phase in plan.memory.phases if phase.name in STEPPING and phase.name != "evaluation")}


def measure(case: Case, folder: Path) -> dict[str, Any]:
    plan, row = measure_run(case, folder, "cpu")
    run_dir = Path(plan.run_dir)
    (run_dir / "metrics.jsonl").unlink()
    shutil.rmtree(run_dir / "checkpoints")
    # transformers casts weights in threads of its own, and torch's profiler sees the tensors of one thread: here it loads in that one.
    run(plan, [str(Path(__file__)), "--rank", str(run_dir / "plan.json")], env={"HF_DEACTIVATE_ASYNC_LOAD": "1"})
    live, told = read_live(run_dir, case.ranks), predicted(plan)
    row["figures"] |= {name: {"predicted": told[name], "measured": live[name], "error": told[name] / live[name] - 1} for name in told}
    return {**row, "held": live["held"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=Path, help="be a rank of this plan (torchrun)")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name has one of these in it")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory-cpu.json")
    parser.add_argument("--folder", type=Path, help="where models and runs are kept; a temporary folder unless told")
    args = parser.parse_args()
    if args.rank:
        profile_rank(args.rank)
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for case in CASES:
            if not args.only or any(word in case.name for word in args.only):
                rows.append(measure(case, folder))
                print(describe(rows[-1]), flush=True)
                save_results(args.out, rows, benchmark="memory on a CPU")


if __name__ == "__main__":
    main()
