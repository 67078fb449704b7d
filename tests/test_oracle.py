"""Hugging Face's Trainer is the oracle: the same batches give the same losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, fine_tune, losses
from tiny import plan_tiny

from launcher.plan import Plan


def losses_of_hf_trainer(me: Any, plan: Plan) -> list[float]:
    """Job: the plan's batches, in the plan's order, through transformers.Trainer on this one rank."""
    from transformers import Trainer, TrainingArguments

    from launcher.run import cache_dir
    from launcher.train.data import load_samples, open_steps
    from launcher.train.methods import apply_method
    from launcher.train.model import load_base, load_tokenizer
    from launcher.train.optim import make_lr_schedule, make_param_groups

    recipe, batch, steps = plan.recipe, plan.batch, plan.recipe.schedule.max_steps
    assert steps is not None
    samples = load_samples(recipe.data, "train", load_tokenizer(plan), base_dir=plan.base_dir, seed=recipe.seed, cache_dir=cache_dir())
    opened = open_steps(samples, global_batch_size=batch.global_batch_size, micro_batch_size=batch.micro_batch_size, rank=0, world_size=1,
                        seed=recipe.seed, total_samples=steps * batch.global_batch_size)  # fmt: skip
    micro_batches = [micro for step in opened for micro in step.micro_batches]

    class InOrder(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(micro_batches, batch_size=None)

    model = apply_method(load_base(plan, "cpu"), plan)
    optimizer = torch.optim.AdamW(make_param_groups(model, recipe.optim.weight_decay), lr=recipe.optim.lr)
    lr_at = make_lr_schedule(recipe.schedule, 1.0, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_at)
    arguments = TrainingArguments(output_dir=f"{plan.run_dir}/hf", use_cpu=True, max_steps=steps, per_device_train_batch_size=batch.micro_batch_size,
                                  gradient_accumulation_steps=batch.gradient_accumulation_steps, max_grad_norm=recipe.optim.max_grad_norm,
                                  logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=recipe.seed,
                                  logging_nan_inf_filter=False)  # fmt: skip
    trainer = InOrder(model=model, args=arguments, optimizers=(optimizer, schedule))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "lora", "r": 8}], ids=["full", "lora"])
def test_losses_equal_those_of_hf_trainer(method: dict[str, Any], one_rank: Ranks, tiny: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"method": method, "schedule": {"max_steps": 6}, "batch": {"global_batch_size": 6, "micro_batch_size": 2}}
    ours = losses(one_rank.run(fine_tune, plan_tiny(tiny, tmp_path / "ours", ranks=1, **sections))[0])
    theirs = one_rank.run(losses_of_hf_trainer, plan_tiny(tiny, tmp_path / "hf", ranks=1, **sections))[0]
    assert len(theirs) == 6 and not any(map(math.isnan, theirs))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0]
