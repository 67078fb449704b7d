"""lepton-launch checkpoints, and what the same command does the second time. Checkpoints are real; runs are not started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_files import commit_of, pieces_of, save
from test_cli import invoke, jobs, recipe  # noqa: F401  fixtures

from launcher.checkpoint.commit import step_folder, wait_for_manifests, write_commit
from launcher.checkpoint.identity import make_identity
from launcher.checkpoint.shard import write_shard
from launcher.checkpoint.storage import open_storage
from launcher.plan import Plan, load_plan
from launcher.run import RunFolder, hold_run, write_status


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (3, 6, 9):
        save(open_storage(str(tmp_path / "run/checkpoints")), step)
    return tmp_path / "run"


def answer(*args: object) -> Any:
    result = invoke("checkpoints", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_list_verify_inspect(run: Path) -> None:
    rows = answer(run)["steps"]
    assert [(row["step"], row["condition"], row["world_size"], row["verified"]) for row in rows] == [
        (s, "committed", 2, None) for s in (3, 6, 9)
    ]
    assert all(row["verified"] for row in answer(run, "list", "--verify")["steps"])
    assert [row["verified"] for row in answer("verify", run)["steps"]] == [True, True, True]
    facts = answer(run, "inspect", "--step", 6)
    assert facts["step"] == 6 and facts["kinds"]["master"]["elements"] == 301 + 37 + 3
    told = invoke("checkpoints", run).output
    assert "committed" in told and str(run) in told


def test_damage_is_told_with_exit_code_9(run: Path) -> None:
    shard = run / "checkpoints/step-000006/rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    result = invoke("checkpoints", run, "verify")
    assert result.exit_code == 9
    assert "step 6: DAMAGED" in result.output and "rank-00001.safetensors was changed" in result.output and "step 9: whole" in result.output
    assert [row["verified"] for row in answer(run, "list", "--verify")["steps"]] == [True, False, True]


def test_prune(run: Path) -> None:
    assert answer(run, "prune", "--keep", 2, "--dry-run")["deleted"] == [3]
    assert answer(run, "prune", "--keep", 2)["deleted"] == [3]
    assert [row["step"] for row in answer(run)["steps"]] == [6, 9]


def test_what_is_not_there_is_named(run: Path) -> None:
    result = invoke("checkpoints", run, "inspect", "--step", 7)
    assert result.exit_code == 9 and "there are those of step 3, 6, 9" in result.output


# ------------------------------------------------------------------------------------------------- the second time


def leave_checkpoint(plan: Plan, step: int = 3) -> None:
    storage = open_storage(plan.checkpoints)
    for rank in range(2):
        write_shard(storage, step_folder(step), rank, "a", pieces_of(rank, 2, step))
    records = wait_for_manifests(storage, step, 2, "a", lambda: False)
    assert records is not None
    write_commit(storage, commit_of(step, 2, "a", shards=records, identity=make_identity(plan.recipe, dtype=plan.layout.dtype)))


def test_an_unfinished_run_goes_on_and_a_finished_one_does_not(recipe: Path, jobs: list[Plan], tmp_path: Path) -> None:  # noqa: F811
    assert invoke(recipe).exit_code == 0
    leave_checkpoint(jobs[0])
    told = invoke(recipe, "--dry-run").output
    assert "tiny is finished: this is a new run, tiny-2" in told
    folder = RunFolder(tmp_path / "runs/tiny")
    write_status(folder, "stopped")
    told = invoke(recipe, "--dry-run").output
    assert "tiny is stopped; its newest checkpoint is of step 3 of 12" in told
    changed = invoke(recipe, "optim.lr=0.5")
    assert changed.exit_code == 9 and "optim.lr: 0.0001 then, 0.5 now" in changed.output and "--allow-changed optim.lr" in changed.output
    assert len(jobs) == 1
    (folder.path / "model").rmdir()
    assert invoke(recipe, "optim.lr=0.5", "--allow-changed", "optim.lr").exit_code == 0
    assert (jobs[1].run_dir, jobs[1].allow_changed) == (str(folder.path), ("optim.lr",))
    write_status(folder, "stopped")
    assert invoke(recipe, "--fresh").exit_code == 0
    assert jobs[2].run_dir.endswith("runs/tiny-2")


def test_resume_names_a_checkpoint_for_a_new_run(recipe: Path, jobs: list[Plan], tmp_path: Path) -> None:  # noqa: F811
    assert invoke(recipe).exit_code == 0
    leave_checkpoint(jobs[0])
    assert invoke(recipe, "--resume", tmp_path / "runs/tiny").exit_code == 0
    plan = load_plan(tmp_path / "runs/tiny-2/plan.json")
    assert plan.resume == str(tmp_path / "runs/tiny/checkpoints/step-000003")
    refused = invoke(recipe, "--resume", tmp_path / "runs/tiny/checkpoints/step-000009")
    assert refused.exit_code == 9 and "is no committed checkpoint" in refused.output


def test_a_run_at_work_is_not_started_twice(recipe: Path, jobs: list[Plan], tmp_path: Path) -> None:  # noqa: F811
    assert invoke(recipe).exit_code == 0
    with hold_run(RunFolder(tmp_path / "runs/tiny")):
        result = invoke(recipe)
        assert result.exit_code == 9 and "is at work" in result.output and "--fresh" in result.output
        assert invoke(recipe, "--fresh").exit_code == 0
