"""Chunked cross-entropy is the plain one: same loss, same gradients, in a model by itself and on ranks under every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, evaluations, fine_tune, losses
from tiny import plan_tiny
from transformers import AutoModelForCausalLM

from launcher.errors import ModelError, RecipeError
from launcher.plan.losses import LOSS_CHUNK, changes_logits, liger_chunk
from launcher.train.encode import IGNORED
from launcher.train.head import LossHead, put_loss_into_head
from launcher.train.loss import sum_token_loss

ROWS, LENGTH = 10, 64


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = sum_token_loss(model, batch)
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied to the embedding"])
def test_loss_and_gradients_are_those_of_the_plain_loss(tied: bool, tiny: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32, tie_word_embeddings=tied)
    ids = torch.randint(0, 512, (ROWS, LENGTH))
    labels = torch.where(torch.rand(ROWS, LENGTH) < 0.9, ids, IGNORED)
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(LENGTH).expand(ROWS, LENGTH)}
    plain_loss, plain = gradients(model, batch)
    names = [name for name, _ in model.named_parameters()]
    put_loss_into_head(model, "chunked")
    loss, chunked = gradients(model, batch)
    assert ROWS * (LENGTH - 1) > 2 * LOSS_CHUNK, "several chunks"
    assert [name for name, _ in model.named_parameters()] == names, "a checkpoint's names stay"
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item(), msg=name)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.shape == (ROWS, LENGTH, 512), "without targets it is a head as any other"


def test_a_head_that_is_no_linear_layer_is_refused(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    put_loss_into_head(model, "chunked")
    assert isinstance(model.get_output_embeddings(), LossHead)
    with pytest.raises(ModelError, match="LossHead as its output layer"):
        put_loss_into_head(model, "chunked")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "lora", "r": 8}], ids=["full", "lora"])
def test_a_run_with_chunked_loss_is_the_run(method: dict[str, Any], stage: int, two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    found = {}
    for loss in ("plain", "chunked"):
        sections: dict[str, Any] = {
            "method": method,
            "parallel": {"zero_stage": stage},
            "model": {"name_or_path": str(tiny / "model"), "loss": loss},
        }
        sections["batch"] = {"global_batch_size": 16, "micro_batch_size": 8}
        events = two_ranks.run(fine_tune, plan_tiny(tiny, tmp_path / loss, ranks=2, **sections))[0]
        found[loss] = losses(events) + evaluations(events, "after")
    assert found["chunked"] == pytest.approx(found["plain"], abs=1e-5) and len(found["plain"]) > 2


def test_models_that_change_their_logits_after_the_head_are_told_from_others(tiny: Path, tmp_path: Path) -> None:
    assert changes_logits({"final_logit_softcapping": 30.0}) and changes_logits({"logits_scaling": 8.0})
    assert not changes_logits({"final_logit_softcapping": None}) and not changes_logits({"logits_scaling": 1.0})
    with pytest.raises(RecipeError, match="liger needs a GPU"):
        plan_tiny(tiny, tmp_path, model={"name_or_path": str(tiny / "model"), "loss": "liger"})


def test_ligers_chunk_is_a_power_of_two_that_keeps_logits_as_small_as_hidden_states() -> None:
    assert liger_chunk(4096 * 4, 4096, 32000) == 2048
    assert liger_chunk(3, 4096, 4096) == 3
