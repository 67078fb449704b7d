"""How the global batch is cut into ranks, micro-batches and accumulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.errors import Fault, RecipeError

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


def make_batch(
    *, global_batch_size: int, micro_batch_size: int | str, ranks: int, seq_len: int, accelerator: str, fits: Callable[[int], bool]
) -> BatchPlan:
    """The batch plan; `fits` says whether a micro-batch fits the memory. Raises RecipeError if it does not divide."""
    if global_batch_size % ranks:
        near = sorted({max(ranks, global_batch_size // ranks * ranks), -(-global_batch_size // ranks) * ranks})
        raise RecipeError([Fault("plan", "batch.global_batch_size", f"{global_batch_size} is not divisible by {ranks} ranks",
                                 f"use {' or '.join(map(str, near))}, or another number of workers")])  # fmt: skip
    share = global_batch_size // ranks
    if micro_batch_size == "auto":
        divisors = [size for size in range(share, 0, -1) if share % size == 0]
        allowed = [size for size in divisors if size == 1 or (size * seq_len <= MICRO_BATCH_TOKENS[accelerator] and fits(size))]
        micro = allowed[0]
    else:
        micro = int(micro_batch_size)
        if share % micro:
            raise RecipeError([Fault("plan", "batch.micro_batch_size",
                                     f"{micro} does not divide a rank's share {share} of batch.global_batch_size {global_batch_size} over {ranks} ranks",
                                     f"use one of {', '.join(str(s) for s in range(1, share + 1) if share % s == 0)}, or auto")])  # fmt: skip
    return BatchPlan(global_batch_size=global_batch_size, micro_batch_size=micro, gradient_accumulation_steps=share // micro,
                     data_parallel_size=ranks, seq_len=seq_len)  # fmt: skip
