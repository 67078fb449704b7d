"""Checkpoints anywhere: a real S3 server on loopback, hosts that share no disk, a disk that fills up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, fine_tune, losses
from test_checkpoint_files import assert_holds, save
from test_resume import plan_case
from tiny import plan_tiny

from launcher.checkpoint.commit import list_committed
from launcher.checkpoint.find import find_checkpoint
from launcher.checkpoint.lease import OWNER, Lease
from launcher.checkpoint.storage import join_url, open_storage
from launcher.checkpoint.verify import find_damage

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket on an S3 server of its own (moto), on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/")
        from pyarrow.fs import S3FileSystem

        S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True).create_dir(
            "runs"
        )
        yield f"s3://runs?endpoint_override={urllib.parse.quote(f'http://127.0.0.1:{port}', safe='')}&region=us-east-1"
    finally:
        server.terminate()
        server.wait(10)


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer")


def test_a_bucket_keeps_the_same_promises(bucket: str) -> None:
    storage = open_storage(join_url(bucket, "format"))
    assert storage.list() == {}
    for step in (3, 6, 9):
        save(storage, step, keep=2)
    assert list_committed(storage) == [6, 9]
    assert_holds(storage, 9)
    for name in [name for name in storage.list() if name.startswith("step-000009/")]:
        good = storage.read(name)
        for bad in (good[:-1], good[:5] + bytes([good[5] ^ 1]) + good[6:]):
            storage.write(name, [bad])
            assert find_damage(storage, 9), name
        storage.write(name, [good])
    assert find_damage(storage, 9) == []
    assert find_checkpoint(join_url(bucket, "format")) == join_url(bucket, "format", "step-000009")
    lease = Lease(storage)
    lease.take()
    assert OWNER in storage.list()
    lease.release()
    assert OWNER not in storage.list()


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    storage = open_storage(join_url(bucket.replace("s3://runs", "s3://no-such-bucket"), "run"))
    with pytest.raises(OSError, match="no-such-bucket"):
        storage.write("a", [b"b"])


def test_a_run_saves_to_a_bucket_and_another_machine_goes_on(
    bucket: str, two_ranks: Ranks, one_rank: Ranks, tiny: Path, tmp_path: Path
) -> None:
    """The second machine has nothing of the first but the bucket; it has one device where the first had two."""
    save_there = {"every_steps": 3, "keep": 10, "storage": join_url(bucket, "lepton")}
    case: dict[str, Any] = {
        "save": save_there,
        "data": {"train": str(tiny / "train.jsonl")},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    straight = two_ranks.run(fine_tune, plan_case(tiny, tmp_path / "straight", 2, data=case["data"]))[0]
    first = two_ranks.run(fine_tune, plan_case(tiny, tmp_path / "one/run", 2, **case), 4)[0]
    assert not (tmp_path / "one/run/checkpoints").exists()
    shutil.rmtree(tmp_path / "one")
    second = one_rank.run(fine_tune, plan_case(tiny, tmp_path / "two/run", 1, **case))[0]
    assert losses(first) == losses(straight)[:4]
    assert losses(second) == pytest.approx(losses(straight)[4:], abs=1e-4)


# ----------------------------------------------------------------------------------------- hosts that share no disk

HOST = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=200m tmpfs {disk}
mkdir -p {disk}/run/logs
cp {plan} {disk}/run/plan.json
exec {python} -m launcher.train.worker {disk}/run/plan.json
"""


def start_hosts(plan: Path, disk: Path, extra: dict[str, str]) -> list[subprocess.Popen[str]]:
    """A rank a host; a host's disk is a tmpfs in a mount namespace of its own, which ends with its process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    common = {**os.environ, **extra, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu",
              "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    script = HOST.format(disk=disk, plan=plan, python=sys.executable)
    return [
        subprocess.Popen(["unshare", "--mount", "sh", "-c", script], env={**common, "RANK": str(rank)}, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
        for rank in range(2)
    ]  # fmt: skip


def write_plan(tiny: Path, disk: Path, path: Path, **case: Any) -> None:
    plan = plan_tiny(tiny, path.parent / "unused", ranks=2, track={"to": []}, **case)
    path.write_text(json.dumps({**plan.to_dict(), "run_dir": str(disk / "run")}))


@needs_root
def test_hosts_that_share_nothing_save_to_a_bucket_and_new_hosts_go_on(bucket: str, tiny: Path, tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    storage = join_url(bucket, "hosts")
    case: dict[str, Any] = {"schedule": {"max_steps": 4000, "epochs": 4000.0}, "save": {"every_steps": 5, "storage": storage}}
    write_plan(tiny, disk, tmp_path / "plan.json", **case)
    hosts = start_hosts(tmp_path / "plan.json", disk, {})
    committed = open_storage(join_url(storage, "run", "checkpoints"))
    deadline = time.monotonic() + 240
    while not list_committed(committed) and time.monotonic() < deadline and hosts[0].poll() is None:
        time.sleep(0.5)
    for host in hosts:  # both hosts are gone, their disks with them
        host.send_signal(signal.SIGKILL)
        host.wait()
    assert list_committed(committed), hosts[0].stdout.read() if hosts[0].stdout else ""
    reached = max(list_committed(committed))
    assert not list(disk.iterdir())
    write_plan(tiny, disk, tmp_path / "again.json", **{**case, "schedule": {"max_steps": reached + 2, "epochs": 4000.0}})
    facts = json.loads((tmp_path / "again.json").read_text())
    (tmp_path / "again.json").write_text(json.dumps({**facts, "allow_changed": ["schedule.max_steps"]}))
    told = [host.communicate(timeout=300)[0] for host in start_hosts(tmp_path / "again.json", disk, {})]
    assert f"going on after step {reached}" in told[0], told[0]
    assert max(list_committed(committed)) == reached + 2
    assert find_damage(committed, reached + 2) == []


@needs_root
def test_hosts_that_share_no_disk_are_told_so(tiny: Path, tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    write_plan(tiny, disk, tmp_path / "plan.json")
    hosts = start_hosts(tmp_path / "plan.json", disk, {})
    told = [host.communicate(timeout=300)[0] for host in hosts]
    assert all(host.returncode != 0 for host in hosts)
    assert "set save.storage to a folder that all of them see" in told[1], told[1]


# ---------------------------------------------------------------------------------------------------- a disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    (disk := tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=11m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@needs_root
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(small_disk: Path, two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    """The disk holds two checkpoints of 4 MiB and not three: keep=2 needs room for a third before one goes."""
    straight = two_ranks.run(fine_tune, plan_case(tiny, tmp_path / "straight", 2))[0]
    storage = {"storage": str(small_disk), "every_steps": 1, "keep": 2}
    events = two_ranks.run(fine_tune, plan_case(tiny, tmp_path / "run", 2, save=storage))[0]
    assert losses(events) == losses(straight)
    failed = [event for event in events if event["event"] == "checkpoint_failed"]
    assert failed and all("No space left" in event["why"] for event in failed)
    held = open_storage(str(small_disk / "run/checkpoints"))
    committed = list_committed(held)
    assert committed == [1, 2]
    assert all(find_damage(held, step) == [] for step in committed)
    assert {name.split("/")[0] for name in held.list()} == {"step-000001", "step-000002"}, "a failed save left something behind"


def test_a_url_with_a_secret_in_it_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID"):
        plan_case(tiny, tmp_path, 2, save={"storage": "s3://key:secret@runs/lepton"})
