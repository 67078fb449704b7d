"""Encoder-decoders for real: a tiny T5 over gloo, from pairs on disk to a merged model, and what it holds against what was planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, evaluations, fine_tune, losses
from tiny import plan_tiny, write_pair_model, write_pairs

from launcher.run import Event

FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
METHODS: dict[str, dict[str, Any]] = {"full": {"kind": "full"}, "lora": {"kind": "lora", "r": 8}, "qlora": {"kind": "qlora", "r": 8}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pair_model(folder / "model")
    write_pair_model(folder / "flan", **FLAN)
    write_pairs(folder / "train.jsonl", 200, seed=1)
    write_pairs(folder / "eval.jsonl", 20, seed=2)
    return folder


def tune(ranks: Ranks, folder: Path, run_dir: Path, model: str = "model", **sections: Any) -> list[Event]:
    data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "seq_len": 32, "target_len": 24}
    base = {"model": {"name_or_path": str(folder / model)}, "data": data}
    events: list[Event] = ranks.run(fine_tune, plan_tiny(folder, run_dir, ranks=ranks.size, **(base | sections)))[0]
    return events


@pytest.mark.parametrize("model", ["model", "flan"])
@pytest.mark.parametrize("method", METHODS)
def test_stages_agree(method: str, model: str, two_ranks: Ranks, pairs: Path, tmp_path: Path) -> None:
    """ZeRO-2 without checkpointing, and ZeRO-3 with, its layers gathered whole."""
    found = []
    for stage, checkpointing in ((2, False), (3, True)):
        sections = {"method": METHODS[method], "parallel": {"zero_stage": stage}, "memory": {"gradient_checkpointing": checkpointing}}
        events = tune(two_ranks, pairs, tmp_path / str(stage), model, **sections)
        assert evaluations(events, "after")[0] < evaluations(events, "before")[0]
        found.append(losses(events) + evaluations(events, "after"))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
