"""The plan's arithmetic against a trace, to the byte, of models and batches that are drawn at random: what no list of cases has thought of."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from test_referee import (
    ATTENTION,
    DORA,
    DROPPED,
    EXPERTS,
    FREEZE,
    FULL,
    HAS_QUERIES,
    KINDS,
    LORA,
    NORMS,
    WITHOUT_SDPA,
    WORDS,
    adapt,
    assert_equal,
    trace_evaluation,
    workload,
)

from launcher.plan.losses import changes_logits
from launcher.plan.step import run_step
from launcher.plan.workload import Workload

HAS_WINDOW = {"mistral", "phi3", "mixtral", "gpt_oss", "gemma2", "gemma3_text"}
HAS_HEAD_DIM = {"llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "qwen3_moe", "mixtral"}


def draw_model(rng: random.Random, kind: str) -> dict[str, Any]:
    """Sizes: heads in groups of one to four, one head for all, a wide or a narrow MLP, few words or many."""
    heads, kv_heads = rng.choice([(4, 2), (4, 4), (4, 1), (8, 2), (6, 3), (2, 1)])
    sizes: dict[str, Any] = {
        "hidden_size": rng.choice([8, 16, 24]) * heads, "intermediate_size": rng.choice([56, 96, 200, 256]), "num_attention_heads": heads,
        "num_key_value_heads": heads if kind.startswith("deepseek") else kv_heads, "vocab_size": rng.choice([24, 131, 160, 1000]),
    }  # fmt: skip
    if kind in HAS_HEAD_DIM and rng.random() < 0.3:
        sizes["head_dim"] = rng.choice([8, 16, 24, 32])
    if kind in HAS_WINDOW and rng.random() < 0.5:
        sizes["sliding_window"] = rng.choice([16, 64, 300])
    if rng.random() < 0.2 and kind != "phi":  # no Phi is tied: its head's bias would be left out
        sizes["tie_word_embeddings"] = rng.choice([True, False])
    return sizes


def draw_batch(rng: random.Random) -> dict[str, Any]:
    """Also one row alone, and lengths that no kernel's tile divides."""
    seq_len = rng.choice([17, 33, 64, 96, 100, 255])
    columns = rng.choice([seq_len - 1, seq_len - 1, seq_len // 2, 1])
    return {"seq_len": seq_len, "micro_batch_size": rng.choice([1, 2, 3, 5]), "loss_columns": columns, "packed": rng.random() < 0.4}


def draw_facts(rng: random.Random, kind: str) -> dict[str, Any]:
    methods = [FULL, LORA, DROPPED, FREEZE, replace(LORA, r=7), DORA, NORMS, WORDS] + ([ATTENTION] if kind in HAS_QUERIES else [])
    attention = "eager" if kind in WITHOUT_SDPA else rng.choice(["sdpa", "sdpa", "eager"])
    return {
        "method": adapt(kind, rng.choice(methods)), "width": 2 if kind in EXPERTS else rng.choice([2, 2, 4]), "attention": attention,
        "checkpointing": rng.choice(["on", "off"]), "device": rng.choice(["cuda", "cuda", "cpu"]), "loss": rng.choice(["plain", "plain", "chunked"]),
    }  # fmt: skip


def draw_workloads(seed: int, draws: int) -> Iterator[tuple[Workload, dict[str, Any]]]:
    """With what was changed of its configuration. Not what the plan refuses, and not what torch leaves to its plain kernel."""
    rng = random.Random(seed)
    for _ in range(draws):
        kind = rng.choice(KINDS)
        changes, facts = draw_model(rng, kind), draw_facts(rng, kind) | draw_batch(rng)
        falls_back = facts["attention"] == "sdpa" and not facts["packed"] and facts["width"] == 4 and facts["device"] == "cuda"
        work = workload(kind, rng.choice([1, 2, 3, 4]), changes=changes, **facts)
        if not falls_back and not (facts["loss"] == "chunked" and changes_logits(work.shape.config)):
            yield work, changes


def compare_drawn(seed: int, draws: int) -> int:
    compared = 0
    for work, changes in draw_workloads(seed, draws):
        assert_equal(work.shape.model_type, work, layers=work.shape.num_layers, keep=compared % 2 == 0, changes=changes)
        compared += 1
    return compared


@pytest.mark.parametrize("seed", range(50, 53))
def test_an_evaluation_that_is_drawn_at_random(seed: int) -> None:
    for work, changes in draw_workloads(seed, 50):
        tape = run_step(work, keep_gradients=False, train=False, round_to=512)
        assert max(peak for peak, _ in tape.peaks.values()) == trace_evaluation(work), (changes, work)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_at_random(seed: int) -> None:
    assert compare_drawn(seed, 40) >= 25


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 120))
def test_much_that_is_drawn_at_random(seed: int) -> None:
    assert compare_drawn(seed, 200) >= 120
