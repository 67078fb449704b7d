"""The Ray actor of one rank: it holds the process, its log file and its news; the training side does the rest."""

from __future__ import annotations

import collections
import faulthandler
import importlib
import os
import platform
import socket
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, Stopped
from launcher.job.lines import is_noise, split_lines
from launcher.job.preflight import NodeReport, make_report
from launcher.plan import Plan
from launcher.plan.allocator_settings import put_settings
from launcher.plan.heap import heap_environment
from launcher.run import Event, RunFolder

TRAINING_SIDE = "launcher.train.worker"
STORE_TIMEOUT = timedelta(minutes=5)
VISIBLE = "CUDA_VISIBLE_DEVICES"
STDERR = 2
"""The file descriptor, which Ray has pointed at this worker's log; sys.stderr may be another object."""
MEETING_TIMEOUT_S = 120.0
"""How long ranks that are ready wait at the store for the others."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker is: Ray's name for the node, the host's own name, the address Ray knows it by, the pid there, its GPUs."""

    node: str
    host: str
    address: str
    pid: int
    devices: str | None


@dataclass(frozen=True, slots=True)
class News:
    """What a worker has to tell since it was last asked: events (rank 0), log lines, and how far it is."""

    events: list[Event]
    lines: list[str]
    noise: list[str]


def worker_options(plan: Plan) -> dict[str, Any]:
    """What Ray gives each worker. `control` lets it answer while it trains. A process of its own begins with what the heap is planned with,
    unless this one's environment, which a Ray on this machine inherits, has it."""
    environment = heap_environment(plan.layout.accelerator, os.environ)
    return {
        **({"runtime_env": {"env_vars": environment}} if environment else {}),
        "num_cpus": plan.cluster.ray.cpus_per_worker,
        "num_gpus": 1 if plan.layout.accelerator == "cuda" else 0,
        "max_restarts": 0,
        "concurrency_groups": {"control": 2},
    }


class Worker:
    """One rank. Methods are called by the driver; `train` is the long one."""

    def __init__(self, rank: int, secrets: dict[str, str]) -> None:
        self.rank = rank
        self.events: collections.deque[Event] = collections.deque()
        self.stop, self.telling = threading.Event(), threading.Lock()
        self.listener: socket.socket | None = None
        self.log: Path | None = None
        self.log_position = 0
        self.secrets = secrets
        os.environ |= secrets

    def locate(self) -> Place:
        import ray

        context = ray.get_runtime_context()
        return Place(context.get_node_id(), platform.node(), ray.util.get_node_ip_address(), os.getpid(), os.environ.get(VISIBLE))

    def report(self, plan: Plan, nonce: str) -> NodeReport:
        """What this worker's node says about itself before training."""
        return make_report(plan, nonce, self.locate().address)

    def reserve_address(self) -> tuple[str, int]:
        """Where the group meets, on rank 0: bound before it is told to anyone, and to the node's own address only."""
        self.listener = socket.create_server((self.locate().address, 0), backlog=1024)
        host, port = self.listener.getsockname()[:2]
        return host, port

    def list_modules(self) -> list[str]:
        """What this process has imported, in order: once it trains, all that training needs, which depends on model and method."""
        return list(sys.modules)

    def warm_up(self, plan: Plan, devices: str | None, modules: list[str]) -> None:
        """Import what a worker that trains has imported, so that a later `train` begins at once, on these GPUs: those of the
        worker it stands by for.
        """
        if devices is not None:
            os.environ[VISIBLE] = devices
        os.environ |= {"OMP_NUM_THREADS": str(plan.layout.threads_per_worker), "DS_ACCELERATOR": plan.layout.accelerator}
        if plan.layout.accelerator == "cuda":
            put_settings(plan.allocator, os.environ)
        importlib.import_module(TRAINING_SIDE)
        for name in modules:
            if name not in sys.modules:
                with suppress(ImportError):  # what a library made up as it ran is in no file
                    importlib.import_module(name)
        # torch asks for the name of the first address that it connects to, for its messages. Where no DNS answers this takes 10 s,
        # once a process (pytorch#159007, torch 2.13): here and now, when nobody waits for it.
        serve_store(socket.create_server((self.locate().address, 0)), world_size=1)

    def train(self, plan: Plan, address: tuple[str, int], hosts: tuple[str, ...]) -> None:
        """Run this rank to its end; `hosts` has the host of every rank. Raises LauncherError; all else is a defect, and in the log."""
        self._open_log(RunFolder(Path(plan.run_dir)))
        self._set_environment(plan, address)
        print(describe_rank(hosts[self.rank], self.secrets), flush=True)
        try:
            side: Any = importlib.import_module(TRAINING_SIDE)
            local_rank = self.rank % plan.layout.workers_per_node
            store = self._open_store(plan, address)
            check_in(store, self.rank, hosts)
            me = side.Rank(rank=self.rank, local_rank=local_rank, world_size=plan.layout.world_size, store=store, hosts=hosts)
            side.run_rank(plan, me, show=self.events.append, stop_asked=self.stop.is_set)
        except Stopped:
            raise  # as it was asked to: no fault to look into
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def take_news(self) -> News:
        """What happened since the last call."""
        events = []
        with self.telling:  # two calls at a time would take turns, and mix up the order
            while self.events:
                events.append(self.events.popleft())
            messages = split_lines(self._read_log())
        quiet = [is_noise(message) or message.startswith("Traceback") for message in messages]
        return News(
            events,
            [message for message, noise in zip(messages, quiet, strict=True) if not noise],
            [message for message, noise in zip(messages, quiet, strict=True) if noise],
        )

    def dump_stacks(self) -> None:
        """Write where every thread is to the log: what a hung rank was doing."""
        faulthandler.dump_traceback(STDERR, all_threads=True)

    def ask_to_stop(self) -> None:
        """Have the run save and end after the step it is in."""
        self.stop.set()

    def _open_log(self, folder: RunFolder) -> None:
        """Send what this process prints, libraries' C++ included, to the rank's file in the run folder."""
        self.log = folder.log(self.rank)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.log_position = os.fstat(log).st_size
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(log, number)
        os.close(log)

    def _read_log(self) -> str:
        """The whole lines that were written since the last call."""
        if self.log is None:
            return ""
        with self.log.open("rb") as file:
            file.seek(self.log_position)
            new = file.read(1 << 20)
        whole = new[: new.rfind(b"\n") + 1]
        self.log_position += len(whole)
        return whole.decode(errors="replace")

    def _open_store(self, plan: Plan, address: tuple[str, int]) -> Any:
        """The group's key-value store: rank 0 serves it on the socket it reserved."""
        if self.listener is not None:
            return serve_store(self.listener, plan.layout.world_size)
        dist: Any = importlib.import_module("torch.distributed")
        return dist.TCPStore(*address, plan.layout.world_size, is_master=False, timeout=STORE_TIMEOUT)

    def _set_environment(self, plan: Plan, address: tuple[str, int]) -> None:
        """What libraries read from the environment, before they are imported."""
        if plan.layout.accelerator == "cuda" and (other := put_settings(plan.allocator, os.environ)):
            print(f"[lepton-launch] this machine's PYTORCH_ALLOC_CONF ({other}) is left out: the run is planned with "
                  f"{plan.allocator or 'none'}; set it where the run is started", flush=True)  # fmt: skip
        local_rank = self.rank % plan.layout.workers_per_node
        interface = find_interface(self.locate().address)
        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(plan.layout.world_size),
            "LOCAL_WORLD_SIZE": str(plan.layout.workers_per_node),
            "MASTER_ADDR": address[0],
            "MASTER_PORT": str(address[1]),
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": str(plan.layout.threads_per_worker),
            "TOKENIZERS_PARALLELISM": "true" if local_rank == 0 else "false",
            "DS_ACCELERATOR": plan.layout.accelerator,
        }


