"""A run's adapter melted into its base: a plain transformers folder that needs neither PEFT nor bitsandbytes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from launcher.cluster import find_host_memory
from launcher.errors import BudgetError, DataError
from launcher.plan import Plan, load_plan
from launcher.recipe import Lora, QLora
from launcher.run import RunFolder
from launcher.train.export import allow_reading
from launcher.train.generate import attach_adapter, check_finished, fit_to_machine
from launcher.train.model import TORCH_DTYPE, load_base, make_quantization, prepare_weights
from launcher.train.shard import find_quantised, round_as_quantised
from launcher.units import DTYPE_BYTES, format_bytes


def merge_run(folder: RunFolder, output: Path, dtype: str | None = None) -> Path:
    """Write the merged model to `output` in one move; `dtype` (fp32, bf16, fp16) is the run's unless told.

    A QLoRA adapter is merged into the dequantised weights, the ones it was trained and evaluated on: merged into
    the original ones it would be another model. With 8 bits the sum is near, not equal: LLM.int8() also rounds
    activations, which no plain model does.
    Raises DataError where there is no adapter or `output` holds something, BudgetError where the disk is too full.
    """
    from transformers import AutoTokenizer

    check_finished(folder)
    plan = load_plan(folder.plan)
    if not isinstance(plan.recipe.method, Lora | QLora):
        raise DataError(
            f"method {plan.recipe.method.kind} leaves a whole model, so there is nothing to merge", f"use {folder.model} as it is"
        )
    output = output.absolute()
    _check_memory(plan, dtype or plan.layout.dtype)
    _check_output(output, plan, dtype or plan.layout.dtype)
    model = merge(plan, folder, TORCH_DTYPE[dtype or plan.layout.dtype])
    tokenizer = AutoTokenizer.from_pretrained(folder.model, trust_remote_code=plan.recipe.model.trust_remote_code)
    unfinished = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.unfinished-"))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        allow_reading(unfinished)
        unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def merge(plan: Plan, folder: RunFolder, dtype: torch.dtype) -> Any:
    """The merged model in memory, on the CPU, in `dtype`; summed in the wider of that and the run's dtype.

    A GPU, where there is one, turns a quantised base's weights one at a time. Plain weights stay in their mapped files until they are merged.
    """
    plan, device = fit_to_machine(plan)
    prepare_weights(plan)
    base, trained_in, method = load_base(plan, "cpu", dense=True), TORCH_DTYPE[plan.layout.dtype], plan.recipe.method
    if isinstance(method, QLora):
        quantization = make_quantization(method, trained_in)
        for linear in find_quantised(base):
            round_as_quantised(linear, quantization, device)
    base = base.to(dtype=torch.float32 if torch.float32 in (dtype, trained_in) else trained_in)
    model = attach_adapter(base, folder).merge_and_unload(safe_merge=True).to(dtype)
    model.config.use_cache = True
    model.config.dtype = dtype
    return model


def _check_memory(plan: Plan, dtype: str) -> None:
    needed = plan.shape.num_params * max(DTYPE_BYTES[dtype], DTYPE_BYTES[plan.layout.dtype])
    if needed > (there := find_host_memory()):
        raise BudgetError(f"the merged model is {format_bytes(needed)} in memory ({plan.shape.num_params:,} parameters),"
                          f" and this machine has {format_bytes(there)}", "merge on a larger one: the run folder is all it takes")  # fmt: skip


def _check_output(output: Path, plan: Plan, dtype: str) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} is there already, and is not an empty folder", "name another with --output, or move it away")
    output.parent.mkdir(parents=True, exist_ok=True)
    needed, free = plan.shape.num_params * DTYPE_BYTES[dtype], shutil.disk_usage(output.parent).free
    if free < needed:
        raise BudgetError(f"the merged model takes {format_bytes(needed)} ({plan.shape.num_params:,} parameters in {dtype}),"
                          f" and {output.parent} has {format_bytes(free)} left", "free some, or name another place with --output")  # fmt: skip
