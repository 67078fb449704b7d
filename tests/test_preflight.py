"""What nodes answer, and what is missing of them, without any cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny import plan_tiny

from launcher.errors import BudgetError, ClusterError, DataError, LauncherError, ModelError
from launcher.job.capacity import GATHER_S, Need, Node, choose_size, describe_missing, describe_places, find_fitting
from launcher.job.preflight import NodeReport, check_reports, make_report, meeting_folder
from launcher.plan import Plan

NOW = 1_000_000.0


@pytest.fixture
def plan(tiny: Path, tmp_path: Path) -> Plan:
    return plan_tiny(tiny, tmp_path / "run")


def report(host: str, **facts: object) -> NodeReport:
    good = NodeReport(
        host=host,
        address=f"10.0.0.{host[-1]}",
        versions={"torch": "2.13.0", "ray": "2.60.0"},
        clock=NOW + 0.5,
        scratch_free=1 << 40,
        storage_free=1 << 40,
        storage_error="",
        memory_available=1 << 40,
        unreachable=(),
    )
    return dataclasses.replace(good, **facts)  # type: ignore[arg-type]


def check(plan: Plan, *reports: NodeReport, arrived: set[str] | None = None) -> None:
    check_reports(plan, reports, {f"{r.host}-{r.address}" for r in reports} if arrived is None else arrived, NOW)


def test_nodes_that_are_alike_pass(plan: Plan) -> None:
    check(plan, report("node1"), report("node2"))


@pytest.mark.parametrize(
    ("facts", "error", "said"),
    [
        ({"versions": {"torch": "2.12.0", "ray": "2.60.0"}}, ClusterError, "torch is 2.13.0 on node1, 2.12.0 on node2"),
        ({"versions": {"ray": "2.60.0"}}, ClusterError, "torch is 2.13.0 on node1, none on node2"),
        ({"storage_error": "cannot write to /mnt: Read-only file system"}, ClusterError, "node2 cannot write"),
        ({"unreachable": ("model.name_or_path: no file or folder /x",)}, ModelError, "node2: model.name_or_path"),
        ({"unreachable": ("no file train.jsonl",)}, DataError, "node2: no file train.jsonl"),
        ({"memory_available": 1 << 20}, BudgetError, "node2 has 1.0 MiB of memory free"),
        ({"scratch_free": 1 << 20}, BudgetError, "the disk of node2 has 1.0 MiB left"),
        ({"clock": NOW - 95.0}, ClusterError, "node2 by -95 s"),
    ],
)
def test_each_fault_names_its_host(plan: Plan, facts: dict[str, object], error: type[LauncherError], said: str) -> None:
    with pytest.raises(error) as raised:
        check(plan, report("node1"), report("node2", **facts))
    assert said in raised.value.message
    assert raised.value.remedy


def test_storage_that_is_not_shared_is_found(plan: Plan) -> None:
    with pytest.raises(ClusterError, match="what node2 wrote is not there on the head"):
        check(plan, report("node1"), report("node2"), arrived={"node1-10.0.0.1"})


def test_storage_too_small_for_the_weights_is_found(plan: Plan) -> None:
    with pytest.raises(BudgetError, match="the storage, seen from node1"):
        check(plan, report("node1", storage_free=10), report("node2"))


def test_a_node_reports_itself(plan: Plan) -> None:
    folder = meeting_folder(plan, "abc")
    assert "does not see what the head wrote" in make_report(plan, "abc", "127.0.0.1").storage_error
    folder.mkdir()
    (folder / "driver").write_text("here")
    facts = make_report(plan, "abc", "127.0.0.1")
    assert facts.storage_error == "" and facts.unreachable == ()
    assert {"python", "torch", "deepspeed", "ray", "transformers", "peft", "bitsandbytes"} <= facts.versions.keys()
    assert {path.name for path in folder.iterdir()} == {"driver", f"{facts.host}-127.0.0.1"}
    gone = dataclasses.replace(
        plan, recipe=plan.recipe.model_copy(update={"model": plan.recipe.model.model_copy(update={"name_or_path": "/no/model"})})
    )
    assert any("/no/model" in problem for problem in make_report(gone, "abc", "127.0.0.1").unreachable)


def node(name: str, free: float = 1.0, total: float = 1.0, **more: object) -> Node:
    base = Node(node=name, host=name, total={"CPU": total}, free={"CPU": free}, labels={}, draining=False)
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


NEED = Need(nodes=4, resources={"CPU": 1.0}, labels={})


def test_what_is_missing_is_named() -> None:
    nodes = [node("node1"), node("node2", free=0.0), node("node3", total=0.0, free=0.0), node("node4", draining=True)]
    text = describe_missing(nodes, NEED)
    assert "1 of 4 nodes with 1 CPU are there" in text
    assert "node2 has 0 of 1 CPU free" in text and "node3 has 0 CPU in all" in text and "node4 is being drained" in text


def test_labels_choose_nodes() -> None:
    need = dataclasses.replace(NEED, labels={"rack": "a"})
    nodes = [node("node1", labels={"rack": "a"}), node("node2", labels={"rack": "b"}), node("node3")]
    assert [one.host for one in find_fitting(nodes, need)] == ["node1"]
    assert "node2 has rack=b" in describe_missing(nodes, need) and "node3 has rack=(none)" in describe_missing(nodes, need)


def test_an_elastic_run_waits_for_its_largest_size_and_then_takes_what_is_there() -> None:
    assert choose_size(4, [4, 2], waited_s=0.0) == 4
    assert choose_size(3, [4, 2], waited_s=0.0) is None
    assert choose_size(3, [4, 2], waited_s=GATHER_S) == 2
    assert choose_size(1, [4, 2], waited_s=1e9) is None
    assert choose_size(3, [4], waited_s=1e9) is None


def test_places() -> None:
    assert describe_places(["node1", "node2", "node2"]) == "node1 rank 0, node2 ranks 1-2"
