"""The format and its promises, on storage alone: no training, so that each byte and each operation can be tried."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import make_recipe

from launcher.checkpoint.commit import (
    Commit,
    list_committed,
    list_steps,
    load_commit,
    mark_damaged,
    prune,
    step_folder,
    wait_for_manifests,
    write_commit,
)
from launcher.checkpoint.fetch import fetch
from launcher.checkpoint.find import find_checkpoint, find_newest, split_step_url
from launcher.checkpoint.identity import check_keys, check_same, find_differences, hash_weights, make_identity
from launcher.checkpoint.lease import OWNER, Lease
from launcher.checkpoint.reshard import Reader
from launcher.checkpoint.shard import CHUNK_BYTES, DamagedCheckpoint, Piece, shard_name, write_shard
from launcher.checkpoint.storage import Storage, join_url, open_storage
from launcher.checkpoint.verify import find_damage, list_found
from launcher.errors import CheckpointError

SIZES = {"embed": 301, "layer.weight": 37, "norm": 3}
RANKS = 2


def value_of(name: str, kind: str, step: int) -> np.ndarray[Any, Any]:
    """What a whole parameter holds at a step: known without having been saved."""
    seed = abs(hash((len(name), len(kind), step))) % 2**32
    return np.random.default_rng(seed).standard_normal(SIZES[name]).astype(np.float32)


def pieces_of(rank: int, ranks: int, step: int) -> list[Piece]:
    pieces = []
    for name, size in SIZES.items():
        start, stop = size * rank // ranks, size * (rank + 1) // ranks
        for kind in ("master", "exp_avg"):
            data = value_of(name, kind, step)[start:stop]
            if len(data):
                pieces.append(
                    Piece(name=name, kind=kind, start=start, length=len(data), shape=(size,), dtype="F32", data=memoryview(data.tobytes()))
                )
    return pieces


def commit_of(step: int, ranks: int, attempt: str, **more: Any) -> Commit:
    facts: dict[str, Any] = dict(step=step, world_size=ranks, zero_stage=2, attempt=attempt, time=1.5, plan_digest="d", optimizer="adamw",
                                 scalars={"step": step}, state={"step": step, "samples_seen": 8 * step}, identity={"optim.lr": 1e-3}, shards=(), total_steps=12)  # fmt: skip
    return Commit(**(facts | more))


def save(storage: Storage, step: int, *, ranks: int = RANKS, attempt: str = "a", keep: int = 9) -> None:
    """All ranks of a save, one after the other."""
    for rank in range(ranks):
        write_shard(storage, step_folder(step), rank, attempt, pieces_of(rank, ranks, step))
    save_as_rank_0(storage, step, ranks, attempt, keep)


def save_as_rank_0(storage: Storage, step: int, ranks: int, attempt: str, keep: int, given_up: Callable[[], bool] = lambda: False) -> None:
    records = wait_for_manifests(storage, step, ranks, attempt, given_up)
    if records is not None:
        write_commit(storage, commit_of(step, ranks, attempt, shards=records))
        prune(storage, keep)


def assert_holds(storage: Storage, step: int) -> None:
    """The checkpoint gives each parameter of its step back, to the bit."""
    reader = Reader(storage, load_commit(storage, step))
    for name, size in SIZES.items():
        for kind in ("master", "exp_avg"):
            data = b"".join(bytes(reader.read(span)) for span in reader.find_spans(name, kind, 0, size))
            assert data == value_of(name, kind, step).tobytes()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "checkpoints"))


# ----------------------------------------------------------------------------------------------------------- the format


def test_a_shard_is_a_safetensors_file(storage: Storage, tmp_path: Path) -> None:
    save(storage, 3)
    for rank in range(RANKS):
        held = load_file(tmp_path / "checkpoints/step-000003" / shard_name(rank))
        assert set(held) == {f"{kind}/{name}" for name in SIZES for kind in ("master", "exp_avg")}
        half = slice(301 * rank // 2, 301 * (rank + 1) // 2)
        assert held["master/embed"].tobytes() == value_of("embed", "master", 3)[half].tobytes()


def test_only_safetensors_and_json_are_written(storage: Storage) -> None:
    save(storage, 3)
    assert {name.rsplit(".", 1)[1] for name in storage.list()} == {"safetensors", "json"}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_range_can_be_read_whoever_wrote_it(storage: Storage, ranks: int) -> None:
    save(storage, 3, ranks=ranks)
    reader = Reader(storage, load_commit(storage, 3))
    whole = value_of("embed", "exp_avg", 3)
    for start, stop in [(0, 301), (0, 1), (300, 301), (133, 134), (60, 241), (149, 151)]:
        data = b"".join(bytes(reader.read(span)) for span in reader.find_spans("embed", "exp_avg", start, stop))
        assert data == whole[start:stop].tobytes()
    with pytest.raises(DamagedCheckpoint, match="no shard holds"):
        reader.find_spans("embed", "exp_avg", 290, 302)


def test_only_the_chunks_of_a_range_are_read(tmp_path: Path) -> None:
    elements = 3 * CHUNK_BYTES // 4
    data = np.arange(elements, dtype=np.float32)
    piece = Piece(name="big", kind="master", start=0, length=elements, shape=(elements,), dtype="F32", data=memoryview(data.tobytes()))
    read: list[int] = []
    storage = open_storage(str(tmp_path), lambda word: read.append(int(word.split()[1])) if word.startswith("read ") else None)
    write_shard(storage, step_folder(3), 0, "a", [piece])
    records = wait_for_manifests(storage, 3, 1, "a", lambda: False)
    assert records is not None
    write_commit(storage, commit_of(3, 1, "a", shards=records))
    reader = Reader(storage, load_commit(storage, 3))
    read.clear()
    (span,) = reader.find_spans("big", "master", 5, 9)
    assert bytes(reader.read(span)) == data[5:9].tobytes()
    assert read == [CHUNK_BYTES]
    read.clear()
    (span,) = reader.find_spans("big", "master", CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4 + 1)
    assert bytes(reader.read(span)) == data[CHUNK_BYTES // 4 - 1 : CHUNK_BYTES // 4 + 1].tobytes()
    assert read == [2 * CHUNK_BYTES]


def test_a_thousand_small_tensors_are_read_in_few_requests(tmp_path: Path) -> None:
    read: list[str] = []
    storage = open_storage(str(tmp_path), lambda word: read.append(word) if word.startswith("read ") else None)
    values = {f"layer{number}": np.full(10, number, dtype=np.float32) for number in range(1000)}
    pieces = [Piece(name=name, kind="master", start=0, length=10, shape=(10,), dtype="F32", data=memoryview(value.tobytes()))
              for name, value in values.items()]  # fmt: skip
    write_shard(storage, step_folder(3), 0, "a", pieces)
    records = wait_for_manifests(storage, 3, 1, "a", lambda: False)
    assert records is not None
    write_commit(storage, commit_of(3, 1, "a", shards=records))
    reader = Reader(storage, load_commit(storage, 3))
    targets = {name: bytearray(40) for name in values}
    spans = {name: reader.find_spans(name, "master", 0, 10)[0] for name in values}
    read.clear()
    fetch(storage, [reader.want(spans[name], memoryview(target)) for name, target in reversed(targets.items())])
    assert len(read) == 2 and all(target == values[name].tobytes() for name, target in targets.items())
    read.clear()
    assert find_damage(storage, 3) == [] and len(read) == 5  # COMMIT, manifest, header, and the same two


# --------------------------------------------------------------------------------------------------------------- damage


def test_every_flipped_byte_is_found(storage: Storage, tmp_path: Path) -> None:
    save(storage, 3)
    assert find_damage(storage, 3) == []
    missed, tried = [], 0
    for path in sorted((tmp_path / "checkpoints/step-000003").iterdir()):
        good = path.read_bytes()
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
            tried += 1
            if not find_damage(storage, 3):
                missed.append((path.name, place))
        path.write_bytes(good)
    assert tried > 5_000 and missed == []
    assert find_damage(storage, 3) == []


def test_every_cut_and_every_missing_file_is_found(storage: Storage, tmp_path: Path) -> None:
    save(storage, 3)
    for path in sorted((tmp_path / "checkpoints/step-000003").iterdir()):
        good = path.read_bytes()
        for length in range(0, len(good), 7):
            path.write_bytes(good[:length])
            assert find_damage(storage, 3), (path.name, length)
        path.write_bytes(good + b"\n")
        assert find_damage(storage, 3), path.name
        path.unlink()
        assert find_damage(storage, 3), path.name
        path.write_bytes(good)


def test_a_manifest_of_another_save_is_not_taken(storage: Storage) -> None:
    """A save of step 3 was cut short after rank 1 wrote; the next attempt waits for rank 1 anew."""
    write_shard(storage, step_folder(3), 1, "first", pieces_of(1, 2, 3))
    write_shard(storage, step_folder(3), 0, "second", pieces_of(0, 2, 3))
    looks = iter([False, False, True])
    assert wait_for_manifests(storage, 3, 2, "second", lambda: next(looks)) is None
    write_shard(storage, step_folder(3), 1, "second", pieces_of(1, 2, 3))
    assert wait_for_manifests(storage, 3, 2, "second", lambda: False) is not None


def test_a_checkpoint_set_aside_is_not_taken_again(storage: Storage) -> None:
    for step in (3, 6):
        save(storage, step)
    mark_damaged(storage, 6, "a bad byte")
    assert list_committed(storage) == [3]
    newest = find_newest(storage)
    assert newest is not None and newest.step == 3
    found = {item.step: item for item in list_found(storage)}
    assert (found[6].condition, found[6].why) == ("damaged", "a bad byte")
    save(storage, 6, attempt="b")
    assert find_damage(storage, 6) == [] and list_committed(storage) == [3, 6]


def test_pruning_keeps_the_newest_and_the_best(storage: Storage) -> None:
    for step in (3, 6, 9, 12):
        save(storage, step)
    write_shard(storage, step_folder(10), 0, "cut short", pieces_of(0, 2, 10))
    write_shard(storage, step_folder(15), 0, "in flight", pieces_of(0, 2, 15))
    assert prune(storage, 2, best_step=3) == [6, 10]
    assert list(list_steps(storage)) == [3, 9, 12, 15]


def test_files_are_listed_while_another_process_prunes(storage: Storage) -> None:
    """Folders go while they are looked into: that is no error."""
    for step in range(40):
        for name in ("a", "b"):
            storage.write(f"{step_folder(step)}/{name}", [b"x"])
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            for _ in range(20):
                for step in range(40):
                    storage.delete(step_folder(step))
                for step in range(40):
                    os.makedirs(f"{storage.url}/{step_folder(step)}")
        os._exit(0)
    listed = 0
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        assert set(storage.list().values()) <= {1}
        listed += 1
    assert listed


# ---------------------------------------------------------------------------------------------------------- kill anywhere


def run_ranks(root: str, steps: list[int], attempt: str, log: Path, kill: tuple[int, int] | None) -> list[int]:
    """Save `steps` with two processes that write and commit as a run does; `kill` is (rank, at which operation it dies).

    Returns how many operations each rank did.
    """
    children = {}
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                _save_as(rank, root, steps, attempt, log, kill[1] if kill and kill[0] == rank else -1)
                code = 0
            os._exit(code)
        children[pid] = rank
    while children:
        pid, status = os.wait()
        rank = children.pop(pid)
        if os.WIFSIGNALED(status):  # the launcher ends the others once one is gone
            for other in children:
                os.kill(other, signal.SIGKILL)
        else:
            assert status == 0 or kill, f"rank {rank} failed"
    return [int((log / f"ops-{rank}").read_text()) for rank in range(RANKS)] if kill is None else []


def _save_as(rank: int, root: str, steps: list[int], attempt: str, log: Path, kill_at: int) -> None:
    done = 0

    def watch(word: str) -> None:
        nonlocal done
        if word.startswith("read"):
            return
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    storage = open_storage(root, watch)
    for step in steps:
        write_shard(storage, step_folder(step), rank, f"{attempt}-{step}", pieces_of(rank, RANKS, step))
        if rank == 0:
            save_as_rank_0(storage, step, RANKS, f"{attempt}-{step}", 2)
            (log / "told").write_text(str(step))
            (log / "told").replace(log / "committed")
        while rank and int((log / "committed").read_text()) < step:
            time.sleep(0.001)  # as a rank waits at the next save for the last one
    (log / f"ops-{rank}").write_text(str(done))


def test_killed_at_any_operation_it_resumes_and_loses_nothing(tmp_path: Path) -> None:
    """Each rank is killed at each of its operations in turn: before and after every open, write, sync, rename and delete."""

    def begin(name: str) -> tuple[str, Path]:
        (log := tmp_path / name / "log").mkdir(parents=True)
        root = str(tmp_path / name / "checkpoints")
        for step in (3, 6):
            save(open_storage(root), step, keep=2)
        (log / "committed").write_text("6")
        return root, log

    root, log = begin("counted")
    operations = run_ranks(root, [9, 12], "counted", log, None)
    points = [(rank, at) for rank in range(RANKS) for at in range(operations[rank])]
    assert len(points) >= 100
    newest_found = set()
    for rank, at in points:
        root, log = begin(f"{rank}-{at}")
        run_ranks(root, [9, 12], "killed", log, (rank, at))
        storage = open_storage(root)
        assert_whole_after_kill(storage, committed=int((log / "committed").read_text()))
        newest = find_newest(storage)
        assert newest is not None
        newest_found.add(newest.step)
        run_ranks(root, [step for step in (9, 12) if step > newest.step], "again", log, None)
        assert list_committed(storage)[-2:] == [9, 12]
        for step in (9, 12):
            assert find_damage(storage, step) == []
            assert_holds(storage, step)
    assert newest_found == {6, 9, 12}


def assert_whole_after_kill(storage: Storage, committed: int) -> None:
    """All that says it is committed is whole; and what was reported as committed is there still."""
    steps = list_committed(storage)
    assert steps and max(steps) >= committed
    for step in steps:
        assert find_damage(storage, step) == []
        assert_holds(storage, step)


# ----------------------------------------------------------------------------------------------------------- two writers


@contextlib.contextmanager
def owner_process(root: str, host: str | None = None) -> Iterator[int]:
    """Another process that holds the lease; `host` makes it look as if it ran on another machine."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            if host:
                import launcher.checkpoint.lease as lease_module

                lease_module._boot_id = lambda: host
            Lease(open_storage(root), beat_s=0.05).take()
            os.write(told, b"1")
            time.sleep(60)
        os._exit(1)
    assert os.read(ready, 1) == b"1"
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@pytest.mark.parametrize("host", [None, "another machine"])
def test_a_second_run_is_refused_while_the_first_lives(host: str | None, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with owner_process(str(tmp_path), host) as pid:
        with pytest.raises(CheckpointError, match=rf"another run writes to .*process {pid} on"):
            Lease(storage, beat_s=0.3, patience_s=1.0).take()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        lease = Lease(storage, beat_s=0.3, patience_s=1.0)
        lease.take()
        lease.check()
    lease.release()
    assert OWNER not in storage.list()


def test_who_was_overtaken_does_not_commit(storage: Storage) -> None:
    lease = Lease(storage)
    lease.take()
    facts = json.loads(storage.read(OWNER))
    storage.write(OWNER, [json.dumps({**facts, "token": "other"}).encode()])
    with pytest.raises(CheckpointError, match="took over"):
        lease.check()
    lease.release()
    assert json.loads(storage.read(OWNER))["token"] == "other"


# ----------------------------------------------------------------------------------------------- what it was made from


def test_differences_are_listed_and_let_through_by_key(tiny: Path) -> None:
    then = make_identity(make_recipe(tiny), dtype="fp32", weights="w1", data="d1")
    now = make_identity(
        make_recipe(tiny, optim={"lr": 1e-3}, schedule={"epochs": 9.0}, method={"kind": "lora"}), dtype="bf16", weights="w2", data="d1"
    )
    found = {difference.key: difference for difference in find_differences(then, now)}
    assert {"optim.lr", "schedule.epochs", "method.kind", "method.r", "model.dtype", "model.weights"} <= found.keys()
    assert "data.content" not in found
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.003 then, 0\.001 now") as raised:
        check_same(then, now, ["schedule"], "it")
    assert "schedule.epochs" not in raised.value.message
    assert "--allow-changed optim.lr" in raised.value.remedy
    assert len(check_same(then, now, ["optim.lr", "schedule", "method", "model"], "it")) == len(found)


def test_what_does_not_change_the_weights_may_change(tiny: Path) -> None:
    then = make_identity(make_recipe(tiny), dtype="fp32")
    now = make_identity(
        make_recipe(tiny, parallel={"zero_stage": 3}, batch={"micro_batch_size": 1}, memory={"gradient_checkpointing": False},
                    save={"keep": 5}, track={"to": []}, name="other", output_dir="elsewhere"),
        dtype="fp32",
    )  # fmt: skip
    assert find_differences(then, now) == []


def test_a_key_that_no_recipe_has_is_refused() -> None:
    check_keys(["optim.lr", "schedule", "data.content", "model.weights"])
    with pytest.raises(CheckpointError, match=r"optimiser\.lr: a recipe has no such key"):
        check_keys(["optimiser.lr"])


def test_the_hash_of_weights_follows_their_bytes(tmp_path: Path) -> None:
    (weights := tmp_path / "model.safetensors").write_bytes(b"one")
    first = hash_weights([weights], tmp_path / "cache")
    assert hash_weights([weights], tmp_path / "cache") == first
    weights.write_bytes(b"two")
    os.utime(weights, ns=(1, 1))
    assert hash_weights([weights], tmp_path / "cache") != first


# -------------------------------------------------------------------------------------------------------- where they lie


def test_a_path_names_a_checkpoint(storage: Storage, tmp_path: Path) -> None:
    for step in (3, 6):
        save(storage, step)
    newest = str(tmp_path / "checkpoints/step-000006")
    assert find_checkpoint(str(tmp_path)) == find_checkpoint(str(tmp_path / "checkpoints")) == newest
    assert find_checkpoint(str(tmp_path / "checkpoints/step-000003")).endswith("step-000003")
    assert split_step_url("s3://b/run/checkpoints/step-000120?region=x") == ("s3://b/run/checkpoints?region=x", 120)
    assert join_url("s3://b/run?region=x", "checkpoints") == "s3://b/run/checkpoints?region=x"
    for wrong in ("checkpoints/step-000009", "nowhere"):
        with pytest.raises(CheckpointError, match="checkpoint"):
            find_checkpoint(str(tmp_path / wrong))


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(CheckpointError, match="write a path, s3://"):
        open_storage("nfs://host/share")
