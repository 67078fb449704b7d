"""Nodes for a run: which there are, what is missing, and the placement group that holds them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from launcher.errors import CapacityTimeout
from launcher.job.lines import format_ranks
from launcher.plan import Plan
from launcher.units import format_duration

TURN_S = 1.0
GATHER_S = 20.0
"""An elastic run waits this long for its largest size before it starts with fewer nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node: what Ray may give of it in all, and what is free now."""

    node: str
    host: str
    total: dict[str, float]
    free: dict[str, float]
    labels: dict[str, str]
    draining: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What each of `nodes` nodes must have free, and how it must be labelled."""

    nodes: int
    resources: dict[str, float]
    labels: dict[str, str]


def make_need(plan: Plan) -> Need:
    """What the plan asks of a cluster."""
    workers, options = plan.layout.workers_per_node, plan.cluster.ray
    resources = {"CPU": float(workers * options.cpus_per_worker)}
    if plan.layout.accelerator == "cuda":
        resources["GPU"] = float(workers)
    return Need(nodes=plan.layout.nodes, resources=resources, labels=options.labels)


def load_nodes(ray: Any) -> list[Node]:
    """The living nodes of the Ray this process is in."""
    from ray._private import state

    free, draining = state.available_resources_per_node(), state.state.get_draining_nodes()
    return [
        Node(
            node=node["NodeID"],
            host=node["NodeManagerHostname"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            labels=node.get("Labels") or {},
            draining=node["NodeID"] in draining,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def find_fitting(nodes: Sequence[Node], need: Need, *, free: bool = True) -> list[Node]:
    """The nodes that could take part: with what is needed (free now, or in all), the labels, and not about to leave."""
    return [
        node
        for node in nodes
        if not node.draining
        and all((node.free if free else node.total).get(name, 0) >= amount for name, amount in need.resources.items())
        and all(node.labels.get(key) == value for key, value in need.labels.items())
    ]


def describe_missing(nodes: Sequence[Node], need: Need) -> str:
    """What stands between the cluster and the run: "1 of 4 nodes missing; node3 has 0 of 1 CPU free"."""
    fitting = find_fitting(nodes, need)
    each = ", ".join(f"{amount:g} {name}" for name, amount in need.resources.items())
    labels = ", ".join(f"{key}={value}" for key, value in need.labels.items())
    parts = [f"{len(fitting)} of {need.nodes} nodes with {each}{' and ' + labels if labels else ''} are there"]
    for node in nodes:
        if node in fitting:
            continue
        parts.append(f"{node.host} {_why_not(node, need)}")
    return "; ".join(parts)


def _why_not(node: Node, need: Need) -> str:
    if node.draining:
        return "is being drained"
    for key, value in need.labels.items():
        if node.labels.get(key) != value:
            return f"has {key}={node.labels.get(key, '(none)')}"
    for name, amount in need.resources.items():
        if node.total.get(name, 0) < amount:
            return f"has {node.total.get(name, 0):g} {name} in all"
        if node.free.get(name, 0) < amount:
            return f"has {node.free.get(name, 0):g} of {node.total[name]:g} {name} free"
    return "fits"


def choose_size(fitting: int, sizes: Sequence[int], waited_s: float) -> int | None:
    """How many nodes to start with: the most that is asked for, or after GATHER_S the most that is there; None to wait.

    `sizes` are the numbers of nodes that the batch divides over, in descending order.
    """
    if fitting >= sizes[0]:
        return sizes[0]
    return next((size for size in sizes if size <= fitting), None) if waited_s >= GATHER_S else None


def wait_for_nodes(
    ray: Any, need: Need, sizes: Sequence[int], timeout_s: float, tell: Callable[[str, float], None], check: Callable[[], None]
) -> int:
    """Wait for capacity; the number of nodes to start with. `tell` hears what is missing and how long is left, each turn.

    Raises CapacityTimeout when it does not come in time, and what `check` raises.
    """
    began = time.monotonic()
    while True:
        nodes = load_nodes(ray)
        waited_s = time.monotonic() - began
        fitting = len(find_fitting(nodes, need))
        if size := choose_size(fitting, sizes, waited_s):
            return size
        missing = describe_missing(nodes, need)
        if waited_s > timeout_s:
            raise CapacityTimeout(
                f"{missing}, after {format_duration(timeout_s)} of waiting",
                f"add nodes, wait longer with --capacity-timeout, or go on with fewer: --nodes {min(1, fitting) or 1}..{need.nodes}",
            )
        tell(missing, timeout_s - waited_s)
        check()
        time.sleep(TURN_S)


@contextmanager
def holding_nodes(ray: Any, need: Need, timeout_s: float) -> Iterator[dict[str, dict[str, Any]]]:
    """Inside, a placement group holds one bundle on each of the nodes; gives, by node, the options that put an actor there."""
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    selector = {"bundle_label_selector": [need.labels] * need.nodes} if need.labels else {}
    group = placement_group([need.resources] * need.nodes, strategy="STRICT_SPREAD", **selector)
    try:
        if not ray.wait([group.ready()], timeout=timeout_s)[0]:
            raise CapacityTimeout(
                f"the nodes were there, and Ray gave no {need.nodes} of them within {timeout_s:.0f} s", "see `ray status` on the head"
            )
        yield {
            node: {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}
            for node, index in _order_bundles(ray, group)
        }
    finally:
        remove_placement_group(group)


def _order_bundles(ray: Any, group: Any) -> list[tuple[str, int]]:
    """The group's nodes and bundles in the order of the nodes' names: rank 0 is where one looks for it, and stays there."""
    from ray.util.placement_group import placement_group_table

    names = {node["NodeID"]: natural_order(node["NodeManagerHostname"]) for node in ray.nodes()}
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return sorted(((node, index) for index, node in nodes.items()), key=lambda held: (names.get(held[0], []), held))


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts node2 before node10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def describe_places(hosts: Sequence[str]) -> str:
    """Who runs where: "node1 rank 0, node2 ranks 1-2"."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    return ", ".join(f"{host} rank{'s' if len(on) > 1 else ''} {format_ranks(on)}" for host, on in ranks.items())
