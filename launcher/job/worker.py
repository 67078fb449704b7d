"""The Ray actor of one rank: it holds the process, its log file and its events; the training side does the rest."""

from __future__ import annotations

import collections
import importlib
import os
import socket
import sys
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher.plan import Plan, load_plan
from launcher.run import Event, RunFolder

TRAINING_SIDE = "launcher.train.worker"
STORE_TIMEOUT = timedelta(minutes=5)


def worker_options(plan: Plan) -> dict[str, Any]:
    """What Ray gives each worker. `control` lets it answer while it trains."""
    return {
        "num_cpus": 1,
        "num_gpus": 1 if plan.layout.accelerator == "cuda" else 0,
        "max_restarts": 0,
        "concurrency_groups": {"control": 2},
    }


class Worker:
    """One rank. Methods are called by the driver; `train` is the long one."""

    def __init__(self, run_dir: str, rank: int) -> None:
        self.folder, self.rank = RunFolder(Path(run_dir)), rank
        self.events: collections.deque[Event] = collections.deque()
        self.stop = threading.Event()
        self.listener: socket.socket | None = None
        log = os.open(self.folder.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(log, number)
        os.close(log)

    def reserve_address(self) -> tuple[str, int]:
        """Where the group meets, on rank 0: bound before it is told to anyone, and to loopback only."""
        self.listener = socket.create_server(("127.0.0.1", 0))
        host, port = self.listener.getsockname()
        return host, port

    def train(self, plan_path: str, address: tuple[str, int]) -> None:
        """Run this rank to its end. Raises LauncherError; anything else is a defect, and in the log."""
        plan = load_plan(Path(plan_path))
        self._set_environment(plan, address)
        try:
            side: Any = importlib.import_module(TRAINING_SIDE)
            local_rank = self.rank % plan.layout.workers_per_node
            me = side.Rank(rank=self.rank, local_rank=local_rank, world_size=plan.layout.world_size, store=self._open_store(plan, address))
            side.run_rank(plan, me, show=self.events.append, stop_asked=self.stop.is_set)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _open_store(self, plan: Plan, address: tuple[str, int]) -> Any:
        """The group's key-value store: rank 0 serves it on the socket it reserved."""
        dist: Any = importlib.import_module("torch.distributed")
        host, port = address
        if self.listener is None:
            return dist.TCPStore(host, port, plan.layout.world_size, is_master=False, timeout=STORE_TIMEOUT)
        return dist.TCPStore(
            host,
            port,
            plan.layout.world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=STORE_TIMEOUT,
            master_listen_fd=self.listener.detach(),
        )

    def take_events(self) -> list[Event]:
        """What rank 0 reported since the last call."""
        taken = []
        while self.events:
            taken.append(self.events.popleft())
        return taken

    def ask_to_stop(self) -> None:
        """Have the run end after the step it is in."""
        self.stop.set()

    def _set_environment(self, plan: Plan, address: tuple[str, int]) -> None:
        """What libraries read from the environment, before they are imported."""
        local_rank = self.rank % plan.layout.workers_per_node
        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(plan.layout.world_size),
            "LOCAL_WORLD_SIZE": str(plan.layout.workers_per_node),
            "MASTER_ADDR": address[0],
            "MASTER_PORT": str(address[1]),
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": str(plan.layout.threads_per_worker),
            "TOKENIZERS_PARALLELISM": "true" if local_rank == 0 else "false",
            "DS_ACCELERATOR": plan.layout.accelerator,
        }
