"""Encoder-decoders in the plan: their arithmetic against a trace, to the byte, and what a dry run says of them."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers
from test_referee import DROPPED, FREEZE, FULL, LORA, OnHost, trace_evaluation

from launcher.plan.shape import ModelShape, shape_of_config
from launcher.plan.step import run_step
from launcher.plan.workload import MethodFacts, Workload
from launcher.train import profiling
from launcher.train.profiling import trace_layers
from launcher.train.trace import _Kernels

SIZES: dict[str, Any] = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16, "vocab_size": 160}
OLD: dict[str, Any] = {}
NEW = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
"""T5 1.0, and 1.1 with Flan's: a gated MLP, a head of its own."""
WIDE = {"d_ff": 256, "vocab_size": 24}
"""Few words and a wide MLP, so that the peak lies in a layer and not in the loss."""
ATTENTION = MethodFacts(trains="adapters", r=4, target_modules=("q", "v"))


def shape_of(kind: str = "t5", **changes: Any) -> ModelShape:
    config = transformers.CONFIG_MAPPING[kind](**(SIZES | changes)).to_dict()
    told = {name: changes[name] for name in ("tie_word_embeddings",) if name in changes}  # its class says that heads are always tied
    return shape_of_config(json.loads(json.dumps(config | told)), Path("config.json"))


def workload(kind: str = "t5", changes: dict[str, Any] | None = None, **facts: Any) -> Workload:
    base: dict[str, Any] = {
        "method": FULL, "width": 2, "device": "cuda", "attention": "sdpa", "loss": "plain", "checkpointing": "on", "micro_batch_size": 2,
        "seq_len": 96, "target_len": 48, "loss_columns": 48, "packed": False, "kernel_workspace": False,
    }  # fmt: skip
    return Workload(shape=shape_of(kind, **(changes or {})), **base | facts)


def assert_equal(work: Workload, *, keep: bool = True, layers: int | None = None) -> None:
    layers = layers or max(work.shape.num_layers, work.shape.total_layers - work.shape.num_layers)
    traced = trace_layers(work, layers, keep_gradients=keep)
    tape = run_step(work, layers, keep_gradients=keep, accumulates_in_place=False, round_to=512)
    peaks = {phase: peak for phase, (peak, _) in tape.peaks.items()}
    found = {
        "forward": max(peaks["forward"], peaks["loss"]),
        "backward": max(peaks.get(name, 0) for name in ("loss backward", "early backward", "backward")),
    }
    assert found == {phase: traced.peaks[phase] for phase in found}


@pytest.mark.parametrize("loss", ["plain", "chunked"])
@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("method", [FULL, LORA, FREEZE], ids=["full", "lora", "freeze"])
@pytest.mark.parametrize(("kind", "changes"), [("t5", OLD), ("t5", NEW | WIDE), ("mt5", WIDE)], ids=["t5", "flan", "mt5"])
def test_formula_equals_trace(kind: str, changes: dict[str, Any], method: MethodFacts, checkpointing: Any, loss: Any) -> None:
    assert_equal(workload(kind, changes, method=method, checkpointing=checkpointing, loss=loss))


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize(
    "facts",
    [{"packed": True}, {"attention": "eager"}, {"attention": "eager", "packed": True}, {"width": 4}, {"device": "cpu", "width": 4},
     {"device": "cpu", "packed": True, "method": LORA}, {"device": "cpu", "attention": "eager", "packed": True}, {"method": DROPPED},
     {"method": ATTENTION}, {"method": replace(LORA, dora=True)}, {"micro_batch_size": 1}, {"seq_len": 90, "target_len": 41, "loss_columns": 41},
     {"seq_len": 32, "target_len": 64, "loss_columns": 64}, {"micro_batch_size": 7, "loss": "chunked"}],
    ids=str,
)  # fmt: skip
def test_kernels_masks_methods_and_lengths(facts: dict[str, Any], checkpointing: Any) -> None:
    assert_equal(workload("t5", WIDE, **{"checkpointing": checkpointing} | facts))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 1}, {"num_layers": 3, "num_decoder_layers": 3}, {"num_layers": 3, "num_decoder_layers": 1}, {"num_decoder_layers": 4},
     {"dropout_rate": 0.0}, {"feed_forward_proj": "gated-silu"}, {"feed_forward_proj": "gelu"}, {"d_kv": 24}],
    ids=str,
)  # fmt: skip
def test_what_a_configuration_turns_on(changes: dict[str, Any], keep: bool) -> None:
    """Also a decoder less deep than the encoder, or deeper; a head's width that is not the hidden width over the heads."""
    for checkpointing, method in (("on", FULL), ("off", LORA)):
        assert_equal(workload("t5", changes, checkpointing=checkpointing, method=method), keep=keep)


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
def test_checkpoints_on_the_host(method: MethodFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a layer is handed goes there: its hidden state, the encoder's, masks and biases."""

    def offloading(model: Any, device: Any) -> None:
        kept = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _Kernels(device))}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kept, offload=True)

    monkeypatch.setattr(profiling, "checkpoint_as_on", offloading)
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", OnHost)
    for packed in (False, True):
        assert_equal(workload("t5", WIDE, method=method, checkpointing="offload", packed=packed))


