"""The environment's settings of torch's allocator: honoured or named by the plan, and the same in every worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from plans import A100, CPU, plan_of

from launcher.job.worker import Place, Worker
from launcher.plan import Plan, load_plan
from launcher.plan.allocator_settings import (
    VARIABLES,
    describe_settings,
    has_expandable_segments,
    parse_settings,
    put_settings,
    read_settings,
)

GROWING = "expandable_segments:True"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_first_that_torch_reads() -> None:
    assert read_settings({}) == ""
    assert read_settings({"PYTORCH_CUDA_ALLOC_CONF": GROWING}) == GROWING
    assert read_settings({"PYTORCH_CUDA_ALLOC_CONF": GROWING, "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}) == "max_split_size_mb:64"


def test_values_and_lists_of_them() -> None:
    settings = "expandable_segments: True, roundup_power2_divisions:[256:1,512:2,>:4],garbage_collection_threshold:0.8"
    assert parse_settings(settings) == {
        "expandable_segments": "True", "roundup_power2_divisions": "[256:1,512:2,>:4]", "garbage_collection_threshold": "0.8",
    }  # fmt: skip
    assert has_expandable_segments(settings) and not has_expandable_segments("expandable_segments:False")


@pytest.mark.parametrize("name", ["max_split_size_mb:64", "garbage_collection_threshold:0.8", "roundup_power2_divisions:[256:1,>:4]",
                                  "backend:cudaMallocAsync"])  # fmt: skip
def test_what_is_not_modelled_is_named(name: str) -> None:
    (note,) = describe_settings(f"{GROWING},{name}")
    assert note.endswith(f"not modelled, so that the reserved figure is as without: {name}")
    assert "not modelled" not in describe_settings(f"{GROWING},backend:native")[0]


def plan_with(model: Path, settings: str, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    sections = {"data": {"train": "t.jsonl", "seq_len": 512, "packing": False}, "batch": {"micro_batch_size": 16, "global_batch_size": 64}}
    return plan_of(model, A100, **sections, memory={"gradient_checkpointing": False})


def test_a_plan_reserves_as_its_shell_says(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, growing = (plan_with(model, settings, monkeypatch) for settings in ("", GROWING))
    assert native.memory.device("allocated") == growing.memory.device("allocated")
    assert growing.memory.device("reserved") != native.memory.device("reserved")
    assert any(note.startswith(f"allocator: {GROWING}") for note in growing.notes) and not any(
        "allocator:" in note for note in native.notes
    )
    assert native.digest == growing.digest, "where memory lies is no part of what is trained: a checkpoint goes on with either"
    growing.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").allocator == GROWING


def test_a_cpu_has_no_such_allocator(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", GROWING)
    plan = plan_of(model, CPU)
    assert plan.allocator == "" and not any("allocator:" in note for note in plan.notes)


def test_a_worker_has_the_plans_settings_and_says_what_it_left_out(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Worker, "locate", lambda self: Place("", "", "127.0.0.1", 0, None))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for planned, here in ((GROWING, "max_split_size_mb:64"), ("", GROWING)):
        for name in VARIABLES:
            os.environ.pop(name, None)
        plan = plan_with(model, planned, monkeypatch)
        os.environ |= {"PYTORCH_ALLOC_CONF": here, "PYTORCH_HIP_ALLOC_CONF": here}
        Worker(0, {})._set_environment(plan, ("127.0.0.1", 1))
        assert read_settings(os.environ) == planned and "PYTORCH_HIP_ALLOC_CONF" not in os.environ
        assert f"({here}) is left out: the run is planned with {planned or 'none'}" in capfd.readouterr().out


def test_the_same_settings_are_put_without_a_word() -> None:
    environment = {"PYTORCH_CUDA_ALLOC_CONF": GROWING}
    assert put_settings(GROWING, environment) == ""
    assert environment == {"PYTORCH_ALLOC_CONF": GROWING, "PYTORCH_CUDA_ALLOC_CONF": GROWING}
