"""A checkpoint as a plain folder: the adapter or model of that step, in PEFT's or transformers' layout, on one CPU and without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launcher.checkpoint.commit import load_commit
from launcher.checkpoint.identity import find_differences, hash_weights, make_identity
from launcher.checkpoint.reshard import Reader
from launcher.checkpoint.storage import Storage
from launcher.errors import CheckpointError
from launcher.run import cache_dir
from launcher.train.export import write_model
from launcher.train.fragments import BEST, MASTER, read_whole
from launcher.train.methods import apply_method
from launcher.train.model import list_weight_files, load_base, load_tokenizer, prepare_weights
from launcher.train.worker import copy_start

if TYPE_CHECKING:
    from launcher.plan import Plan


def consolidate(plan: Plan, storage: Storage, step: int, folder: Path, *, best: bool = False) -> Path:
    """Write the weights of a checkpoint to `folder`; with `best` those of the best evaluation before it.

    Raises CheckpointError for a folder that is there, for a base model that is not the checkpoint's, and for damage.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is there already", "name another folder with --output")
    commit = load_commit(storage, step)
    layout = replace(plan.layout, accelerator="cpu", attn_implementation="sdpa", liger_kernel=False, zero_stage=0, zero_init=False,
                     offload_optimizer=False, offload_param=False, leaf_modules=False)  # fmt: skip
    plan = replace(plan, layout=layout)
    prepare_weights(plan)
    now = make_identity(plan.recipe, dtype=layout.dtype, weights=hash_weights(list_weight_files(plan), cache_dir() / "hashes"))
    changed = [difference for difference in find_differences(commit.identity, now) if difference.key.startswith(("model.", "method."))]
    if changed:
        raise CheckpointError(f"the base model or method is not the checkpoint's: {'; '.join(map(str, changed))}", "bring them back")
    model = apply_method(load_base(plan, "cpu"), plan)
    start = copy_start(model, plan)
    reader = Reader(storage, commit)
    kind = BEST if best else MASTER
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if kind not in reader.kinds.get(name, ()):
                lacks = "no best weights: its own are the best so far" if best else f"no weights of {name}"
                raise CheckpointError(
                    f"the checkpoint of step {step} holds {lacks}", "drop --best" if best else "it was made by another method"
                )
            parameter.copy_(read_whole(reader, name, kind).view(parameter.shape))
    weights = {
        name: p.detach() for name, p in model.named_parameters() if p.requires_grad or plan.recipe.method.kind not in ("lora", "qlora")
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_model(model, plan, weights, load_tokenizer(plan), folder, start)
    return folder
