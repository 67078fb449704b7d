"""The training loop: one function, in the order things happen. It is handed what it needs, so it runs
under Ray, under torchrun and in a test without either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from launcher.errors import NotFinite, Stopped
from launcher.run import Event
from launcher.train.data import StepBatch
from launcher.train.foreign import naming_foreign_errors, say_samples
from launcher.train.loss import sum_token_loss
from launcher.train.optim import set_lr, take_step
from launcher.train.saving import Saver
from launcher.train.state import TrainState


def train(
    engine: Any,
    steps: Iterable[StepBatch],
    state: TrainState,
    *,
    total_steps: int,
    samples_per_epoch: int,
    lr_at: Callable[[int], float],
    evaluate: Callable[[TrainState], TrainState],
    is_over: Callable[[TrainState], bool],
    saver: Saver,
    report: Callable[[Event], None],
    stop_asked: Callable[[], bool],
) -> TrainState:
    """Take the optimizer steps of `steps`; returns the state after the last.

    The loss of a step is the mean over all its target tokens, on whichever rank and micro-step they are.
    Raises NotFinite when that mean is no number, Stopped when any rank was asked to stop: what it leaves is saved then.
    """
    ranks, micro_steps = dist.get_world_size(), engine.gradient_accumulation_steps()
    for batch in steps:
        began = time.perf_counter()
        lr = lr_at(state.step)
        set_lr(engine, lr)
        # DeepSpeed divides by micro-steps and averages over ranks; undone here, so that each token weighs the same.
        weight = ranks * micro_steps / batch.num_targets
        totals = torch.zeros(4, dtype=torch.float64, device=engine.device)
        sample_ids = batch.sample_ids.tolist()
        with naming_foreign_errors(dist.get_rank(), step=state.step + 1, sample_ids=sample_ids):
            for micro_batch in batch.micro_batches:
                loss_sum = sum_token_loss(engine, {name: tensor.to(engine.device) for name, tensor in micro_batch.items()})
                engine.backward(loss_sum * weight)
                grad_norm = take_step(engine, saver.settle)
                totals[0] += loss_sum.detach()
                del loss_sum  # and its graph, on which LLM.int8() hangs its inputs: the next forward pass would run beside them
        totals[1:] += torch.tensor([stop_asked(), *saver.votes()], dtype=torch.float64, device=engine.device)
        dist.all_reduce(totals)
        stopping, save_due, save_failed = (bool(total > 0) for total in totals[1:])
        loss = totals[0].item() / batch.num_targets
        state = state.after_step(len(batch.sample_ids), batch.num_tokens)
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {loss} at step {state.step}; {say_samples(sample_ids)} in it",
                            "lower optim.lr, lengthen the warm-up, or train in bf16 or fp32")  # fmt: skip
        seconds = time.perf_counter() - began
        report({"event": "step", "step": state.step, "total_steps": total_steps, "epoch": state.samples_seen / samples_per_epoch,
                "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_s": batch.num_tokens / seconds,
                "samples_seen": state.samples_seen, "tokens_seen": state.tokens_seen, "step_s": seconds})  # fmt: skip
        state = evaluate(state)
        over = is_over(state)
        if over:
            report({"event": "early_stop", "step": state.step, "best_step": state.best_step, "best_loss": state.best_loss})
        saver.after_step(state, due=save_due, failed=save_failed, last=over or stopping or state.step == total_steps)
        if stopping:
            raise Stopped(f"stopped on request after step {state.step} of {total_steps}", saver.describe_last())
        if over:
            break
    return state
