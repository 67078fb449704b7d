"""The training side on real parts: a tiny Llama, DeepSpeed over gloo, PEFT and bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, evaluations, fine_tune, losses
from tiny import plan_tiny

from launcher.run import Event

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "r": 8},
    "qlora": {"kind": "qlora", "r": 8},
}
STAGES: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3, "leaf_modules": False},
    "3-leaf": {"zero_stage": 3, "leaf_modules": True},
}


def tune(ranks: Ranks, tiny: Path, run_dir: Path, **sections: Any) -> list[Event]:
    events: list[Event] = ranks.run(fine_tune, plan_tiny(tiny, run_dir, ranks=ranks.size, **sections))[0]
    return events


@pytest.fixture(scope="module")
def reference(two_ranks: Ranks, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """A method's losses under ZeRO-2 without checkpointing: five steps, accumulation 2, clipped."""
    found = {}
    for name, method in METHODS.items():
        plan_sections = {"method": method, "memory": {"gradient_checkpointing": False}}
        events = tune(two_ranks, tiny, tmp_path_factory.mktemp(name), **plan_sections)
        found[name] = losses(events) + evaluations(events, "after")
        assert len(found[name]) == 6
        assert any(event["grad_norm"] > 0.5 for event in events if event["event"] == "step"), "nothing was clipped"
        assert evaluations(events, "after")[0] < evaluations(events, "before")[0]
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", METHODS)
def test_stages_agree(
    method: str, stage: str, checkpointing: bool, two_ranks: Ranks, tiny: Path, tmp_path: Path, reference: dict[str, list[float]]
) -> None:
    events = tune(
        two_ranks, tiny, tmp_path, method=METHODS[method], parallel=STAGES[stage], memory={"gradient_checkpointing": checkpointing}
    )
    assert losses(events) + evaluations(events, "after") == pytest.approx(reference[method], abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_with_more_accumulation_is_the_same_run(
    method: str, one_rank: Ranks, tiny: Path, tmp_path: Path, reference: dict[str, list[float]]
) -> None:
    events = tune(one_rank, tiny, tmp_path, method=METHODS[method], memory={"gradient_checkpointing": False})
    assert losses(events) + evaluations(events, "after") == pytest.approx(reference[method], abs=1e-5)


def test_gradient_norm_is_known_in_every_stage(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    norms = {}
    for name, stage in STAGES.items():
        events = tune(two_ranks, tiny, tmp_path / name, parallel=stage)
        norms[name] = [event["grad_norm"] for event in events if event["event"] == "step"]
    for name, found in norms.items():
        assert found == pytest.approx(norms["2"], rel=1e-3), name
