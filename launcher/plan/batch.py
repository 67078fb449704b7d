"""How the global batch is cut into ranks, micro-batches and accumulation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.errors import Fault, RecipeError
from launcher.recipe import Batch

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""A micro-batch is not made larger than this without being asked: beyond it, kernels gain nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """global_batch_size = micro_batch_size × gradient_accumulation_steps × data_parallel_size."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    data_parallel_size: int
    seq_len: int


def check_batch(*, global_batch_size: int, micro_batch_size: int | str, ranks: int) -> None:
    """Raises RecipeError where the global batch does not divide by the ranks, or a rank's share by the micro-batch."""
    if global_batch_size % ranks:
        near = sorted({max(ranks, global_batch_size // ranks * ranks), -(-global_batch_size // ranks) * ranks})
        problem = f"{global_batch_size} is not divisible by {ranks} ranks"
        if global_batch_size < ranks:
            problem += ": each takes a row at least"
        raise RecipeError([Fault("plan", "batch.global_batch_size", problem,
                                 f"use {' or '.join(map(str, near))}, or another number of workers")])  # fmt: skip
    share = global_batch_size // ranks
    if micro_batch_size != "auto" and share % int(micro_batch_size):
        raise RecipeError([Fault("plan", "batch.micro_batch_size",
                                 f"{micro_batch_size} does not divide a rank's share {share} of batch.global_batch_size {global_batch_size} over {ranks} ranks",
                                 f"use one of {', '.join(map(str, list_divisors(share)))}, or auto")])  # fmt: skip


def list_divisors(number: int) -> list[int]:
    """What divides a number, the smallest first."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def list_micro_batches(batch: Batch, *, ranks: int, seq_len: int, accelerator: str) -> list[int]:
    """Micro-batch sizes to choose from: those that divide a rank's share and hold no more tokens than kernels gain from; largest first."""
    if batch.micro_batch_size != "auto":
        return [batch.micro_batch_size]
    share = batch.global_batch_size // ranks
    most = MICRO_BATCH_TOKENS[accelerator]
    return [size for size in reversed(list_divisors(share)) if size == 1 or size * seq_len <= most]


def make_batch(*, global_batch_size: int, micro_batch_size: int, ranks: int, seq_len: int) -> BatchPlan:
    """The batch plan of a micro-batch that divides (`check_batch`)."""
    return BatchPlan(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, data_parallel_size=ranks,
                     gradient_accumulation_steps=global_batch_size // ranks // micro_batch_size, seq_len=seq_len)  # fmt: skip
