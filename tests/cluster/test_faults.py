"""Machines fail while a run trains; it ends as the unbroken run does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Attached, events_of, last_step, lepton, losses_of, run_folder, status_of, wait_for_step, wait_until, write_recipe
from hosts import DISK, STORAGE, Host, has_open
from rayhosts import RayHosts
from safetensors.numpy import load_file

STEPS = 60
SAVE = "save: {every_steps: 5}\n"
OPTIONS = ("--storage", f"{STORAGE}/runs")


@pytest.fixture(scope="module")
def unbroken(ray_hosts: RayHosts, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing happens to."""
    recipe = write_recipe(tmp_path_factory.mktemp("unbroken"), "unbroken", STEPS, SAVE)
    done = lepton(ray_hosts.address, str(recipe), "--nodes", "4", *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses_of(run_folder(ray_hosts.storage, "unbroken"))


def assert_same_result(ray_hosts: RayHosts, name: str, unbroken: dict[int, float], exact: bool = True) -> None:
    """All steps were taken, with the unbroken run's losses, to the same adapter."""
    mine = losses_of(run_folder(ray_hosts.storage, name))
    assert sorted(mine) == sorted(unbroken)
    assert [mine[step] for step in sorted(mine)] == pytest.approx([unbroken[step] for step in sorted(mine)], abs=1e-5 if exact else 1e-4)
    weights, others = (load_file(run_folder(ray_hosts.storage, run).model / "adapter_model.safetensors") for run in (name, "unbroken"))
    for key, tensor in weights.items():
        assert abs(tensor - others[key]).max() < (1e-5 if exact else 1e-3), key


def worker_pids(host: Host) -> list[int]:
    return host.processes("ray::Worker")


def kill_a_worker(ray_hosts: RayHosts) -> None:
    for pid in worker_pids(ray_hosts.host(3)):
        os.kill(pid, signal.SIGKILL)


def pause_a_worker(ray_hosts: RayHosts) -> None:
    for pid in worker_pids(ray_hosts.host(3)):
        os.kill(pid, signal.SIGSTOP)


def kill_a_raylet(ray_hosts: RayHosts) -> None:
    """The node's Ray is gone until somebody starts it again: here, after a while, as an init system would."""
    host = ray_hosts.host(3)
    for pid in host.processes("raylet/raylet"):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ray_hosts.count_nodes() == 3, 60, "the loss of the node is noticed")
    for pid in host.processes("ray"):
        os.kill(pid, signal.SIGKILL)
    ray_hosts.start_worker(host)


def kill_a_host(ray_hosts: RayHosts) -> None:
    ray_hosts.host(3).kill()
    wait_until(lambda: ray_hosts.count_nodes() == 3, 60, "the loss of the node is noticed")
    ray_hosts.switch_on(3)


def unplug_for_long(ray_hosts: RayHosts) -> None:
    """Long enough to be given up: the raylet ends itself when it hears of that, and is started again."""
    host = ray_hosts.host(3)
    host.unplug()
    wait_until(lambda: ray_hosts.count_nodes() == 3, 90, "the loss of the node is noticed")
    host.plug()
    wait_until(lambda: not host.processes("raylet/raylet"), 90, "the raylet that was given up has ended")
    for pid in host.processes("ray"):
        os.kill(pid, signal.SIGKILL)
    ray_hosts.start_worker(host)


def unplug_for_a_moment(ray_hosts: RayHosts) -> None:
    host = ray_hosts.host(3)
    host.unplug()
    time.sleep(2)
    host.plug()


FAULTS: dict[str, Callable[[RayHosts], None]] = {
    "worker-killed": kill_a_worker,
    "worker-paused": pause_a_worker,
    "raylet-killed": kill_a_raylet,
    "host-killed": kill_a_host,
    "unplugged": unplug_for_long,
    "blinked": unplug_for_a_moment,
}
IN_CI = ("worker-killed",)


