"""What a save costs: how long training waits for it, what training loses until it is durable, its bytes, and how long a load
takes. Beside, on the same state in the same process: DeepSpeed's save_checkpoint and load_checkpoint, and torch's DCP async_save.

    python benchmarks/checkpoint.py 0.1 0.5        sizes of fp32 master and two moments, in GiB; rows of other sizes stay in the results
    python benchmarks/checkpoint.py --training     a real run that saves 20 times as often as by default: what share of it was waiting

One rank, CPU, ZeRO-2, AdamW, full fine-tuning of a random Llama in bf16. `stall_s` is how long the training thread waits; `lost_s` is
what the steps from the save until it is durable took beyond what as many take without one, so it has the background work in it too.
Each is written to `--folder` (a disk) and read back from the page cache. `share` is lost_s at the default cadence (save.every_minutes), of
the wall time: computed, not waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=float, nargs="*", default=[0.1, 0.5, 1.0, 4.0])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--training", action="store_true")
    args = parser.parse_args()
    if args.training:
        write_results(training=measure_training())
        return
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    import deepspeed
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder))
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    try:
        for size in args.sizes:
            row = measure(size, folder)
            write_results(row=row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        deepspeed.comm.destroy_process_group()


def write_results(row: dict[str, Any] | None = None, training: dict[str, Any] | None = None) -> None:
    """Show what was measured and put it in place of what was measured before of the same."""
    from launcher.versions import read_versions

    print(json.dumps(row or training, indent=2), flush=True)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "training": None}
    rows = [old for old in before["rows"] if row is None or old["asked_gib"] != row["asked_gib"]] + ([row] if row else [])
    facts = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "versions": read_versions(),
             "rows": sorted(rows, key=lambda one: one["asked_gib"]), "training": training or before["training"]}  # fmt: skip
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n")


def measure_training(every_minutes: float = 0.5, steps: int = 36) -> dict[str, Any]:
    """SmolLM2-135M, all of it trained, by the command people type: two workers of a Ray of its own, ZeRO-2, on this machine's cores.

    `share` is what training waited for saves, of the wall time from the first step to the last; `share_by_default` is the same wait a
    save at the default cadence. The last save, which a run ends with, is not in them: it has nothing to hide behind.
    """
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        sets = [f"output_dir={folder}", f"schedule.max_steps={steps}", f"save.every_minutes={every_minutes}", "evaluate.samples=[]",
                "data.eval=[]", "track.to=[]"]  # fmt: skip
        words = [sys.executable, "-m", "launcher.cli", str(ROOT / "recipes/smollm2-135m-full.yaml"), *sets]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=460)
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        events = [json.loads(line) for line in metrics.read_text().splitlines()]
    times = [event["time"] for event in events if event["event"] == "step"]
    saves = [event for event in events if event["event"] == "checkpoint" and event["step"] < steps]
    wall = times[-1] - times[0]
    stalls = [save["stall_s"] for save in saves]
    return {
        "steps": steps,
        "every_minutes": every_minutes,
        "wall_s": wall,
        "bytes": saves[0]["bytes"],
        "stalls_s": stalls,
        "write_s": [save["write_s"] for save in saves],
        "share": sum(stalls) / wall,
        "share_by_default": statistics.mean(stalls) / 600,
        "load": os.getloadavg(),
    }


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
    plain = statistics.median(step() for _ in range(5 if size_gib < 1 else 3))
    numel = sum(p.numel() for p in engine.module.parameters())
    row: dict[str, Any] = {"asked_gib": size_gib, "size_gib": round(12 * numel / GIB, 3), "parameters": numel, "step_s": plain}
    every_s = 60 * (plan.recipe.save.every_minutes or 10)
    row["ours"] = measure_ours(plan, engine, step, plain, place)
    row["deepspeed"] = measure_deepspeed(engine, place / "deepspeed")
    row["dcp_async"] = measure_dcp(engine, step, plain, place)
    for name in ("ours", "deepspeed", "dcp_async"):
        row[name]["share"] = row[name]["lost_s"] / (every_s + row[name]["lost_s"])
    row["stall_over_deepspeed"] = row["ours"]["stall_s"] / row["deepspeed"]["stall_s"]
    row["load"] = os.getloadavg()
    engine.destroy()
    shutil.rmtree(place)
    return row


def measure_ours(plan: Any, engine: Any, step: Callable[..., float], plain: float, place: Path) -> dict[str, float]:
    from launcher.checkpoint.commit import load_commit
    from launcher.checkpoint.reshard import Reader
    from launcher.checkpoint.storage import open_storage
    from launcher.train.fragments import load_fragments, put_fragments
    from launcher.train.saving import Saver
    from launcher.train.state import TrainState

    told: list[dict[str, Any]] = []
    lost: list[float] = []
    storage = open_storage(plan.checkpoints)
    saver = Saver(plan, engine, storage, lease=None, identity={}, total_steps=99, best_weights=dict, report=told.append)
    for number in range(1, REPEATS + 1):
        began, steps = time.perf_counter(), 0
        saver.after_step(TrainState(step=number), due=True, failed=False, last=False)
        while saver._thread is not None and saver._thread.is_alive():
            step(saver.settle)
            steps += 1
        saver.finish()
        lost.append(time.perf_counter() - began - steps * plain)
    commit = load_commit(storage, REPEATS)
    loads = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        put_fragments(engine, load_fragments(engine, Reader(storage, commit)), commit.scalars)
        loads.append(time.perf_counter() - began)
    return {"stall_s": statistics.median(e["stall_s"] for e in told), "first_stall_s": told[0]["stall_s"],
            "lost_s": statistics.median(lost), "durable_s": statistics.median(e["write_s"] for e in told),
            "load_s": statistics.median(loads), "bytes": commit.num_bytes}  # fmt: skip


def measure_deepspeed(engine: Any, folder: Path) -> dict[str, float]:
    saves, loads = [], []
    for number in range(REPEATS):
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        engine.save_checkpoint(str(folder), tag=f"s{number}")
        saves.append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for _ in range(REPEATS):
        began = time.perf_counter()
        engine.load_checkpoint(str(folder))
        loads.append(time.perf_counter() - began)
    shutil.rmtree(folder)
    stall = statistics.median(saves)
    return {"stall_s": stall, "first_stall_s": saves[0], "lost_s": stall, "durable_s": stall, "load_s": statistics.median(loads),
            "bytes": size}  # fmt: skip


def measure_dcp(engine: Any, step: Callable[..., float], plain: float, place: Path) -> dict[str, float]:
    import torch.distributed.checkpoint as dcp

    from launcher.train.fragments import list_sources

    sources, _ = list_sources(engine)
    state = {f"{source.kind}/{source.name}": source.tensor for source in sources}
    stalls, durable, lost, loads = [], [], [], []
    for number in range(REPEATS):
        began, steps = time.perf_counter(), 0
        saving = dcp.async_save(state, checkpoint_id=str(place / f"dcp-{number}"))
        stalls.append(time.perf_counter() - began)
        while not saving.done():
            step()
            steps += 1
        saving.result()
        durable.append(time.perf_counter() - began)
        lost.append(time.perf_counter() - began - steps * plain)
        if number:
            shutil.rmtree(place / f"dcp-{number - 1}")
    last = place / f"dcp-{REPEATS - 1}"
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    for _ in range(REPEATS):
        began = time.perf_counter()
        dcp.load(state, checkpoint_id=str(last))
        loads.append(time.perf_counter() - began)
    return {"stall_s": statistics.median(stalls), "first_stall_s": stalls[0], "lost_s": statistics.median(lost),
            "durable_s": statistics.median(durable), "load_s": statistics.median(loads), "bytes": size}  # fmt: skip


if __name__ == "__main__":
    main()
