"""Packs, order and batches; and that a model sees a packed example as it sees it alone. B samples, S tokens, V words."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from launcher.errors import ModelError
from launcher.recipe import Data
from launcher.train.data import (
    Sample,
    Samples,
    _make_packs,
    check_packing,
    collate,
    global_batch,
    load_samples,
    make_epoch_order,
    open_eval_batches,
    open_steps,
)
from launcher.train.encode import IGNORED

VOCAB_SIZE = 64
PAD_ID = 1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<s>": 0, "<pad>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def load(folder: Path, lengths: list[int], **fields: Any) -> Samples:
    """Examples of a given number of words; the first half of each is prompt."""
    rng = np.random.default_rng(0)
    with (folder / "r.jsonl").open("w") as file:
        for length in lengths:
            words = [f"w{i} " for i in rng.integers(3, VOCAB_SIZE, length)]
            row = {"prompt": "".join(words[: length // 2]), "completion": "".join(words[length // 2 :])}
            file.write(json.dumps(row) + "\n")
    data = Data.model_validate({"train": "r.jsonl", "seq_len": 32} | fields)
    return load_samples(data, "train", build_tokenizer(), base_dir=str(folder), seed=0, cache_dir=folder / "cache")


# ------------------------------------------------------------------------------------------------ packs


def pack_slowly(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every pack."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda e: (-lengths[e], e)):
        fits = [(room, -index) for index, room in enumerate(rooms) if room >= lengths[example]]
        if not fits:
            packs.append([])
            rooms.append(seq_len)
        index = -min(fits)[1] if fits else len(packs) - 1
        packs[index].append(example)
        rooms[index] -= lengths[example]
    return packs


@pytest.mark.parametrize("seed", range(20))
def test_packs_are_best_fit_decreasing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(1, 60))
    lengths = rng.integers(1, seq_len + 1, int(rng.integers(1, 200)))
    members, ends = _make_packs(lengths, seq_len)
    packs = [part.tolist() for part in np.split(members, ends[:-1])]
    assert sorted(members) == list(range(len(lengths)))
    assert max(sum(int(lengths[e]) for e in pack) for pack in packs) <= seq_len
    # Packs of equal room are interchangeable, so only how full they are must agree.
    slow = pack_slowly(lengths.tolist(), seq_len)
    assert sorted(lengths[pack].sum() for pack in packs) == sorted(lengths[pack].sum() for pack in slow)


def test_many_examples_are_packed_in_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 100_000), 1, 8192).astype(np.int64)
    begin = time.process_time()
    _, ends = _make_packs(lengths, 8192)
    assert time.process_time() - begin < 10
    assert lengths.sum() / (len(ends) * 8192) > 0.99


def test_pack_holds_its_examples_apart(tmp_path: Path) -> None:
    samples = load(tmp_path, [5, 11, 7, 20, 3, 9])
    alone = load(tmp_path, [5, 11, 7, 20, 3, 9], packing=False)
    assert (len(alone), samples.num_examples) == (6, 6) and len(samples) < 6
    want = sorted((alone.sample(i).input_ids.tolist(), alone.sample(i).labels.tolist()) for i in range(6))
    found = []
    for index in range(len(samples)):
        sample = samples.sample(index)
        assert len(sample.input_ids) == samples.num_tokens[index] <= 32
        assert (sample.labels != IGNORED).sum() == samples.num_targets[index]
        starts = np.flatnonzero(sample.position_ids == 0)
        assert (sample.labels[starts] == IGNORED).all()
        for begin, end in itertools.pairwise([*starts, len(sample.input_ids)]):
            assert sample.position_ids[begin:end].tolist() == list(range(end - begin))
            found.append((sample.input_ids[begin:end].tolist(), sample.labels[begin:end].tolist()))
    assert sorted(found) == want
    assert samples.fill == pytest.approx(sum(map(len, (ids for ids, _ in want))) / (32 * len(samples)))


def test_first_token_is_no_target_even_where_all_carry_loss(tmp_path: Path) -> None:
    samples = load(tmp_path, [4, 4, 4], loss_on="all")
    sample = samples.sample(0)
    assert np.flatnonzero(sample.labels == IGNORED).tolist() == [0, 5, 10]
    assert samples.num_targets.tolist() == [12]


# ------------------------------------------------------------------------------------------------ order


def test_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(s, e): make_epoch_order(101, s, e) for s in range(3) for e in range(3)}
    assert all(sorted(order) == list(range(101)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    np.random.seed(1)
    make_epoch_order.cache_clear()
    assert all((make_epoch_order(101, s, e) == order).all() for (s, e), order in orders.items())
    # Written down, so that a resumed run keeps its order under another numpy.
    assert make_epoch_order(8, 42, 0).tolist() == GOLDEN


GOLDEN = [3, 4, 5, 0, 1, 6, 2, 7]


def walk(samples: Samples, **kwargs: Any) -> list[tuple[list[int], int]]:
    return [(batch.sample_ids.tolist(), batch.num_targets) for batch in open_steps(samples, **kwargs)]


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The samples of a micro-batch without padding; filler, which has no targets, is left out."""
    rows = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        last = torch.nonzero(labels != IGNORED)
        if len(last):
            rows.append(tuple(ids[: int(last[-1]) + 1].tolist()))
    return rows


