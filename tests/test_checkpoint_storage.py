"""Checkpoints anywhere: a real S3 server on loopback, hosts that share no disk, a disk that fills up."""

from __future__ import annotations

import contextlib
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
from test_checkpoint_verbs import answer
from test_cli import invoke
from test_resume import plan_case
from tiny import plan_tiny

from launcher.checkpoint.commit import list_committed
from launcher.checkpoint.find import find_checkpoint
from launcher.checkpoint.lease import OWNER, Lease
from launcher.checkpoint.shard import CHUNK_BYTES
from launcher.checkpoint.storage import Storage, join_url, open_storage
from launcher.checkpoint.verify import find_damage
from launcher.errors import CheckpointError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@contextlib.contextmanager
def serve_s3(**environment: str) -> Iterator[str]:
    """A real S3 server (moto) on loopback; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment})
    try:
        _wait_for(f"http://127.0.0.1:{port}/moto-api/")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket."""
    from pyarrow.fs import S3FileSystem

    with serve_s3() as address:
        server = S3FileSystem(endpoint_override=address, region="us-east-1", allow_bucket_creation=True)
        server.create_dir("runs")
        yield s3_url(address)


def s3_url(address: str) -> str:
    return f"s3://runs?endpoint_override={urllib.parse.quote(address, safe='')}&region=us-east-1"


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
    check_promises(storage)
    assert find_checkpoint(join_url(bucket, "format")) == join_url(bucket, "format", "step-000009")


def check_promises(storage: Storage) -> None:
    """Saved, pruned, damaged, owned and read in parts of more than a chunk: as on a disk."""
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
    lease = Lease(storage)
    lease.take()
    assert OWNER in storage.list()
    lease.release()
    assert OWNER not in storage.list()
    large = os.urandom(3 * CHUNK_BYTES)
    storage.write("large", [large[:CHUNK_BYTES], large[CHUNK_BYTES:]])
    buffers = [memoryview(bytearray(length)) for length in (5, CHUNK_BYTES, 7)]
    assert storage.read_into("large", 1000, buffers) == CHUNK_BYTES + 12
    assert b"".join(buffers) == large[1000 : 1000 + CHUNK_BYTES + 12]
    storage.delete("large")
    storage.delete("step-000100")


def test_a_bucket_that_is_not_there_is_named_with_the_remedy(bucket: str) -> None:
    storage = open_storage(join_url(bucket.replace("s3://runs", "s3://no-such-bucket"), "run"))
    with pytest.raises(CheckpointError, match=r"s3://no-such-bucket/run/a") as raised:
        storage.write("a", [b"b"])
    assert "make the bucket first" in raised.value.remedy


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("rest", ["", "/folder", "?region=x"])
def test_a_url_without_a_bucket_is_refused_by_recipe_and_verbs(scheme: str, rest: str, tiny: Path, tmp_path: Path) -> None:
    url = f"{scheme}://{rest}"
    with pytest.raises(ValueError, match=f"names no bucket; write {scheme}://BUCKET/FOLDER"):
        plan_case(tiny, tmp_path, 2, save={"storage": url})
    result = invoke("checkpoints", url)
    assert result.exit_code == 9 and f"write {scheme}://BUCKET/FOLDER" in result.output


def test_a_server_that_does_not_answer_is_told_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = invoke("checkpoints", f"s3://runs/lepton?endpoint_override=http%3A%2F%2F127.0.0.1%3A{port}&region=us-east-1")
    assert result.exit_code == 9 and "AWS_ENDPOINT_URL" in result.output
    result = invoke("checkpoints", f"gs://anonymous@runs/lepton?endpoint_override=127.0.0.1%3A{port}&scheme=http&retry_limit_seconds=1")
    assert result.exit_code == 9 and "nothing answers there" in result.output


def test_wrong_keys_are_told_with_the_remedy() -> None:
    """moto asks for real keys here, as S3 does, and the tests' are not known to it."""
    with serve_s3(INITIAL_NO_AUTH_ACTION_COUNT="0") as address:
        result = invoke("checkpoints", s3_url(address))
    assert result.exit_code == 9 and "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in result.output


def test_the_verbs_work_on_a_bucket(bucket: str) -> None:
    run = join_url(bucket, "verbs")
    storage = open_storage(join_url(run, "checkpoints"))
    for step in (3, 6, 9):
        save(storage, step)
    assert [(row["step"], row["condition"], row["verified"]) for row in answer(run)["steps"]] == [(s, "committed", None) for s in (3, 6, 9)]
    assert all(row["verified"] for row in answer(run, "list", "--verify")["steps"])
    facts = answer(run, "inspect", "--step", 6)
    assert facts["step"] == 6 and facts["kinds"]["master"]["elements"] == 301 + 37 + 3
    shard = "step-000006/rank-00001.safetensors"
    storage.write(shard, [storage.read(shard)[:-1] + b"\0"])
    result = invoke("checkpoints", run, "verify")
    assert result.exit_code == 9
    assert "step 6: DAMAGED" in result.output and "step 9: whole" in result.output
    assert answer(run, "prune", "--keep", 1, "--dry-run")["deleted"] == [3, 6]
    assert answer(run, "prune", "--keep", 1)["deleted"] == [3, 6]
    assert list_committed(storage) == [9] and {name.split("/")[0] for name in storage.list()} == {"step-000009"}
    assert_holds(storage, 9)


GCS_SERVER = """
import sys
from functools import partial
from http.server import ThreadingHTTPServer
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

storage = Storage(use_memory_fs=True)
create_bucket("runs", storage)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), partial(RequestHandler, storage)).serve_forever()
"""
"""gcp-storage-emulator with a thread a request: its own server takes them one by one, and pyarrow keeps two open to read a range."""


def test_a_google_bucket_keeps_the_same_promises() -> None:
    """An emulator, not Google's server: what pyarrow asks for is real, access rights and consistency are not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", GCS_SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/storage/v1/b/runs")
        storage = open_storage(f"gs://anonymous@runs/lepton?endpoint_override=127.0.0.1%3A{port}&scheme=http")
        check_promises(storage)
        assert find_checkpoint(storage.url) == join_url(storage.url, "step-000009")
    finally:
        server.terminate()
        server.wait(10)


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