def cluster_file(folder: Path, ray_hosts: RayHosts, **ray: object) -> str:
    path = folder / "cluster.yaml"
    options = "".join(f"  {key}: {value}\n" for key, value in {"storage": f"{STORAGE}/runs", **ray}.items())
    path.write_text(f"name: hosts\naddress: {ray_hosts.address}\nray:\n{options}")
    return str(path)


@pytest.mark.parametrize("fault", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.long) for name in FAULTS])
def test_a_run_survives(fault: str, ray_hosts: RayHosts, unbroken: dict[int, float], tmp_path: Path) -> None:
    ray_hosts.wait_for_nodes(4)
    folder = run_folder(ray_hosts.storage, fault)
    recipe = str(write_recipe(tmp_path, fault, STEPS, SAVE))
    cluster = cluster_file(tmp_path, ray_hosts, stall_timeout_s=10.0, capacity_timeout_s=120.0)
    attached = Attached(cluster, recipe, "--nodes", "4")
    wait_for_step(folder, 20)
    FAULTS[fault](ray_hosts)
    assert attached.end() == 0, attached.output
    restarted = "restarting:" in attached.output
    assert restarted == (fault != "blinked"), attached.output
    if restarted:
        starts = [event["step"] for event in events_of(folder) if event["event"] == "start"]
        assert starts[0] == 0 and starts[-1] >= 15, starts  # from the newest commit: at most an interval is lost
    if fault == "worker-paused":
        assert "does not answer" in attached.output and "node3" in attached.output
    assert_same_result(ray_hosts, fault, unbroken)
    assert status_of(folder)["state"] == "finished"