@pytest.mark.parametrize("total_samples", [24, 30, 17, 5])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (1, 3), (2, 3), (3, 2), (4, 1), (4, 3)])
def test_every_world_sees_the_same_steps(tmp_path: Path, total_samples: int, world_size: int, micro_batch_size: int) -> None:
    samples = load(tmp_path, list(range(3, 13)), packing=False)
    by_id = [tuple(samples.sample(i).input_ids.tolist()) for i in range(len(samples))]
    shape: dict[str, Any] = {"global_batch_size": 12, "seed": 3, "total_samples": total_samples}
    shape |= {"micro_batch_size": micro_batch_size, "world_size": world_size}
    ranks = [list(open_steps(samples, **shape, rank=rank)) for rank in range(world_size)]
    alone = walk(samples, **shape | {"micro_batch_size": 4, "rank": 0, "world_size": 1})
    stream = np.concatenate([make_epoch_order(10, 3, epoch) for epoch in range(3)]).tolist()
    assert [i for ids, _ in alone for i in ids] == stream[:total_samples]  # each sample once an epoch
    for step, (ids, num_targets) in enumerate(alone):
        batches = [rank[step] for rank in ranks]
        assert all((b.sample_ids.tolist(), b.num_targets) == (ids, num_targets) for b in batches)
        assert all(len(b.micro_batches) == 12 // world_size // micro_batch_size for b in batches)
        micro_batches = [m for b in batches for m in b.micro_batches]
        assert all(m["input_ids"].shape[0] == micro_batch_size for m in micro_batches)
        assert sorted(row for m in micro_batches for row in rows_of(m)) == sorted(by_id[i] for i in ids)
        assert sum(int((m["labels"][:, 1:] != IGNORED).sum()) for m in micro_batches) == num_targets
    assert all(len(rank) == len(alone) for rank in ranks)


def test_steps_go_on_from_a_cursor_at_another_world_size(tmp_path: Path) -> None:
    samples = load(tmp_path, list(range(3, 13)), packing=False)
    shape = {"global_batch_size": 4, "seed": 0, "total_samples": 27}
    whole = walk(samples, **shape, micro_batch_size=2, rank=0, world_size=1)
    for done in range(len(whole) + 1):
        rest = walk(samples, **shape, micro_batch_size=1, rank=1, world_size=2, start=sum(len(ids) for ids, _ in whole[:done]))
        assert rest == whole[done:]
    ids = global_batch(8, num_samples=10, global_batch_size=4, total_samples=27, seed=0)
    assert ids.tolist() == [*make_epoch_order(10, 0, 0)[8:], *make_epoch_order(10, 0, 1)[:2]]


def test_a_batch_may_hold_many_epochs() -> None:
    ids = global_batch(1, num_samples=3, global_batch_size=8, total_samples=100, seed=0)
    assert ids.tolist() == np.concatenate([make_epoch_order(3, 0, e) for e in range(3)])[1:9].tolist()


def test_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    samples = load(tmp_path, [3, 4])
    with pytest.raises(ValueError, match="global_batch_size 6 is no multiple of 2 x 2 ranks"):
        next(open_steps(samples, global_batch_size=6, micro_batch_size=2, rank=0, world_size=2, seed=0, total_samples=2))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 20])
