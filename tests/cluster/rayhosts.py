"""A Ray cluster of four hosts, started by the tests and gone with them."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import TOKEN
from hosts import Host, Network

RAY_PORT, JOBS_PORT = 6379, 8265

QUICK_TO_NOTICE = {
    # Ray's defaults give a silent host half a minute and more; the tests need not wait as long.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    # The hosts share one machine's memory: what else fills it is none of a host's business.
    "RAY_memory_monitor_refresh_ms": "0",
}


@dataclass
class RayHosts:
    """Hosts on a network with a Ray on them; the first is the head."""

    network: Network
    environment: dict[str, str]
    head: Host
    workers: list[Host]

    @property
    def address(self) -> str:
        return f"http://{self.head.address}:{JOBS_PORT}"

    @property
    def storage(self) -> Path:
        """The shared storage, as this machine sees it."""
        return self.network.storage

    def host(self, number: int) -> Host:
        return next(host for host in self.network.hosts if host.name == f"node{number}")

    def start_head(self) -> None:
        self.head.run("ray", "start", "--head", f"--port={RAY_PORT}", "--dashboard-host", self.head.address, *node_options(self.head))

    def start_worker(self, host: Host, *options: str) -> None:
        host.run("ray", "start", f"--address={self.head.address}:{RAY_PORT}", *node_options(host), *options)

    def switch_on(self, number: int, **environment: str) -> Host:
        """A host that was killed, back with a new Ray on it."""
        host = self.network.add(number, **{**self.environment, **environment})
        self.workers = [other for other in self.workers if other.name != host.name] + [host]
        self.start_worker(host)
        return host

    def wait_for_nodes(self, count: int, within_s: float = 60) -> None:
        deadline = time.monotonic() + within_s
        while (alive := self.count_nodes()) != count:
            assert time.monotonic() < deadline, f"{alive} nodes after {within_s} s, and {count} were expected"
            time.sleep(0.5)

    def restart(self) -> None:
        """All hosts lose power, and come back with a Ray that remembers nothing."""
        for host in self.network.hosts:
            host.kill()
        self.head, *self.workers = [self.network.add(number, **self.environment) for number in (1, 2, 3, 4)]
        self.start()

    def start(self) -> None:
        self.start_head()
        for host in self.workers:
            self.start_worker(host)
        self.wait_for_nodes(4)

    def node_id(self, host: Host) -> str:
        return next(str(node["raylet"]["nodeId"]) for node in self.load_nodes() if node["raylet"]["nodeManagerAddress"] == host.address)

    def count_nodes(self) -> int:
        return len(self.load_nodes())

    def load_nodes(self) -> list[dict[str, Any]]:
        """The living nodes, as the head's dashboard tells; none while it does not answer."""
        request = urllib.request.Request(f"{self.address}/nodes?view=summary", headers={"Authorization": f"Bearer {TOKEN}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                summary = json.load(answer)["data"]["summary"]
        except OSError:
            return []
        return [node for node in summary if node["raylet"]["state"] == "ALIVE"]


def node_options(host: Host, cpus: int = 1) -> list[str]:
    return [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", "--object-store-memory=80000000", "--disable-usage-stats"]


@contextmanager
def open_cluster(folder: Path, tiny: Path, names: bool = False) -> Iterator[RayHosts]:
    """Four hosts, one CPU each, a Ray that wants a token, storage with the tiny model and data on it."""
    storage = folder / "storage"
    shutil.copytree(tiny, storage / "tiny")
    network = Network(folder, storage, names)
    try:
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **QUICK_TO_NOTICE}
        head, *workers = [network.add(number, **environment) for number in (1, 2, 3, 4)]
        cluster = RayHosts(network, environment, head, workers)
        cluster.start()
        yield cluster
    finally:
        network.close()
