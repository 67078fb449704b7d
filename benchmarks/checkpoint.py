"""What a save costs: how long training waits for it, until it is durable, its bytes, and how long a load takes. Beside, on the
same state in the same process: DeepSpeed's save_checkpoint and load_checkpoint, and torch's DCP async_save.

    python benchmarks/checkpoint.py 0.1 0.5        sizes of fp32 master and two moments, in GiB

One rank, CPU, ZeRO-2, AdamW, full fine-tuning of a random Llama in bf16. For ours and for DCP the wait is what is added to a training step
by a save before it: staging overlaps the forward and backward pass, if it can. Each is written to `--folder` (a disk).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

RESULTS = ROOT / "benchmarks/results/checkpoint-cpu.json"
REPEATS = 3
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=float, nargs="*", default=[0.1, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    import deepspeed
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder))
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    rows = []
    try:
        for size in args.sizes:
            rows.append(measure(size, folder))
            print(json.dumps(rows[-1], indent=2), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        deepspeed.comm.destroy_process_group()
    from launcher.versions import read_versions

    facts = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "versions": read_versions(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n")


def measure(size_gib: float, folder: Path) -> dict[str, Any]:
    import torch
    from tiny import plan_tiny, write_conversations, write_model

    from launcher.train.model import load_base
    from launcher.train.worker import Rank, build_engine

    place = folder / f"{size_gib:g}"
    place.mkdir()
    layers = max(1, round(size_gib * GIB / 12 / 3_500_000))
    write_model(place / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=layers)
    write_conversations(place / "train.jsonl", 20)
    write_conversations(place / "eval.jsonl", 4)
    plan = plan_tiny(
        place, place / "run", ranks=1, model={"dtype": "bf16"}, save={"keep": 1}, batch={"global_batch_size": 2, "micro_batch_size": 2}
    )
    engine = build_engine(plan, load_base(plan, "cpu"), Rank(rank=0, local_rank=0, world_size=1))
    tokens = torch.randint(3, 500, (2, 64))

    def step(before_update: Callable[[], None] = lambda: None) -> float:
        began = time.perf_counter()
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        before_update()
        engine.step()
        return time.perf_counter() - began

    step()
    plain = statistics.median(step() for _ in range(5))
    numel = sum(p.numel() for p in engine.module.parameters())
    row: dict[str, Any] = {"size_gib": round(12 * numel / GIB, 3), "parameters": numel, "step_s": plain}
    row["ours"] = measure_ours(plan, engine, step, place)
    row["deepspeed"] = measure_deepspeed(engine, place / "deepspeed")
    row["dcp_async"] = measure_dcp(engine, step, plain, place)
    row["stall_over_deepspeed"] = row["ours"]["stall_s"] / row["deepspeed"]["stall_s"]
    engine.destroy()
    shutil.rmtree(place)
    return row


def measure_ours(plan: Any, engine: Any, step: Callable[..., float], place: Path) -> dict[str, float]:
    from launcher.checkpoint.commit import load_commit
    from launcher.checkpoint.reshard import Reader
    from launcher.checkpoint.storage import open_storage
    from launcher.train.fragments import load_fragments, put_fragments
    from launcher.train.saving import Saver
    from launcher.train.state import TrainState

    told: list[dict[str, Any]] = []
    storage = open_storage(plan.checkpoints)
    saver = Saver(plan, engine, storage, lease=None, identity={}, total_steps=99, best_weights=dict, report=told.append)
    for number in range(1, REPEATS + 1):
        saver.after_step(TrainState(step=number), due=True, failed=False, last=False)
        step(saver.settle)
        while not saver._written.is_set() or (saver._thread is not None and saver._thread.is_alive()):
            time.sleep(0.01)
        saver.finish()
    commit = load_commit(storage, REPEATS)
    began = time.perf_counter()
    put_fragments(engine, load_fragments(engine, Reader(storage, commit)), commit.scalars)
    return {"stall_s": statistics.median(e["stall_s"] for e in told), "first_stall_s": told[0]["stall_s"],
            "durable_s": statistics.median(e["write_s"] for e in told), "load_s": time.perf_counter() - began, "bytes": commit.num_bytes}  # fmt: skip


def measure_deepspeed(engine: Any, folder: Path) -> dict[str, float]:
    saves = []
    for number in range(REPEATS):
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        engine.save_checkpoint(str(folder), tag=f"s{number}")
        saves.append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    began = time.perf_counter()
    engine.load_checkpoint(str(folder))
    return {"stall_s": statistics.median(saves), "load_s": time.perf_counter() - began, "bytes": size}


def measure_dcp(engine: Any, step: Callable[..., float], plain: float, place: Path) -> dict[str, float]:
    import torch.distributed.checkpoint as dcp

    from launcher.train.fragments import list_sources

    sources, _ = list_sources(engine)
    state = {f"{source.kind}/{source.name}": source.tensor for source in sources}
    stalls, durable = [], []
    for number in range(REPEATS):
        began = time.perf_counter()
        saving = dcp.async_save(state, checkpoint_id=str(place / f"dcp-{number}"))
        called = time.perf_counter() - began
        step()
        saving.result()
        durable.append(time.perf_counter() - began)
        stalls.append(called)
        if number:
            shutil.rmtree(place / f"dcp-{number - 1}")
    last = place / f"dcp-{REPEATS - 1}"
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    began = time.perf_counter()
    dcp.load(state, checkpoint_id=str(last))
    return {
        "stall_s": statistics.median(stalls),
        "durable_s": statistics.median(durable),
        "load_s": time.perf_counter() - began,
        "bytes": size,
    }


if __name__ == "__main__":
    main()
