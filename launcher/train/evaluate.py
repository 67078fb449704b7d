"""Held-out loss, and answers to the recipe's prompts: what is measured before, during and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.train.loss import IGNORED, sum_token_loss

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


@torch.no_grad()
def answer_prompts(
    engine: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, max_new_tokens: int, sharded: bool
) -> list[str]:
    """Greedy answers, prompt i made by rank i mod ranks, known to all ranks.

    Under ZeRO-3 (`sharded`) every rank takes part in each forward pass, also one that has finished its answer.
    """
    engine.eval()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    answers: list[tuple[int, str]] = []
    for start in range(0, len(prompts), ranks):
        index = min(start + rank, len(prompts) - 1)
        answer = _answer(engine, tokenizer, prompts[index], max_new_tokens, sharded)
        answers.append((index, answer))
    engine.train()
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, answers)
    by_index = dict(pair for pairs in gathered for pair in pairs)
    return [by_index[index] for index in range(len(prompts))]


def _answer(engine: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, max_new_tokens: int, sharded: bool) -> str:
    from transformers import GenerationConfig

    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        encoded: Any = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    ids_BS = encoded["input_ids"].to(engine.device)
    written = engine.module.generate(
        input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), generation_config=greedy, synced_gpus=sharded
    )
    text: str = tokenizer.decode(written[0, ids_BS.shape[1] :], skip_special_tokens=True)
    return text.strip()
