"""The Jobs API of a Ray cluster, from wherever this runs: opened, asked what there is, its errors named in ours."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.cluster import Cluster
from launcher.errors import ClusterError
from launcher.units import MIB

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ANSWER_TIMEOUT_S = 10.0
NO_BF16 = ("V100", "P100", "P4", "P40", "T4", "K80", "M60", "GTX", "TITAN", "RTX 20", "Quadro RTX")
"""GPUs that do not compute in bf16 (compute capability under 8.0), by a part of the name their driver gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node of a running cluster, as its dashboard tells."""

    node: str
    host: str
    address: str
    cpus: int
    gpus: int
    gpu_name: str
    gpu_memory: int
    memory: int
    is_head: bool


def open_client(address: str) -> JobSubmissionClient:
    """The Jobs API at http://HOST:PORT, HOST:PORT of the head, or auto. Raises ClusterError that says what refused.

    The environment's RAY_ADDRESS would override an address that was named; here it does not.
    """
    _use_token_if_there_is_one()
    if address == "auto":
        address = _find_own_cluster()
    with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"), naming_ray_errors(address):
        _check_reachable(address)
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)


def _find_own_cluster() -> str:
    """The address of the Ray that was last started or joined on this machine. Raises ClusterError where none answers."""
    from ray._private.utils import read_ray_address

    address, remedy = read_ray_address(), "name one with --cluster http://HEAD:8265 or a cluster file, or drop --nodes"
    if not address:
        raise ClusterError("this machine belongs to no Ray cluster: `ray start` was not run on it", remedy)
    try:
        _check_reachable(address)
    except ClusterError as error:
        raise ClusterError(f"this machine belongs to no Ray cluster any more: {error.message}", remedy) from None
    return str(address)


def _use_token_if_there_is_one() -> None:
    """Ray sends the token it finds only when told to authenticate."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    held = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= held


@contextlib.contextmanager
def naming_ray_errors(address: str) -> Iterator[None]:
    """Raises ClusterError for what Ray's client raises."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError
    from requests.exceptions import RequestException

    try:
        yield
    except AuthenticationError as error:
        text = str(error)
        if "invalid or incorrect" in text:
            raise ClusterError(f"{address} refused the token (403)", "set RAY_AUTH_TOKEN to the cluster's token") from None
        raise ClusterError(
            f"{address} wants a token (401)", "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's token"
        ) from None
    except (ConnectionError, RequestException, ClientError, TimeoutError, RuntimeError, ValueError, OSError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ClusterError(f"no answer that makes sense from the Ray cluster at {address}: {line[:300]}", _HOW_TO_REACH) from None


_HOW_TO_REACH = (
    "name the head's dashboard, http://HOST:8265, as seen from here; the head must be started with --dashboard-host=ITS-ADDRESS, "
    "or be reached through a tunnel: ssh -L 8265:localhost:8265 HEAD"
)


def _check_reachable(address: str) -> None:
    """A wrong address fails here at once; Ray's own client would go on for minutes. Raises ClusterError."""
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"nothing answers at {host}:{port} ({error.strerror or error})", _HOW_TO_REACH) from None


def _host_and_port(address: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port
    except ValueError:
        raise ClusterError(f"{address} is no address of a Ray cluster", "write http://HOST:8265 or HOST:6379") from None
    return parts.hostname or "", port or {"https": 443}.get(parts.scheme, 8265 if parts.scheme else 6379)


def find_api_url(client: JobSubmissionClient) -> str:
    """Where the client talks to: the URL of the head's dashboard."""
    return str(client.get_address())


def describe_access(url: str) -> tuple[str, str]:
    """How the cluster is reached, and a warning where anybody on the network could run code on it."""
    authenticated = _wants_token(url)
    parts = urllib.parse.urlsplit(url)
    access = f"{url} ({'token' if authenticated else 'no authentication'})"
    if authenticated or parts.scheme == "https" or _is_loopback(parts.hostname or ""):
        return access, ""
    return access, (
        f"{url} takes jobs from anybody who reaches it, unencrypted: start the head with RAY_AUTH_MODE=token, or reach it through ssh"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _wants_token(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_TIMEOUT_S):
            return False
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False


def load_nodes(client: Any) -> list[NodeFacts]:
    """The living nodes of the cluster, the head first. Raises ClusterError."""
    url = find_api_url(client)
    with naming_ray_errors(url):
        answer = client._do_request("GET", "/nodes?view=summary", timeout=ANSWER_TIMEOUT_S)
        answer.raise_for_status()
        summary = answer.json()["data"]["summary"]
    nodes = [_read_node(node) for node in summary if node["raylet"]["state"] == "ALIVE"]
    return sorted(nodes, key=lambda node: (not node.is_head, node.address))


def _read_node(facts: Mapping[str, Any]) -> NodeFacts:
    resources = facts["raylet"].get("resourcesTotal", {})
    gpus = facts.get("gpus") or []
    return NodeFacts(
        node=facts["raylet"]["nodeId"],
        host=facts.get("hostname", ""),
        address=facts["raylet"]["nodeManagerAddress"],
        cpus=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)),
        gpu_name=str(gpus[0]["name"]) if gpus else "",
        gpu_memory=int(gpus[0]["memoryTotal"]) * MIB if gpus else 0,
        memory=int(facts["mem"][0]) if facts.get("mem") else int(resources.get("memory", 0)),
        is_head=bool(facts["raylet"].get("isHeadNode")) or "node:InternalHead" in resources,
    )


def describe_cluster(nodes: list[NodeFacts], wanted: Cluster, workers: int | None) -> Cluster:
    """What the cluster file leaves open, filled in from the nodes there are. Raises ClusterError where there are none.

    The weakest node counts: a plan must fit every node that may be given.
    """
    if not nodes:
        raise ClusterError(f"the Ray cluster at {wanted.address} has no node", "start one: ray start --address=HEAD:6379")
    said = wanted.model_fields_set
    with_gpu = [node for node in nodes if node.gpus]
    accelerator = wanted.accelerator if "accelerator" in said else ("cuda" if with_gpu else "cpu")
    able = with_gpu if accelerator == "cuda" else [node for node in nodes if node.cpus]
    if not able:
        raise ClusterError(
            f"no node at {wanted.address} has a {'GPU' if accelerator == 'cuda' else 'CPU'} for Ray to give", "see `ray status` on the head"
        )
    if "nodes" not in said and wanted.ray.min_nodes is None:
        wanted = wanted.model_copy(update={"nodes": len(able)})
    weakest = min(able, key=lambda node: (node.gpus, node.gpu_memory, node.cpus, node.memory))
    cuda = accelerator == "cuda"
    per_node = workers or (wanted.workers_per_node if "workers_per_node" in said else weakest.gpus if cuda else 1)
    found: dict[str, Any] = {
        "accelerator": accelerator,
        "device_name": weakest.gpu_name if cuda else "CPU",
        "cpus_per_node": weakest.cpus,
        "host_memory": weakest.memory,
        "device_memory": weakest.gpu_memory if cuda else weakest.memory // per_node,
        "bf16": cuda and not any(sign in weakest.gpu_name for sign in NO_BF16),
    }
    return wanted.model_copy(update={"workers_per_node": per_node, **{name: value for name, value in found.items() if name not in said}})