def serve_store(listener: socket.socket, world_size: int) -> Any:
    """A group's key-value store, served on a socket that is bound already, and to one address."""
    dist: Any = importlib.import_module("torch.distributed")
    host, port = listener.getsockname()[:2]
    return dist.TCPStore(
        host, port, world_size, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT, master_listen_fd=listener.detach()
    )


def describe_rank(host: str, secrets: dict[str, str]) -> str:
    """The first line of a rank's log: who and where it is, as every library it loads will read it; of secrets that they came."""
    seen = {
        name: os.environ[name]
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
    }
    came = ", ".join(f"{name} ({len(value)} characters)" for name, value in secrets.items())
    return f"[lepton-launch] {host}: " + " ".join(f"{name}={value}" for name, value in seen.items()) + (f" secrets: {came}" if came else "")


def find_interface(address: str) -> str:
    """The network interface that owns an address: gloo and NCCL, left to guess, may take one that leads nowhere.

    Raises ClusterError where no interface of this host has it.
    """
    import psutil

    interfaces = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(one.address.split("%")[0] == address for one in addresses):
            return str(name)
    have = ", ".join(f"{name} {one.address}" for name, addresses in interfaces.items() for one in addresses if one.family == socket.AF_INET)
    raise ClusterError(
        f"{platform.node()}: Ray knows this node as {address}, and no interface here has that address ({have})",
        "start Ray there with --node-ip-address set to an address that the other nodes reach",
    )


def check_in(store: Any, rank: int, hosts: tuple[str, ...], timeout_s: float = MEETING_TIMEOUT_S) -> None:
    """Wait until every rank has come to the store. Raises ClusterError that names those that have not, with their hosts."""
    keys = [f"here/{other}" for other in range(len(hosts))]
    store.set(keys[rank], "")
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:  # torch's DistStoreError is one
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        if not missing:
            raise
        names = ", ".join(f"rank {other} on {hosts[other]}" for other in missing)
        raise ClusterError(
            f"{names} did not come to the group within {timeout_s:.0f} s, seen from rank {rank} on {hosts[rank]}",
            "its log is in the run's logs/; see that its node reaches the others on every port",
        ) from error
