"""Pairs of a source and a target: from rows to the tensors of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_trainable import notes_of, plan_of, recipe_of
from tiny import CHATML, build_tokenizer

from launcher.errors import DataError, RecipeError
from launcher.recipe import Data
from launcher.train.data import Samples, load_samples, open_steps
from launcher.train.encode import IGNORED

PAD, END = 0, 2
T5 = "google-t5/t5-small"


def load(folder: Path, rows: list[dict[str, Any]], **data: Any) -> Samples:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", END)])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Data.model_validate_json(json.dumps({"train": "rows.jsonl", "seq_len": 32, "packing": False} | data))
    return load_samples(recipe, "train", tokenizer, base_dir=str(folder), seed=0, cache_dir=folder / "cache", start_id=PAD)


def micro_batch(samples: Samples, rows: int) -> dict[str, Any]:
    steps = open_steps(samples, global_batch_size=rows, micro_batch_size=rows, rank=0, world_size=1, seed=0, total_samples=rows)
    return {name: tensor.tolist() for name, tensor in next(steps).micro_batches[0].items()}


def words(text: str) -> list[int]:
    ids: list[int] = build_tokenizer(None)(text)["input_ids"]
    return ids


ROWS = [{"prompt": "red sea", "completion": "sea"}, {"prompt": "lamp", "completion": "lamp red"}]


def test_each_side_is_a_text_of_its_own(tmp_path: Path) -> None:
    samples = load(tmp_path, ROWS[:1])
    assert micro_batch(samples, 1) == {
        "input_ids": [[*words("red sea"), END]],
        "decoder_input_ids": [[PAD, *words("sea")]],
        "labels": [[*words("sea"), END]],
    }, "nothing is padded, so that there is no mask"
    assert samples.stats()["target_tokens"] == len(words("sea")) + 1, "the first is predicted too"


def test_rows_are_padded_to_the_longest_on_each_side(tmp_path: Path) -> None:
    samples = load(tmp_path, ROWS)
    batch = micro_batch(samples, 2)
    lengths = sorted(sum(row) for row in batch["attention_mask"])
    assert lengths == sorted(len(words(row["prompt"])) + 1 for row in ROWS)
    assert sum(label != IGNORED for row in batch["labels"] for label in row) == int(samples.num_targets.sum())
    assert all(row[0] == PAD for row in batch["decoder_input_ids"])


def test_a_last_short_batch_is_filled_without_targets(tmp_path: Path) -> None:
    steps = open_steps(load(tmp_path, ROWS), global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, seed=0, total_samples=2)
    batch = next(steps).micro_batches[0]
    assert [bool((row != IGNORED).any()) for row in batch["labels"]] == [True, True, False, False]
    assert batch["attention_mask"].sum(dim=1).min() == 1, "a row that sees nothing would be no number"


@pytest.mark.parametrize(
    "row",
    [{"instruction": "red", "input": "sea", "output": "lamp"}, {"messages": [{"role": "user", "content": "red\n\nsea"}, {"role": "assistant", "content": "lamp"}]},
     {"system": "red", "prompt": "sea", "completion": "lamp"}],
    ids=str,
)  # fmt: skip
def test_every_format_of_question_and_answer(row: dict[str, Any], tmp_path: Path) -> None:
    batch = micro_batch(load(tmp_path, [row]), 1)
    assert batch["input_ids"] == [[*words("red\n\nsea"), END]] and batch["labels"] == [[*words("lamp"), END]]


def test_a_template_writes_the_source(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "sea"}, {"role": "user", "content": "lamp"}]
    sample = load(tmp_path, [{"messages": [*turns, {"role": "assistant", "content": "oil"}]}], chat_template=CHATML, seq_len=64).sample(0)
    source = build_tokenizer(None).decode(sample.input_ids[sample.labels == IGNORED].tolist())
    assert source.count("<|im_start|>") == 4 and "sea" in source and "oil" not in source


def test_long_sources_and_targets_are_cut_each_by_itself(tmp_path: Path) -> None:
    row = {"prompt": "red sea lamp oil", "completion": "oil lamp sea red"}
    sample = load(tmp_path, [row], seq_len=3, target_len=2, too_long="truncate").sample(0)
    source, target = sample.input_ids[sample.labels == IGNORED].tolist(), sample.input_ids[sample.labels != IGNORED].tolist()
    assert source == [*words("red sea lamp oil")[:2], END], "what ends a source stays"
    assert target == words("oil lamp sea red")[:2], "and a target that is cut does not end"
    with pytest.raises(
        DataError, match=r"a source of 7 tokens, .*has a target of 6, the most\n.*data.seq_len to 7 and data.target_len to 6"
    ):
        load(tmp_path, [row], seq_len=3, target_len=2)
    samples = load(tmp_path, [row, *ROWS], seq_len=6, target_len=5, too_long="drop")
    assert len(samples) == 2 and samples.num_dropped == 1


def test_what_is_no_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is one text, and an encoder-decoder learns to write a target for a source"):
        load(tmp_path, [{"text": "red"}])
    turn = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "sea"}]
    with pytest.raises(DataError, match="has several answers, and there is no chat template"):
        load(tmp_path, [{"messages": turn * 2}])


@pytest.mark.parametrize(
    ("model", "data", "key"),
    [(T5, {"packing": True}, "packing"), (T5, {"loss_on": "all"}, "loss_on"), (T5, {"train": {"path": "t.jsonl", "format": "text"}}, "train"),
     ("HuggingFaceTB/SmolLM2-135M", {"target_len": 8}, "target_len")],
)  # fmt: skip
def test_what_does_not_go_with_the_model_is_told_from_the_recipe(model: str, data: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=rf"data\.{key}"):
        plan_of(model, data={"train": "t.jsonl", "seq_len": 64} | data)


def test_no_t5_is_put_into_fp16_unasked() -> None:
    from launcher.plan.devices import find_device, make_cluster
    from launcher.plan.plan import make_plan

    t4 = make_cluster(find_device("t4"), nodes=1, gpus_per_node=1)
    plan = make_plan(recipe_of(T5), t4, base_dir=".", run_dir="/runs/p")
    assert plan.layout.dtype == "fp32" and "may overflow in fp16" in notes_of(plan)
    asked = make_plan(recipe_of(T5, model={"name_or_path": T5, "dtype": "fp16"}), t4, base_dir=".", run_dir="/runs/p")
    assert asked.layout.dtype == "fp16" and "fp32 is safe" in notes_of(asked)


def test_what_a_recipe_leaves_out_is_said() -> None:
    notes = notes_of(plan_of(T5, data={"train": "t.jsonl", "seq_len": 1024}))
    assert "targets: as long as sources, 1024 tokens, because data.target_len is not set" in notes
    assert "was trained with 512 tokens" in notes and "packing: off" in notes
    told = plan_of(T5, data={"train": "t.jsonl", "seq_len": 512, "target_len": 64})
    assert "targets:" not in notes_of(told) and "would not start" not in notes_of(told)
