"""A rank of a real training run is killed (SIGKILL) at points of a save; the run is resumed and ends as the unbroken one, bit by bit.

tests/test_checkpoint_files.py kills at every operation of the storage without training; here DeepSpeed trains.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, fine_tune, losses
from test_resume import plan_case, read_exported, read_shards

from launcher.plan import Plan

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["deepspeed", "transformers", "peft", "launcher.train.worker"])


def train_until_killed(rank: int, meeting: str, plan: Plan, victim: int, kill_at: int, told: Any) -> None:
    """A rank's process: it trains, and rank `victim` dies at its storage's operation number `kill_at`."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    import deepspeed
    import torch
    import torch.distributed as dist

    from launcher.checkpoint.storage import open_storage
    from launcher.run import RunFolder
    from launcher.train.worker import Rank
    from launcher.train.worker import fine_tune as run

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    done = 0

    def watch(word: str) -> None:
        nonlocal done
        if word.startswith("read"):
            return
        if rank == victim and done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    me = Rank(rank=rank, local_rank=rank, world_size=2)
    run(plan, me, RunFolder(Path(plan.run_dir)), lambda event: None, lambda: False, open_storage(plan.checkpoints, watch), None)
    told.put((rank, done))
    told.close()
    told.join_thread()
    os._exit(0)


def run_and_kill(plan: Plan, victim: int, kill_at: int, meeting: Path) -> dict[int, int]:
    """Train on two fresh processes; returns how many operations each did, where none was killed."""
    told = FORKS.Queue()
    processes = [FORKS.Process(target=train_until_killed, args=(rank, str(meeting), plan, victim, kill_at, told)) for rank in range(2)]
    for process in processes:
        process.start()
    processes[max(victim, 0)].join(120)
    if victim >= 0:
        assert processes[victim].exitcode == -signal.SIGKILL, "it was to be killed"
        processes[1 - victim].kill()
    operations = {} if victim >= 0 else dict(told.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(120)
    return operations


def assert_killed_is_unbroken(two_ranks: Ranks, tiny: Path, tmp_path: Path, first: int, every: int) -> None:
    case: dict[str, Any] = {"method": "lora", "dtype": "bf16", "save": {"every_steps": 2, "keep": 2}}
    straight = two_ranks.run(fine_tune, plan_case(tiny, tmp_path / "straight", 2, **case))[0]
    operations = run_and_kill(plan_case(tiny, tmp_path / "counted", 2, **case), -1, -1, tmp_path / "meeting-counted")
    points = [(rank, at) for rank in range(2) for at in range(operations[rank])]
    assert len(points) >= 1000
    begun = set()
    for rank, at in points[first::every]:
        run_dir = tmp_path / f"{rank}-{at}"
        run_and_kill(plan_case(tiny, run_dir, 2, **case), rank, at, tmp_path / f"meeting-{rank}-{at}")
        resumed = two_ranks.run(fine_tune, plan_case(tiny, run_dir, 2, **case))[0]
        start = next(event["step"] for event in resumed if event["event"] == "start")
        begun.add(start)
        assert losses(resumed) == losses(straight)[start:]
        assert read_shards(run_dir, 6) == read_shards(tmp_path / "straight", 6)
        assert read_exported(run_dir) == read_exported(tmp_path / "straight")
        shutil.rmtree(run_dir)
    assert begun >= {0, 2, 4}


@pytest.mark.timeout(300)
def test_killed_at_some_points_of_training(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    assert_killed_is_unbroken(two_ranks, tiny, tmp_path, first=0, every=137)


@pytest.mark.checkpoints
@pytest.mark.parametrize("part", range(10))
def test_killed_at_a_hundred_points_of_training(part: int, two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    """Every tenth operation, in ten parts of at least ten kills that each reach over the whole run and both ranks."""
    assert_killed_is_unbroken(two_ranks, tiny, tmp_path, first=10 * part, every=100)
