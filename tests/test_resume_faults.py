"""What a run does with a checkpoint that is damaged, that cannot be read, or that was made from something else; and how much it reads."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, fine_tune, losses
from safetensors.torch import load_file, save_file
from test_checkpoint_files import owner_process
from test_resume import plan_case, read_exported, read_shards, take_step
from tiny import write_conversations

from launcher.checkpoint.commit import list_committed, load_commit
from launcher.checkpoint.storage import open_storage
from launcher.checkpoint.verify import find_damage, list_found
from launcher.plan import Plan
from launcher.run import Event

CASE: dict[str, Any] = {"save": {"every_steps": 2, "keep": 10}}
UNMEASURED: dict[str, Any] = {**CASE, "evaluate": {}}
FILES = ["COMMIT.json", "rank-00000.json", "rank-00001.json", "rank-00000.safetensors", "rank-00001.safetensors"]


@pytest.fixture(scope="module")
def straight(two_ranks: Ranks, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """An unbroken run of six steps, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, two_ranks.run(fine_tune, plan_case(tiny, folder, 2, **CASE))[0]


def begin_again(straight: Path, run_dir: Path) -> None:
    """Lay the checkpoints of steps 2 and 4 into a new run's folder."""
    for step in (2, 4):
        take_step(straight, run_dir, step)


def harm(path: Path, how: str, seed: int) -> None:
    data = bytearray(path.read_bytes())
    place = random.Random(f"{path.name}{seed}").randrange(len(data))
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:place])
    else:
        data[place] ^= 1 << seed % 8
        path.write_bytes(data)


