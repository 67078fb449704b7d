"""From the trained engine to files: an adapter in PEFT's layout, or a model in transformers'."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.plan import Plan
from launcher.recipe import Lora, QLora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GATHER_ELEMENTS = 1 << 28
"""Under ZeRO-3, weights are gathered so many at a time, so that no device ever holds the whole model."""


def export_model(engine: Any, plan: Plan, tokenizer: PreTrainedTokenizerFast, folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Write what was trained to `folder`, in one move. All ranks take part, rank 0 writes.

    `start` holds the adapters as they were before training; PiSSA needs them, others ignore them.
    """
    weights = gather_weights(engine, only_trained=isinstance(plan.recipe.method, Lora | QLora))
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a session that was killed when it had got this far
        write_model(engine.module, plan, weights, tokenizer, folder, start)
    dist.barrier()


def write_model(
    model: Any,
    plan: Plan,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    start: dict[str, torch.Tensor],
) -> None:
    """Write whole weights by name to `folder`, which is there once all of it is."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if isinstance(plan.recipe.method, Lora | QLora):
        _save_adapter(model, plan, weights, unfinished, start)
    else:
        model.save_pretrained(unfinished, state_dict=weights)
    tokenizer.save_pretrained(unfinished)
    allow_reading(unfinished)
    unfinished.rename(folder)


def allow_reading(folder: Path) -> None:
    """Let others read a folder and its files: safetensors and mkdtemp make them for their owner alone."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def gather_weights(engine: Any, *, only_trained: bool) -> dict[str, torch.Tensor]:
    """Full parameters by name, on rank 0's CPU; the other ranks help and get an empty dict."""
    rank, weights = dist.get_rank(), {}
    wanted = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad or not only_trained]
    for chunk in _chunks(wanted):
        with _gathered([p for _, p in chunk]):
            if rank == 0:
                weights.update({name: p.detach().to("cpu", copy=True) for name, p in chunk})
    return weights


def _chunks(named: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    chunks: list[list[tuple[str, Any]]] = [[]]
    held = 0
    for name, parameter in named:
        size = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
        if chunks[-1] and held + size > GATHER_ELEMENTS:
            chunks.append([])
            held = 0
        chunks[-1].append((name, parameter))
        held += size
    return chunks


def _gathered(parameters: list[Any]) -> Any:
    if not any(hasattr(p, "ds_tensor") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _save_adapter(model: Any, plan: Plan, weights: dict[str, torch.Tensor], folder: Path, start: dict[str, torch.Tensor]) -> None:
    from peft import get_peft_model_state_dict

    method = plan.recipe.method
    config = model.peft_config["default"]
    if isinstance(method, Lora) and method.init == "pissa":
        weights = {name: _undo_pissa(name, weight, start[name]) for name, weight in weights.items()}
        # Twice the rank at the same scale: alpha / r, or alpha / sqrt(r).
        config.r, config.lora_alpha = 2 * method.r, method.alpha * (math.sqrt(2) if method.rslora else 2)
        config.init_lora_weights = True
    config.inference_mode = True
    config.base_model_name_or_path = model.get_base_model().config.name_or_path
    state = get_peft_model_state_dict(model, state_dict=weights)
    folder.mkdir(parents=True)
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    config.save_pretrained(folder)


def _undo_pissa(name: str, trained: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """PiSSA moved part of the base into the adapter. The difference to the start, B·A - B0·A0, is an adapter
    of twice the rank on the base as it was (Meng et al. 2024, section 4)."""
    if ".lora_A." in name:
        return torch.cat([trained, start], dim=0)
    return torch.cat([trained, -start], dim=1)
