"""Ranks that stay: processes joined in one gloo group, to which tests send functions of plans.

Importing the stack takes longer than training a tiny model, so the ranks are started once a session.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from launcher.run import Event

JOB_TIMEOUT_S = 300


class Ranks:
    """`size` processes. `run(job, *args)` calls job(me, *args) on every rank and returns what each gave."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.size, self.pipes, self.processes = size, [], []
        meeting = tempfile.NamedTemporaryFile(prefix="ranks-", delete=False).name  # noqa: SIM115
        os.unlink(meeting)
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, meeting, rank, size), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((job, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(JOB_TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer in {JOB_TIMEOUT_S} s")
            answers.append(pipe.recv())
        failed = [text for ok, text in answers if not ok]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
            assert process.exitcode == 0, f"a rank ended with {process.exitcode}"


def _serve(pipe: Connection, meeting: str, rank: int, size: int) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(size)}
    import deepspeed
    import torch
    import torch.distributed as dist

    from launcher.train.worker import Rank

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", store=dist.FileStore(meeting, size), rank=rank, world_size=size)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    me = Rank(rank=rank, local_rank=rank, world_size=size)
    while (message := pipe.recv()) is not None:
        job, args = message
        try:
            pipe.send((True, job(me, *args)))
        except Exception:  # noqa: BLE001  the test that asked is told
            pipe.send((False, traceback.format_exc()))
            dist.barrier()
    deepspeed.comm.destroy_process_group()


def fine_tune(me: Any, plan: Any, stop_after: int | None = None) -> list[Event]:
    """Job: the whole training side of a plan, or as far as step `stop_after`, where it is asked to stop.

    Gives the events of rank 0, an empty list from the others.
    """
    from pathlib import Path

    from launcher.checkpoint.storage import open_storage
    from launcher.errors import Stopped
    from launcher.run import RunFolder
    from launcher.train.worker import fine_tune as run

    events: list[Event] = []
    asked = 0

    def stop_asked() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_after

    try:
        run(
            plan,
            me,
            RunFolder(Path(plan.run_dir)),
            events.append if me.rank == 0 else _drop,
            stop_asked,
            open_storage(plan.checkpoints),
            None,
        )
    except Stopped:
        if stop_after is None:
            raise
    return events


def _drop(event: Event) -> None:
    return None


def losses(events: list[Event]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


def evaluations(events: list[Event], when: str) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "eval" and event["when"] == when]
