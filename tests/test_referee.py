"""The plan's arithmetic against a trace of the model itself on the meta device: equal, to the byte.

What is compared is the most that is live in the forward pass with its loss, and in the backward pass. The trace
runs transformers' code, peft's and the launcher's own loss; the plan has never seen torch.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from architectures import config_of

from launcher.plan.decoder import CLOSED_FORMS
from launcher.plan.shape import shape_of_config
from launcher.plan.step import run_step
from launcher.plan.workload import MethodFacts, Workload
from launcher.train.trace import trace_layers

FULL = MethodFacts(trains="all")
LORA = MethodFacts(trains="adapters", r=4)
DROPPED = replace(LORA, dropout=0.1)
ATTENTION = MethodFacts(trains="adapters", r=4, target_modules=("q_proj", "v_proj"))
WITHOUT_SDPA = {"gemma2"}
EXPERTS = {"mixtral", "qwen3_moe"}
KINDS = sorted(CLOSED_FORMS - {"ministral"})  # ministral is Mistral's code under another name


def workload(kind: str, layers: int = 2, changes: dict[str, Any] | None = None, **facts: Any) -> Workload:
    config = config_of(kind, num_hidden_layers=layers, **(changes or {})).to_dict()
    base: dict[str, Any] = {
        "method": FULL, "width": 2, "device": "cuda", "attention": "eager" if kind in WITHOUT_SDPA else "sdpa", "loss": "plain", "checkpointing": "on",
        "micro_batch_size": 2, "seq_len": 96, "loss_columns": 95, "packed": False, "kernel_workspace": False,
    }  # fmt: skip
    return Workload(shape=shape_of_config(json.loads(json.dumps(config)), Path("config.json")), **base | facts)


def assert_equal(kind: str, work: Workload, *, layers: int = 2, keep: bool = True, changes: dict[str, Any] | None = None) -> None:
    traced = trace_layers(work, layers, keep_gradients=keep)
    # torch adds meeting gradients in place, but not under the dispatch mode that traces.
    tape = run_step(work, keep_gradients=keep, accumulates_in_place=False, round_to=512)
    peaks = {phase: peak for phase, (peak, _) in tape.peaks.items()}
    found = {"forward": max(peaks["forward"], peaks["loss"]), "backward": max(peaks["loss backward"], peaks.get("backward", 0))}
    assert found == {phase: traced.peaks[phase] for phase in found}


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_chunked_loss(kind: str, method: MethodFacts, rows: int) -> None:
    """Up to three chunks of rows; Gemma's head is its embedding."""
    for checkpointing, keep in (("on", False), ("off", True)):
        work = workload(kind, method=method, loss="chunked", checkpointing=checkpointing, micro_batch_size=rows)
        assert_equal(kind, work, keep=keep)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_closed_form(kind: str, method: MethodFacts, checkpointing: Any) -> None:
    if kind in EXPERTS and method is LORA:
        method = ATTENTION  # peft's fused experts cannot be built on the meta device
    assert_equal(kind, workload(kind, method=method, checkpointing=checkpointing))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "facts",
    [{"packed": True}, {"attention": "eager"}, {"attention": "eager", "packed": True}, {"device": "cpu", "packed": True, "width": 4},
     {"width": 4, "packed": True}, {"method": DROPPED}, {"method": DROPPED, "checkpointing": "off"}, {"device": "cpu", "width": 4, "method": LORA}],
    ids=str,
)  # fmt: skip
def test_kernels_masks_and_precisions(kind: str, facts: dict[str, Any]) -> None:
    assert_equal(kind, workload(kind, **facts))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("layers", [1, 3, 5])
def test_depth_and_gradients_that_stay_or_go(layers: int, keep: bool) -> None:
    assert_equal("llama", workload("llama", layers), layers=layers, keep=keep)


@pytest.mark.parametrize(("rows", "columns", "kept"), [(1, 31, 30), (1, 256, 3), (3, 65, 64), (4, 128, 1)])
def test_batches(rows: int, columns: int, kept: int) -> None:
    assert_equal("qwen2", workload("qwen2", micro_batch_size=rows, seq_len=columns, loss_columns=kept))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"tie_word_embeddings": True}), ("llama", {"num_key_value_heads": 4}),
     ("llama", {"num_key_value_heads": 1}), ("qwen3_moe", {"norm_topk_prob": True}), ("qwen3_moe", {"mlp_only_layers": [0]}),
     ("gemma2", {"final_logit_softcapping": None}), ("qwen3", {"head_dim": 32}), ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_what_a_configuration_turns_on(kind: str, changes: dict[str, Any], checkpointing: Any) -> None:
    assert_equal(kind, workload(kind, changes=changes, checkpointing=checkpointing), changes=changes)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination(kind: str) -> None:
    """Architecture × method × checkpointing × attention × packing × precision × device × gradients."""
    compared = 0
    for method, width, checkpointing, packed, attention, device, keep in product(
        (FULL, LORA, DROPPED, ATTENTION), (2, 4), ("on", "off"), (False, True), ("sdpa", "eager"), ("cuda", "cpu"), (True, False)
    ):
        grouped_fp32 = attention == "sdpa" and not packed and width == 4 and device == "cuda"  # torch falls back to its plain kernel
        no_such = (attention == "sdpa" and kind in WITHOUT_SDPA) or (kind in EXPERTS and (width == 4 or method in (LORA, DROPPED)))
        if grouped_fp32 or no_such or (device == "cpu" and method.dropout) or (kind == "phi3" and method is ATTENTION):
            continue
        facts = {
            "method": method,
            "width": width,
            "checkpointing": checkpointing,
            "packed": packed,
            "attention": attention,
            "device": device,
        }
        assert_equal(kind, workload(kind, **facts), keep=keep)
        compared += 1
    assert compared >= 64