def draw(rng: random.Random) -> tuple[Workload, bool]:
    """A T5 and its batch, drawn at random; also lengths that no kernel's tile divides (of one row alone its bias' gradient is then bounded only).
    Whether gradients stay is drawn too. Never one head, as no T5 has: what lies as it should is not copied then, and 0.3 % too much is told."""
    sizes: dict[str, Any] = {
        "num_heads": rng.choice([2, 2, 4, 6]), "d_kv": rng.choice([8, 16, 24]), "d_model": rng.choice([32, 64, 96]), "d_ff": rng.choice([56, 96, 256]),
        "vocab_size": rng.choice([24, 131, 1000]), "num_layers": rng.choice([1, 2, 3]), "num_decoder_layers": rng.choice([1, 2, 2, 3]),
        "dropout_rate": rng.choice([0.0, 0.1]), "feed_forward_proj": rng.choice(["relu", "gated-gelu", "gated-silu"]),
        "tie_word_embeddings": rng.choice([True, False]),
    }  # fmt: skip
    rows = rng.choice([1, 2, 3, 7])
    source, target = (
        rng.choice(lengths) for lengths in (([16, 64, 256], [16, 48, 112]) if rows == 1 else ([2, 17, 64, 100, 255], [2, 9, 33, 48, 100]))
    )
    facts = {
        "method": rng.choice([FULL, LORA, DROPPED, FREEZE, ATTENTION, replace(LORA, dora=True)]), "width": rng.choice([2, 2, 4]),
        "attention": rng.choice(["sdpa", "sdpa", "eager"]), "checkpointing": rng.choice(["on", "off"]), "device": rng.choice(["cuda", "cuda", "cpu"]),
        "loss": rng.choice(["plain", "plain", "chunked"]), "packed": rng.random() < 0.5, "micro_batch_size": rows,
        "seq_len": source, "target_len": target, "loss_columns": target,
    }  # fmt: skip
    return workload(rng.choice(["t5", "mt5"]), sizes, **facts), rng.random() < 0.5


@pytest.mark.parametrize("seed", range(2))
def test_what_is_drawn_at_random(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        work, keep = draw(rng)
        assert_equal(work, keep=keep)


@pytest.mark.parametrize("seed", range(50, 52))
def test_an_evaluation_that_is_drawn_at_random(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        work, _ = draw(rng)
        if seed == 51:  # as the prompt of an answer is read: one row, and the token that begins the answer
            work = replace(work, micro_batch_size=1, packed=False, target_len=1, loss_columns=1)
        tape = run_step(work, keep_gradients=False, train=False, round_to=512)
        assert max(peak for peak, _ in tape.peaks.values()) == trace_evaluation(work), work


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_much_that_is_drawn_at_random(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        work, keep = draw(rng)
        assert_equal(work, keep=keep)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("t5", OLD), ("t5", NEW), ("t5", WIDE), ("t5", NEW | WIDE), ("mt5", WIDE)],
    ids=["t5", "flan", "t5-wide", "flan-wide", "mt5"],
)
def test_every_combination(kind: str, changes: dict[str, Any]) -> None:
    """Method × checkpointing × loss × attention × padding × precision × device × gradients."""
    compared = 0
    for method, checkpointing, loss, attention, packed, width, device, keep in product(
        (FULL, LORA, DROPPED, ATTENTION, FREEZE), ("on", "off"), ("plain", "chunked"), ("sdpa", "eager"), (False, True), (2, 4), ("cuda", "cpu"),
        (True, False),
    ):  # fmt: skip
        facts = {
            "method": method,
            "checkpointing": checkpointing,
            "loss": loss,
            "attention": attention,
            "packed": packed,
            "width": width,
            "device": device,
        }
        assert_equal(workload(kind, changes, **facts), keep=keep)
        compared += 1
    assert compared == 640