def assert_falls_back(ranks: Ranks, straight: tuple[Path, list[Event]], tiny: Path, run_dir: Path) -> None:
    """A run whose newest checkpoint, of step 4, was harmed: it says so, begins with that of step 2, and is the unbroken run all the same."""
    harmed = find_damage(open_storage(str(run_dir / "checkpoints")), 4)
    assert harmed
    resumed = ranks.run(fine_tune, plan_case(tiny, run_dir, 2, **CASE))[0]
    # The header of a safetensors file is for other readers: a resume does not read it, and is not harmed by it.
    start = 4 if "header does not match" in harmed[0] else 2
    assert losses(resumed) == losses(straight[1])[start:]
    if start == 2 and (run_dir / "checkpoints/step-000004/DAMAGED.json").exists():
        assert any("checkpoint of step 4 is damaged and left out" in event["text"] for event in resumed if event["event"] == "note")
    assert read_shards(run_dir, 6) == read_shards(straight[0], 6)
    assert read_exported(run_dir) == read_exported(straight[0])


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_a_harmed_file_costs_the_steps_since_the_one_before(
    file: str, how: str, straight: tuple[Path, list[Event]], two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    begin_again(straight[0], tmp_path)
    harm(tmp_path / "checkpoints/step-000004" / file, how, seed=1)
    assert_falls_back(two_ranks, straight, tiny, tmp_path)


@pytest.mark.checkpoints
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("how", ["flipped", "cut"])
@pytest.mark.parametrize("file", FILES)
def test_a_harmed_file_costs_the_steps_since_the_one_before_wide(
    file: str, how: str, seed: int, straight: tuple[Path, list[Event]], two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    begin_again(straight[0], tmp_path)
    harm(tmp_path / "checkpoints/step-000004" / file, how, seed)
    assert_falls_back(two_ranks, straight, tiny, tmp_path)


def test_where_all_are_damaged_the_run_does_not_start_over(
    straight: tuple[Path, list[Event]], two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    begin_again(straight[0], tmp_path)
    for step in (2, 4):
        harm(tmp_path / f"checkpoints/step-{step:06d}/rank-00001.json", "cut", seed=1)
    with pytest.raises(AssertionError, match=r"none of the run's 2 checkpoints is whole(.|\n)*--fresh"):
        two_ranks.run(fine_tune, plan_case(tiny, tmp_path, 2, **CASE))
    assert [(found.step, found.condition) for found in list_found(open_storage(str(tmp_path / "checkpoints")))] == [
        (2, "damaged"),
        (4, "damaged"),
    ]


# ------------------------------------------------------------------------------------------- a storage that fails, or counts


def fine_tune_watched(me: Any, plan: Plan, fail_on_rank: int) -> tuple[dict[str, int], str]:
    """Job: fine_tune whose storage counts the bytes read of each file, until training begins, and fails to read a shard on one rank."""
    from launcher.errors import CheckpointError
    from launcher.run import RunFolder
    from launcher.train.worker import fine_tune as run

    read: dict[str, int] = {}
    counting = True

    def watch(word: str) -> None:
        if not word.startswith("read ") or not counting:
            return
        _, count, name = word.split(" ", 2)
        read[name] = read.get(name, 0) + int(count)
        if me.rank == fail_on_rank and name.endswith(".safetensors"):
            raise ConnectionResetError("the share went away")

    def stop_asked() -> bool:
        nonlocal counting
        counting = False
        return False

    try:
        run(plan, me, RunFolder(Path(plan.run_dir)), lambda event: None, stop_asked, open_storage(plan.checkpoints, watch), None)
    except CheckpointError as error:
        return read, str(error)
    return read, ""


def test_a_storage_that_fails_costs_no_checkpoint(straight: tuple[Path, list[Event]], two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    begin_again(straight[0], tmp_path)
    plan = plan_case(tiny, tmp_path, 2, **CASE)
    for _, said in two_ranks.run(fine_tune_watched, plan, 1):
        assert "the share went away" in said and "the same command again" in said
    assert list_committed(open_storage(plan.checkpoints)) == [2, 4]
    resumed = two_ranks.run(fine_tune, plan)[0]
    assert losses(resumed) == losses(straight[1])[4:]


def fine_tune_cut_off(me: Any, plan: Plan, step: int) -> list[Event]:
    """Job: fine_tune on a storage that can neither be written to nor cleaned up while `step` is saved."""
    from launcher.run import RunFolder
    from launcher.train.worker import fine_tune as run

    gone = True

    def watch(word: str) -> None:
        nonlocal gone
        if gone and f"step-{step:06d}/rank-00000" in word:
            raise ConnectionResetError("the share went away")
        if gone and word.startswith(f"before delete step-{step:06d}"):
            gone = False
            raise ConnectionResetError("the share went away")

    events: list[Event] = []
    run(plan, me, RunFolder(Path(plan.run_dir)), events.append, lambda: False, open_storage(plan.checkpoints, watch), None)
    return events


def test_a_storage_that_fails_while_saving_costs_that_save_alone(
    straight: tuple[Path, list[Event]], two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    case = {"save": {"every_steps": 2, "keep": 1}}
    events = two_ranks.run(fine_tune_cut_off, plan_case(tiny, tmp_path, 2, **case), 4)[0]
    assert losses(events) == losses(straight[1])
    (failed,) = [event for event in events if event["event"] == "checkpoint_failed"]
    assert failed["step"] == 4 and "the share went away" in failed["why"]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [2, 6]
    assert {name.split("/")[0] for name in open_storage(str(tmp_path / "checkpoints")).list()} == {"step-000006"}
    assert read_shards(tmp_path, 6) == read_shards(straight[0], 6)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_rank_reads_its_share_and_each_byte_of_it_once(stage: str, two_ranks: Ranks, one_rank: Ranks, tiny: Path, tmp_path: Path) -> None:
    """At the same world size its own shard, but for the header and the other's part; on more ranks than saved it, no more than its part."""
    # No best weights, which each rank of stage 2 keeps whole.
    plan = plan_case(tiny, tmp_path / "two", 2, stage=stage, **UNMEASURED)
    two_ranks.run(fine_tune, plan, 2)
    commit = load_commit(open_storage(plan.checkpoints), 2)
    for rank, (read, _) in enumerate(two_ranks.run(fine_tune_watched, plan, -1)):
        shards = {name: count for name, count in read.items() if name.endswith(".safetensors")}
        assert list(shards) == [f"{commit.folder}/rank-{rank:05d}.safetensors"]
        (count,) = shards.values()
        assert 0.95 * commit.shards[rank].num_bytes < count < commit.shards[rank].num_bytes
    plan = plan_case(tiny, tmp_path / "one", 1, stage=stage, **UNMEASURED)
    one_rank.run(fine_tune, plan, 2)
    whole = load_commit(open_storage(plan.checkpoints), 2).num_bytes
    plan = plan_case(tiny, tmp_path / "one", 2, stage=stage, **UNMEASURED)
    counts = [sum(count for name, count in read.items() if name.endswith(".safetensors"))
              for read, _ in two_ranks.run(fine_tune_watched, plan, -1)]  # fmt: skip
    # A chunk is read whole, and all of this model's tensors are smaller than one. Stage 2 cuts the list of tensors in two, stage 3 each
    # tensor.
    assert max(counts) < (0.75 if stage == "2" else 1.01) * whole and sum(counts) > 0.95 * whole


def fine_tune_audited(me: Any, plan: Plan) -> tuple[set[str], list[Event]]:
    """Job: fine_tune, and the files below the run's checkpoints that Python opened meanwhile, by its own account (sys.addaudithook)."""
    opened: set[str] = set()
    listening = True

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(args[0], str | os.PathLike):
            path = os.fspath(args[0])
            if isinstance(path, str) and path.startswith(plan.checkpoints) and not os.path.isdir(path):
                opened.add(path.rsplit("/", 1)[1])

    sys.addaudithook(hear)  # there is no way to take it away again
    try:
        return opened, fine_tune(me, plan)
    finally:
        listening = False


def test_only_safetensors_and_json_are_opened(straight: tuple[Path, list[Event]], two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    """Files that would run code if they were unpickled lie beside; nobody opens them, and the run is the unbroken one."""
    begin_again(straight[0], tmp_path)
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in (
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "random_states_0.pkl",
        "rank-00000.pt",
        "latest",
    ):
        (tmp_path / "checkpoints/step-000004" / name).write_bytes(trap)
    (tmp_path / "checkpoints/latest").write_bytes(trap)
    answers = two_ranks.run(fine_tune_audited, plan_case(tiny, tmp_path, 2, **CASE))
    assert {"rank-00000.safetensors", "rank-00001.json", "COMMIT.json"} <= answers[0][0]
    for opened, _ in answers:
        assert {name.removesuffix(".unfinished").rpartition(".")[2] for name in opened} == {"safetensors", "json"}
    assert losses(answers[0][1]) == losses(straight[1])[4:]
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists(), "the trap does not work"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def fine_tune_owning(me: Any, plan: Plan) -> list[Event]:
    """Job: fine_tune under the right to write to the checkpoints, as a run takes it."""
    from launcher.train.worker import _owned_storage

    with _owned_storage(plan, me.rank):
        return fine_tune(me, plan)


@pytest.mark.checkpoints
def test_a_second_run_on_the_same_checkpoints_is_refused_before_it_trains(one_rank: Ranks, tiny: Path, tmp_path: Path) -> None:
    plan = plan_case(tiny, tmp_path, 1, **CASE)
    with owner_process(plan.checkpoints) as pid, pytest.raises(AssertionError, match=rf"another run writes to .*process {pid} on"):
        one_rank.run(fine_tune_owning, plan)
    assert list_committed(open_storage(plan.checkpoints)) == []
    assert len(losses(one_rank.run(fine_tune_owning, plan)[0])) == 6


# --------------------------------------------------------------------------------------------------- made from something else


def test_an_adapters_checkpoint_holds_what_is_trained_and_names_the_base(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    """The base model by path, revision and hash; of its weights nothing."""
    plan = plan_case(tiny, tmp_path, 2, method="qlora4", dtype="bf16")
    two_ranks.run(fine_tune, plan, 3)
    storage = open_storage(plan.checkpoints)
    commit = load_commit(storage, 3)
    assert commit.base_model == str(tiny / "model")
    assert len(commit.identity["model.weights"]) == 32 and "model.revision" in commit.identity
    manifests = [json.loads(storage.read(f"{commit.folder}/rank-{rank:05d}.json")) for rank in range(2)]
    held = [fragment for manifest in manifests for fragment in manifest["fragments"] if fragment["kind"] != "random"]
    assert held and all(".lora_" in fragment["name"] for fragment in held)


def test_other_data_are_refused_and_let_through_by_key(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    """The same recipe, whose file of examples says something else now."""
    write_conversations(tmp_path / "train.jsonl", 60, seed=5)
    case: dict[str, Any] = {"data": {"train": str(tmp_path / "train.jsonl")}}
    two_ranks.run(fine_tune, plan_case(tiny, tmp_path, 2, **case), 3)
    write_conversations(tmp_path / "train.jsonl", 60, seed=6)
    plan = plan_case(tiny, tmp_path, 2, **case)
    with pytest.raises(
        AssertionError, match=r"another recipe, model or data set:\s+data\.content: .*then, .*now(.|\n)*--allow-changed data\.content"
    ):
        two_ranks.run(fine_tune, plan)
    events = two_ranks.run(fine_tune, dataclasses.replace(plan, allow_changed=("data.content",)))[0]
    assert len(losses(events)) == 3
    assert any("changed since the checkpoint: data.content" in event["text"] for event in events if event["event"] == "note")


def test_another_base_model_and_recipe_are_refused_with_all_differences(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    case: dict[str, Any] = {"model": {"name_or_path": str(tmp_path / "model")}}
    two_ranks.run(fine_tune, plan_case(tiny, tmp_path / "run", 2, **case), 3)
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    changed = plan_case(tiny, tmp_path / "run", 2, **case, optim={"name": "adamw", "lr": 1e-3}, seed=7)
    with pytest.raises(AssertionError) as raised:
        two_ranks.run(fine_tune, changed)
    said = str(raised.value)
    assert all(f"\n  {key}: " in said for key in ("model.weights", "optim.lr", "seed")), said
    assert "--allow-changed model.weights --allow-changed optim.lr --allow-changed seed" in said


def test_a_longer_schedule_and_another_rate_are_let_through(
    straight: tuple[Path, list[Event]], two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    begin_again(straight[0], tmp_path)
    longer = plan_case(
        tiny, tmp_path, 2, **CASE, schedule={"max_steps": 8, "warmup_steps": 2, "epochs": 30.0}, optim={"name": "adamw", "lr": 1e-3}
    )
    with pytest.raises(AssertionError, match=r"optim\.lr: 0\.003 then, 0\.001 now\s+schedule\.max_steps: 6 then, 8 now"):
        two_ranks.run(fine_tune, longer)
    events = two_ranks.run(fine_tune, dataclasses.replace(longer, allow_changed=("optim.lr", "schedule.max_steps")))[0]
    assert [event["step"] for event in events if event["event"] == "step"] == [5, 6, 7, 8]
    assert max(event["lr"] for event in events if event["event"] == "step") <= 1e-3
