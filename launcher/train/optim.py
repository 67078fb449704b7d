"""Optimizers by name, parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from launcher.recipe import Optim, Schedule


def make_param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay; norms, biases and other vectors do not."""
    decayed: list[torch.nn.Parameter] = []
    spared: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if _rank(parameter) > 1 else spared).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _rank(parameter: torch.nn.Parameter) -> int:
    # zero.Init leaves an empty shard behind and keeps the true shape in ds_shape.
    shape: tuple[int, ...] = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
    return len(shape)


def build_optimizer(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    """The optimizer a recipe names, at learning rate 0: the loop sets it each step.

    DeepSpeed shards the states of any of them (zero_allow_untested_optimizer).
    """
    lr, betas, eps = 0.0, optim.betas, optim.eps
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum)
    if optim.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr)
    import bitsandbytes as bnb

    made: torch.optim.Optimizer
    if optim.name == "lion":
        made = bnb.optim.Lion(groups, lr=lr, betas=betas)
    elif optim.name == "lion_8bit":
        made = bnb.optim.Lion8bit(groups, lr=lr, betas=betas)
    else:
        kind = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw": bnb.optim.PagedAdamW, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}[
            optim.name
        ]
        made = kind(groups, lr=lr, betas=betas, eps=eps)
    return made


def make_lr_schedule(schedule: Schedule, peak: float, total_steps: int) -> Callable[[int], float]:
    """The learning rate of step 0, 1, ... total_steps - 1: linear warm-up, then the schedule's shape."""
    warmup = schedule.warmup_steps if schedule.warmup_steps is not None else math.ceil(schedule.warmup_ratio * total_steps)
    floor = schedule.min_lr_ratio

    def lr_at(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        if schedule.kind == "constant":
            return peak
        if schedule.kind == "linear":
            return peak * (floor + (1 - floor) * (1 - progress))
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    return lr_at


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def take_step(engine: Any, before_update: Callable[[], None]) -> float | None:
    """engine.step(); where that ends the accumulation, the global norm of the gradients before clipping.

    `before_update` is called when the weights and the optimizer's states are about to change.

    DeepSpeed 0.19.8 keeps no norm for stage 0 in fp32: there it is taken from the gradients, already averaged.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    before_update()
    norm = None
    if engine.zero_optimization_stage() == 0:
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return float(norm if norm is not None else engine.get_global_grad_norm())
