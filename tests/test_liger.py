"""Liger's loss and layers in the plan, against a trace of liger-kernel's own functions around kernels that do nothing (tests/liger.py)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import liger
import pytest
from test_referee import DROPPED, EXPERTS, FREEZE, FULL, KINDS, LORA, OTHER_SIZES, WITHOUT_SDPA, adapt, workload

from launcher.plan.fused import FUSED
from launcher.plan.losses import changes_logits
from launcher.plan.step import run_step
from launcher.plan.workload import MethodFacts, Workload

METHODS = [FULL, LORA, FREEZE]
NAMES = ["full", "lora", "freeze"]
MANY_WORDS = {"vocab_size": 1600}
PLAIN_HEADS = [kind for kind in KINDS if kind != "granite" and not changes_logits(workload(kind).shape.config)]
"""Every Granite scales its logits, so that the plan refuses this loss; a configuration's default alone has a scale of 1."""


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with liger.tracing() as process:
        yield process


def tell(work: Workload, *, keep: bool = True) -> dict[str, int]:
    peaks = {
        phase: peak for phase, (peak, _) in run_step(work, keep_gradients=keep, accumulates_in_place=False, round_to=512).peaks.items()
    }
    return {
        "forward": max(peaks["forward"], peaks["loss"]),
        "backward": max(peaks.get(name, 0) for name in ("loss backward", "early backward", "backward")),
    }


def assert_equal(process: ProcessPoolExecutor, work: Workload, *, keep: bool = True) -> None:
    traced = process.submit(liger.trace, work, keep=keep).result()
    told = tell(work, keep=keep)
    assert told == {phase: traced[phase] for phase in told}


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "phi", "qwen3_moe"])
def test_the_loss(kind: str, method: Any, checkpointing: Any, process: ProcessPoolExecutor) -> None:
    """Phi's head has a bias, Gemma's is its embedding."""
    for sizes in (None, MANY_WORDS):
        facts = {"method": adapt(kind, method), "checkpointing": checkpointing, "loss": "liger"}
        assert_equal(process, workload(kind, changes=sizes, **facts))


@pytest.mark.parametrize("facts", [{"width": 4, "packed": True}, {"sums_in_place": False}, {"micro_batch_size": 1}, {"micro_batch_size": 5, "loss_columns": 61},
                                   {"packed": True, "attention": "eager"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_the_loss_by_precision_device_and_rows(kind: str, facts: dict[str, Any], process: ProcessPoolExecutor) -> None:
    """In fp32, and on GPUs before Ampere, a chunk's part of the head's gradient is made by itself."""
    for method, keep in product(METHODS, (True, False)):
        assert_equal(process, workload(kind, changes=MANY_WORDS, method=method, loss="liger", **facts), keep=keep)


def test_what_is_made_by_itself_counts(process: ProcessPoolExecutor) -> None:
    """The cases above differ by what they are there for: a whole gradient of the head in 16 bits, and in 32."""
    work = workload("llama", changes={"vocab_size": 16000}, loss="liger")
    beside = tell(replace(work, sums_in_place=False))["forward"] - tell(work)["forward"]
    assert beside == 16000 * 64 * (2 + 4)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_head_that_is_trained_alone_gets_a_gradient(kind: str, process: ProcessPoolExecutor) -> None:
    """Liger's function makes none where its input needs none; the launcher's head asks for the input's (launcher/train/head.py)."""
    work = workload(kind, changes=MANY_WORDS, method=MethodFacts(trains="some", patterns=("lm_head*",)), checkpointing="off", loss="liger")
    assert_equal(process, work)
    frozen = workload(kind, changes=MANY_WORDS, method=LORA, checkpointing="off", loss="liger")
    assert tell(work)["backward"] > 1600 * 64 * 2, "the head's own"
    assert_equal(process, frozen)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_an_evaluation_makes_no_gradients(kind: str, process: ProcessPoolExecutor) -> None:
    work = workload(kind, changes=MANY_WORDS, loss="liger")
    for stand_in in (False, True):
        traced = process.submit(liger.trace, work, trains=False, stand_in=stand_in).result()["forward"]
        assert max(peak for peak, _ in run_step(work, keep_gradients=False, train=False, round_to=512).peaks.values()) == traced


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_where_liger_is_missing_a_trace_has_a_stand_in(kind: str, process: ProcessPoolExecutor) -> None:
    for method, width in product(METHODS, (2, 4)):
        work = workload(kind, changes=MANY_WORDS, method=method, loss="liger", width=width, packed=width == 4, checkpointing="off")
        own, stand_in = (process.submit(liger.trace, work, stand_in=choice).result() for choice in (False, True))
        assert stand_in == own


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("method", [FULL, LORA], ids=NAMES[:2])
@pytest.mark.parametrize("kind", sorted(FUSED))
def test_layers(kind: str, method: Any, checkpointing: Any, process: ProcessPoolExecutor) -> None:
    attention = "eager" if kind in WITHOUT_SDPA else "sdpa"
    for sizes in (None, OTHER_SIZES):
        assert_equal(process, workload(kind, changes=sizes, method=method, checkpointing=checkpointing, fused=True, attention=attention))


FUSED_EXPERTS = {"mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"}
"""Liger's experts work in tiles of rows, which of a batch as small as a test's are mostly empty: nothing is said of these."""


@pytest.mark.parametrize("kind", sorted(set(KINDS) - FUSED - FUSED_EXPERTS))
def test_other_models_take_hardly_more_than_is_counted_without(kind: str, process: ProcessPoolExecutor) -> None:
    """What Liger does to their layers is not told: most take less of it, Llama 4 up to 2.5 % more."""
    for method, checkpointing, sizes in product((FULL, LORA), ("on", "off"), (None, OTHER_SIZES)):
        facts = {"method": adapt(kind, method), "checkpointing": checkpointing, "attention": "eager" if kind in WITHOUT_SDPA else "sdpa"}
        work = workload(kind, changes=sizes, **facts)
        traced = process.submit(liger.trace, replace(work, fused=True)).result()
        assert max(tell(work).values()) >= 0.97 * max(traced.values())


@pytest.mark.long
@pytest.mark.parametrize("kind", PLAIN_HEADS)
def test_the_loss_of_every_kind(kind: str, process: ProcessPoolExecutor) -> None:
    """Architecture × method × checkpointing × precision × packing × attention × rows × gradients × layers of Liger's."""
    for method, checkpointing, width, packed, attention, rows, keep, fused in product(
        (*METHODS, DROPPED), ("on", "off"), (2, 4), (False, True), ("sdpa", "eager"), (1, 3), (True, False), (False, True)
    ):
        grouped_fp32 = attention == "sdpa" and not packed and width == 4
        no_such = (attention == "sdpa" and kind in WITHOUT_SDPA) or (kind in EXPERTS and width == 4) or (fused and kind not in FUSED)
        if grouped_fp32 or no_such:
            continue
        facts = {
            "method": adapt(kind, method),
            "checkpointing": checkpointing,
            "width": width,
            "packed": packed,
            "attention": attention,
            "fused": fused,
        }
        assert_equal(process, workload(kind, changes=MANY_WORDS, loss="liger", micro_batch_size=rows, **facts), keep=keep)