@pytest.mark.long
@pytest.mark.parametrize("spare_too", [False, True])
def test_a_spare_takes_over(spare_too: bool, ray_hosts: RayHosts, tmp_path: Path) -> None:
    """Once a run has stepped for a while a worker that dies is followed by its spare; by a new one, where that died too."""
    ray_hosts.wait_for_nodes(4)
    name = f"spare-{spare_too}".lower()
    folder, host = run_folder(ray_hosts.storage, name), ray_hosts.host(3)
    attached = Attached(ray_hosts.address, str(write_recipe(tmp_path, name, 5000, "save: {every_steps: 20}\n")), "--nodes", "4", *OPTIONS)
    wait_until(lambda: len(worker_pids(host)) == 2, 150, "a spare is there")
    wait_for_step(folder, (last_step(folder) // 20 + 2) * 20 + 5)  # some steps after a save: they are taken again
    before, pids = losses_of(folder), worker_pids(host)
    (trains,) = [pid for pid in pids if has_open(pid, "/logs/rank-")]
    (spare,) = set(pids) - {trains}
    for pid in pids if spare_too else [trains]:
        os.kill(pid, signal.SIGKILL)
    attached.wait_for("recovered in")
    wait_for_step(folder, max(before) + 5)
    assert has_open(spare, "/logs/rank-") if not spare_too else spare not in worker_pids(host)
    status = json.loads(lepton(ray_hosts.address, "status", name, "--json").stdout)
    assert status["restarts"] == 1 and sum(status["recovery_stages_s"].values()) == pytest.approx(status["recovery_s"])
    lepton(ray_hosts.address, "stop", name)
    assert attached.end() == 6, attached.output
    after = losses_of(folder)
    again = [step for step in before if step > max(before) // 20 * 20]
    assert sorted(after) == list(range(1, max(after) + 1))
    assert again and [after[step] for step in again] == pytest.approx([before[step] for step in again], abs=1e-6)


@pytest.mark.long
def test_a_host_that_never_returns_ends_it_with_7(ray_hosts: RayHosts, tmp_path: Path) -> None:
    ray_hosts.wait_for_nodes(4)
    folder = run_folder(ray_hosts.storage, "gone")
    recipe = str(write_recipe(tmp_path, "gone", 5000, SAVE))
    attached = Attached(ray_hosts.address, recipe, "--nodes", "4", *OPTIONS, "--capacity-timeout", "8s")
    wait_for_step(folder, 10)
    ray_hosts.host(3).kill()
    try:
        assert attached.end() == 7, attached.output
        assert "3 of 4 nodes" in attached.output
        assert status_of(folder)["exit_code"] == 7
    finally:
        ray_hosts.switch_on(3)


@pytest.mark.long
def test_an_elastic_run_goes_on_smaller_and_grows_back(ray_hosts: RayHosts, unbroken: dict[int, float], tmp_path: Path) -> None:
    ray_hosts.wait_for_nodes(4)
    folder = run_folder(ray_hosts.storage, "elastic")
    recipe = str(write_recipe(tmp_path, "elastic", 600, SAVE))
    attached = Attached(ray_hosts.address, recipe, "--nodes", "2..4", *OPTIONS)
    wait_for_step(folder, 10)
    ray_hosts.host(3).kill()
    wait_until(lambda: [e["world_size"] for e in events_of(folder) if e["event"] == "start"] == [4, 2], 120, "it goes on with two nodes")
    ray_hosts.switch_on(3)
    wait_until(lambda: [e["world_size"] for e in events_of(folder) if e["event"] == "start"] == [4, 2, 4], 150, "it grows back")
    lepton(ray_hosts.address, "stop", "elastic")
    assert attached.end() == 6, attached.output
    mine = losses_of(folder)
    assert sorted(mine) == list(range(1, max(mine) + 1))
    # The learning rate is constant, so a longer run's first steps are the unbroken run's, whatever the number of nodes.
    assert [mine[step] for step in sorted(unbroken)] == pytest.approx([unbroken[step] for step in sorted(unbroken)], abs=1e-4)


@pytest.mark.long
def test_a_drained_node_is_left_after_a_save(ray_hosts: RayHosts, unbroken: dict[int, float], tmp_path: Path) -> None:
    """A preemption notice: the run saves, leaves the node, and goes on when another takes its place."""
    ray_hosts.wait_for_nodes(4)
    folder = run_folder(ray_hosts.storage, "drained")
    attached = Attached(
        ray_hosts.address, str(write_recipe(tmp_path, "drained", STEPS, "save: {every_steps: 1000}\n")), "--nodes", "4", *OPTIONS
    )
    wait_for_step(folder, 20)
    host = ray_hosts.host(3)
    node = ray_hosts.node_id(host)
    ray_hosts.head.run(
        "ray", "drain-node", f"--address={ray_hosts.head.address}:6379", f"--node-id={node}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=spot", "--deadline-remaining-seconds=60",
    )  # fmt: skip
    attached.wait_for("is about to go: saving")
    attached.wait_for("waiting for nodes: 3 of 4", within_s=60)
    host.kill()
    ray_hosts.switch_on(3)
    assert attached.end() == 0, attached.output
    assert "restarting:" not in attached.output
    starts = [event["step"] for event in events_of(folder) if event["event"] == "start"]
    taken = [event["step"] for event in events_of(folder) if event["event"] == "step"]
    assert len(starts) == 2 and starts[1] >= 20
    assert len(taken) == STEPS, "no step was taken twice"
    assert_same_result(ray_hosts, "drained", unbroken)


@pytest.mark.long
def test_a_driver_that_dies_is_followed_by_the_same_command(ray_hosts: RayHosts, unbroken: dict[int, float], tmp_path: Path) -> None:
    ray_hosts.wait_for_nodes(4)
    folder = run_folder(ray_hosts.storage, "orphan")
    submit = [str(write_recipe(tmp_path, "orphan", STEPS, SAVE)), "--nodes", "4", *OPTIONS]
    attached = Attached(ray_hosts.address, *submit)
    wait_for_step(folder, 20)
    for pid in ray_hosts.head.processes("launcher.job.driver"):
        os.kill(pid, signal.SIGKILL)
    assert attached.end() == 5, attached.output
    assert "without a word" in attached.output and "the same command continues" in attached.output
    again = lepton(ray_hosts.address, *submit)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same_result(ray_hosts, "orphan", unbroken)


@pytest.mark.long
def test_a_head_that_dies_is_followed_by_the_same_command(ray_hosts: RayHosts, unbroken: dict[int, float], tmp_path: Path) -> None:
    """The whole cluster is started anew; the storage is all that stayed."""
    ray_hosts.wait_for_nodes(4)
    folder = run_folder(ray_hosts.storage, "headless")
    submit = [str(write_recipe(tmp_path, "headless", STEPS, SAVE)), "--nodes", "4", *OPTIONS]
    attached = Attached(ray_hosts.address, *submit)
    wait_for_step(folder, 20)
    ray_hosts.restart()
    assert attached.end() == 5, attached.output
    again = lepton(ray_hosts.address, *submit)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same_result(ray_hosts, "headless", unbroken)


@pytest.mark.long
@pytest.mark.parametrize(("size", "said"), [("8k", "cannot be written"), ("200k", "full")])
def test_a_full_storage_is_named(size: str, said: str, ray_hosts: RayHosts, tmp_path: Path) -> None:
    """Too full for the run folder, or filling up while it trains. One small disk that all hosts mount."""
    ray_hosts.wait_for_nodes(4)
    subprocess.run(["mount", "-o", f"remount,size={size}", str(ray_hosts.network.disk)], check=True)
    done = lepton(ray_hosts.address, str(write_recipe(tmp_path, f"full-{size}")), "method={kind: full}", "--nodes", "4", "--storage", DISK)
    assert done.returncode in (2, 3, 8, 9), done.stdout + done.stderr
    assert said in done.stderr or "left, and the run needs" in done.stderr
    assert not (ray_hosts.network.disk / f"full-{size}/model").exists()


@pytest.mark.long
def test_a_node_with_another_version_is_named(ray_hosts: RayHosts, tmp_path: Path) -> None:
    ray_hosts.wait_for_nodes(4)
    odd = tmp_path / "odd/peft-0.0.1.dist-info"
    odd.mkdir(parents=True)
    (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    ray_hosts.host(4).kill()
    wait_until(lambda: ray_hosts.count_nodes() == 3, 60, "the node is gone")
    try:
        ray_hosts.switch_on(4, PYTHONPATH=f"{odd.parent}:{os.environ.get('PYTHONPATH', '')}")
        done = lepton(ray_hosts.address, str(write_recipe(tmp_path, "mixed")), "--nodes", "4", *OPTIONS)
        assert done.returncode == 5, done.stdout + done.stderr
        assert "0.0.1 on node4" in done.stderr and "peft" in done.stderr
    finally:
        ray_hosts.host(4).kill()
        ray_hosts.switch_on(4)
        shutil.rmtree(odd.parent)


@pytest.mark.long
def test_what_would_come_back_is_not_tried_again(ray_hosts: RayHosts, tmp_path: Path) -> None:
    ray_hosts.wait_for_nodes(4)
    recipe = str(write_recipe(tmp_path, "exploding", STEPS, SAVE))
    done = lepton(ray_hosts.address, recipe, "optim={name: sgd, lr: 1.0e+30, max_grad_norm: 0}", "--nodes", "4", *OPTIONS)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "restarting" not in done.stdout
    assert "at step" in done.stderr and "samples" in done.stderr and "optim.lr" in done.stderr
    broken = ray_hosts.storage / "broken.jsonl"
    broken.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": \n')
    bad = lepton(ray_hosts.address, recipe, f"data.train={STORAGE}/broken.jsonl", "name=bad", "--nodes", "4", *OPTIONS)
    assert bad.returncode == 8, bad.stdout + bad.stderr
    assert "broken.jsonl:2" in bad.stderr and "restarting" not in bad.stdout
