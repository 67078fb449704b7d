"""Jobs for ranks: what a real training step holds, counted tensor by tensor on the CPU, with DeepSpeed over gloo."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

from benchmarks.gloo import tensors_let_go


def measure_training(me: Any, plan: Any, steps: int = 3) -> dict[str, Any]:
    """Job: build the engine and take steps as a run does; live bytes after each part, peaks within it, and what is live at the end."""
    import torch

    from launcher.train.loop import set_lr, take_step
    from launcher.train.loss import sum_token_loss
    from launcher.train.methods import apply_method
    from launcher.train.model import load_base, prepare_weights
    from launcher.train.trace import Trace, watching
    from launcher.train.worker import build_engine

    prepare_weights(plan)
    trace, after = Trace(), {}
    torch.manual_seed(me.rank)
    batch = _make_batch(plan)
    with tensors_let_go(), watching(trace, device="cpu", kernels=False, round_to=1) as watch:
        watch.ignore(batch.values())
        watch.phase = "load"
        model = apply_method(load_base(plan, "cpu"), plan)
        after["load"] = trace.live
        watch.phase = "engine start"
        engine = build_engine(plan, model, me)
        del model
        after["engine start"] = trace.live
        for step in range(1, steps + 1):
            set_lr(engine, 1e-4)
            for _ in range(plan.batch.gradient_accumulation_steps):
                watch.phase = f"forward {step}"
                loss = sum_token_loss(engine, batch)
                watch.phase = f"backward {step}"
                engine.backward(loss)
                del loss
                after[f"backward {step}"] = trace.live
                gc.collect()  # a cycle of DeepSpeed's may hold what stage 3 gathered until Python looks for such
                watch.phase = f"step {step}"
                take_step(engine, _nothing)
                after[f"step {step}"] = trace.live
    sizes = Counter({key: size for key, size in watch.known.items() if size})
    engine.destroy()
    return {"after": after, "peaks": trace.peaks, "storages": sorted(sizes.values(), reverse=True)}


def profile_training(me: Any, plan: Any, steps: int = 4) -> int:
    """Job: the same under torch's profiler, which sees what gloo takes too: the most bytes that were live in the steps from the third on.

    Two forward passes come first where a run checks that packs are kept apart.
    """
    import time

    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.memory_cpu import read_profile
    from launcher.train.data import check_packing
    from launcher.train.loop import set_lr, take_step
    from launcher.train.loss import sum_token_loss
    from launcher.train.methods import apply_method
    from launcher.train.model import load_base, prepare_weights
    from launcher.train.worker import build_engine

    prepare_weights(plan)
    torch.manual_seed(me.rank)
    batch = _make_batch(plan)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiler, tensors_let_go():
        engine = build_engine(plan, apply_method(load_base(plan, "cpu"), plan), me)
        if plan.recipe.data.packing:
            check_packing(engine.module)
        for step in range(1, steps + 1):
            if step == 3:
                third = time.time_ns()
            set_lr(engine, 1e-4)
            loss = sum_token_loss(engine, batch)
            engine.backward(loss)
            take_step(engine, _nothing)
            del loss
    engine.destroy()
    return max(live for moment, live in read_profile(profiler) if moment >= third)


def _make_batch(plan: Any) -> dict[str, Any]:
    import torch

    rows, columns = plan.batch.micro_batch_size, plan.recipe.data.seq_len
    ids = torch.randint(5, plan.shape.vocab_size - 5, (rows, columns))
    if plan.shape.is_pair:
        mask, target = torch.ones_like(ids), torch.randint(5, plan.shape.vocab_size - 5, (rows, plan.recipe.data.target_len))
        mask[-1, -1] = 0  # a row that is shorter, as in most micro-batches
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target, "labels": target.clone()}
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(columns).expand(rows, columns).contiguous()}


def _nothing() -> None:
    return None