def test_evaluation_sees_each_sample_once(tmp_path: Path, world_size: int, micro_batch_size: int) -> None:
    samples = load(tmp_path, list(range(3, 14)), packing=False)
    ranks = [list(open_eval_batches(samples, micro_batch_size=micro_batch_size, rank=r, world_size=world_size)) for r in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    seen = [row for rank in ranks for batch in rank for row in rows_of(batch)]
    assert sorted(seen) == sorted(tuple(samples.sample(i).input_ids.tolist()) for i in range(len(samples)))


# ------------------------------------------------------------------------------------------------ models

SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = SIZES | {"num_key_value_heads": 2, "pad_token_id": PAD_ID}
SMALL_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
LAYERS = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, Any] = {
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 16},
    "Mistral": GROUPED | {"sliding_window": 4},
    "Phi3": GROUPED,
    "Gemma3Text": GROUPED | {"head_dim": 16, "sliding_window": 4, "layer_types": LAYERS},
    "GPTNeoX": SIZES,
    "GPT2": SMALL_GPT2,
}
LEAKING: dict[str, Any] = {
    "OPT": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Falcon": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
    "GptOss": GROUPED | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
}


def build_model(name: str, attn_implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(ARCHITECTURES | LEAKING)[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


def make_sample(rng: np.random.Generator, lengths: list[int]) -> Sample:
    ids = rng.integers(3, VOCAB_SIZE, sum(lengths))
    position_ids = np.concatenate([np.arange(n) for n in lengths])
    return Sample(ids, np.where(position_ids == 0, IGNORED, ids), position_ids)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_packed_logits_are_those_of_each_example_alone(name: str, attn_implementation: str, flat: bool) -> None:
    model = build_model(name, attn_implementation)
    rng = np.random.default_rng(0)
    samples = [make_sample(rng, [7, 12, 1, 9]), make_sample(rng, [5, 6])]
    with torch.no_grad():
        logits_BSV = model(**without_labels(collate(samples, PAD_ID, flat=flat)), use_cache=False).logits
        rows = logits_BSV[0].split([29, 11]) if flat else [logits_BSV[0], logits_BSV[1, :11]]
        for sample, row_SV in zip(samples, rows, strict=True):
            starts = np.flatnonzero(sample.position_ids == 0)
            for begin, end in itertools.pairwise([*starts, len(sample.input_ids)]):
                alone_SV = model(input_ids=torch.from_numpy(sample.input_ids[None, begin:end]), use_cache=False).logits[0]
                assert (row_SV[begin:end] - alone_SV).abs().max() < 1e-5


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def sum_loss(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_check_packing_passes(name: str) -> None:
    model = build_model(name).train()
    check_packing(model)
    assert model.training


@pytest.mark.parametrize("name", list(LEAKING))
def test_check_packing_refuses(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name.upper() if name == 'OPT' else name}ForCausalLM lets .*\n.*data.packing"):
        check_packing(build_model(name, "eager"))


def test_gpt_oss_sees_an_example_alone_once_packing_is_off() -> None:
    """Packed it sees the one before, which is why `auto` does not pack it; padded behind the example it sees nothing but it."""
    model = build_model("GptOss", "eager")
    rng = np.random.default_rng(0)
    first, second = make_sample(rng, [7]), make_sample(rng, [5])
    packed = Sample(*(np.concatenate(pair) for pair in zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True)))

    def logits_of(*samples: Sample) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(**without_labels(collate(samples, PAD_ID)), use_cache=False).logits
        return logits

    alone = logits_of(second)[0]
    assert (logits_of(packed)[0, 7:] - alone).abs().max() > 1e-2
    assert (logits_of(first, second)[1, :5] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_loss_reaches_only_its_own_example(name: str) -> None:
    """The loss of the second example moves no embedding of a word that only the first, the third or the padding has."""
    model = build_model(name)
    words = [np.arange(10, 17), np.arange(20, 29), np.arange(30, 35)]
    ids = np.concatenate(words)
    labels = np.where((ids > 20) & (ids < 29), ids, IGNORED)
    sample = Sample(ids, labels, np.concatenate([np.arange(len(w)) for w in words]))
    batch = collate([sample, make_sample(np.random.default_rng(0), [24])], PAD_ID)
    batch["labels"][1] = IGNORED
    embeds_BSD = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits_BSV = model(inputs_embeds=embeds_BSD, position_ids=batch["position_ids"], use_cache=False).logits
    logits_BSV.retain_grad()
    torch.autograd.backward(sum_loss(logits_BSV, batch["labels"]))
    moved = embeds_BSD.grad.abs().sum(-1) > 0
    assert torch.nonzero(moved).tolist() == [[0, i] for i in range(7, 15)]  # the last word predicts nothing
    assert torch.nonzero(logits_BSV.grad.abs().sum(-1) > 0).tolist() == [[0, i] for i in range(7, 15)]


def test_collate_pads_with_a_sequence_of_its_own() -> None:
    rng = np.random.default_rng(0)
    long, short = make_sample(rng, [3, 2]), make_sample(rng, [2])
    batch = collate([long, short], PAD_ID)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["input_ids"].tolist() == [long.input_ids.tolist(), [*short.input_ids.tolist(), PAD_ID, PAD_ID, PAD_ID]]
    assert batch["labels"].tolist() == [long.labels.tolist(), [*short.labels.tolist(), IGNORED, IGNORED, IGNORED]]
    flat = collate([long, short], PAD_ID, flat=True)
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert flat["labels"].tolist() == [[*long.labels, *short.labels]]
    assert {tensor.dtype for tensor in (*batch.values(), *flat.values())} == {torch.int64}


def test_packed_and_unpacked_training_losses_agree(tmp_path: Path) -> None:
    """Summed over its targets, the loss of an epoch is the same packed and not."""
    model = build_model("Llama")
    losses = []
    for packing in (True, False):
        samples = load(tmp_path, [5, 11, 7, 20, 3, 9, 14], packing=packing)
        total = 0.0
        for step in open_steps(samples, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1, seed=0, total_samples=len(samples)):
            for batch in step.micro_batches:
                with torch.no_grad():
                    logits_BSV = model(**without_labels(batch), use_cache=False).logits
                total += float(sum_loss(logits_BSV, batch["labels"]))
        losses.append(total / int(samples.num_targets.sum()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_check_packing_passes_in_8_bits(tmp_path: Path) -> None:
    """LLM.int8() picks columns of outliers over all rows; activations here are large enough to have some."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                                        num_key_value_heads=4, vocab_size=64))  # fmt: skip
    with torch.no_grad():
        made.model.embed_tokens.weight.mul_(8)
        for name, parameter in made.named_parameters():
            parameter.mul_(4 if "layernorm" in name else 1)
    made.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}, dtype=torch.bfloat16
    ).train()
    from peft import LoraConfig, get_peft_model

    check_packing(
        get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    )  # peft's layer has the same name
    assert {layer.state.threshold for layer in model.modules() if type(layer) is bnb.nn.Linear8bitLt} == {6.0}
