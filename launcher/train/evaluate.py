"""Held-out loss, and answers to the recipe's prompts: what is measured before, during and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.train.encode import IGNORED
from launcher.train.generate import answer
from launcher.train.loss import sum_token_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@torch.no_grad()
def measure_loss(engine: Any, batches: Iterable[dict[str, torch.Tensor]]) -> tuple[float, int]:
    """Mean loss a target token over all ranks' batches, and how many tokens that is. Every rank must bring as many batches."""
    engine.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in batches:
        on_device = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        totals[0] += sum_token_loss(engine, on_device)
        totals[1] += (on_device["labels"] != IGNORED).sum()
    engine.train()
    dist.all_reduce(totals)
    return totals[0].item() / max(1.0, totals[1].item()), int(totals[1].item())


def answer_prompts(
    engine: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    system_prompt: str | None,
    max_new_tokens: int,
    sharded: bool,
) -> list[str]:
    """Greedy answers, prompt i made by rank i mod ranks, known to all ranks.

    Under ZeRO-3 (`sharded`) every rank takes part in each forward pass, also one that has finished its answer.
    """
    engine.eval()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
    answers: list[tuple[int, str]] = []
    for start in range(0, len(prompts), ranks):
        index = min(start + rank, len(prompts) - 1)
        messages = [*opening, {"role": "user", "content": prompts[index]}]
        answers.append((index, answer(engine.module, tokenizer, messages, max_new_tokens=max_new_tokens, synced_gpus=sharded)))
    engine.train()
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, answers)
    by_index = dict(pair for pairs in gathered for pair in pairs)
    return [by_index[index] for index in range(len(prompts))]
