"""A published fine-tuning run in the plan's own words: DeepSpeed's ZeRO as the launcher runs it, or a plain torch optimizer.

What differs from a run of this launcher is taken from the reading: reentrant checkpointing (transformers 4's default), expandable segments where the
launch line exports them, DeepSpeed's buckets where the reading gives them, a CUDA context that was measured apart. A plain optimizer has no masters and
no buckets: its states have the dtype of the weights, and gradients stay in their parameters until the step.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from launcher.cluster import Cluster
from launcher.plan import memory
from launcher.plan.batch import BatchPlan
from launcher.plan.budget import FigureName
from launcher.plan.deepspeed import make_deepspeed_config
from launcher.plan.layout import Dtype, Layout
from launcher.plan.shape import ModelShape, load_shape
from launcher.plan.source import locate_model
from launcher.plan.states import Counts, Optimizer, States, count_states, optimizer_bytes
from launcher.plan.workload import Workload
from launcher.recipe import Recipe
from launcher.units import GIB, MIB

Row = dict[str, Any]
MEMORY_GIB = {"H200": 141, "MI300X": 192, "B200": 180}
READ_AT_SOURCE: dict[str, Row] = {
    "ds-sdma-qwen3-32b": {  # train_qwen3_zero3.py and ds_config_zero3_nosdma.json; `cfg.attn_implementation` is no key that from_config reads
        "optimizer": "AdamW", "grad_ckpt": False, "attn": "sdpa", "peak_unit": "GB (1e9)",
        "sharding": "ZeRO-3 reduce_bucket 5e7 prefetch 5e7 persistence 1e5 sub_group 1e12", "stack": "expandable_segments:True",
    },
}  # fmt: skip
"""What a reading's reference says beyond the reading's own fields."""


def is_plain(row: Row) -> bool:
    """Without DeepSpeed and FSDP: one GPU, or torch's DistributedDataParallel over several."""
    return row["sharding"] in (None, "none", "DDP") and "ZeRO" not in row["framework"]


def stage_of(row: Row) -> int | None:
    found = re.search(r"ZeRO-([0-3])", f"{row['sharding']} {row['framework']}")
    return int(found[1]) if found else None


def predict(row: Row, figure: str) -> float:
    """Bytes: allocated, reserved, or all of the device's (nvidia-smi)."""
    recipe, shape = _make_recipe(row), load_shape(locate_model(hub_id(row), "/"), None)
    ranks, plain = row["n_gpus"], is_plain(row)
    layout = _make_layout(row, recipe, 0 if plain else stage_of(row) or 0)
    steps = int(row["grad_accum"] or 1)
    batch = BatchPlan(global_batch_size=ranks * row["micro_batch"] * steps, micro_batch_size=row["micro_batch"], gradient_accumulation_steps=steps,
                      data_parallel_size=ranks, seq_len=row["seq_len"])  # fmt: skip
    cluster = Cluster(accelerator="cuda", device_name=row["gpu"], device_memory=_memory_of(row["gpu"]))
    work = _make_work(row, recipe, shape, layout, batch)
    if not count_states(work).trained:
        raise LookupError(f"{row['id']}: none of {recipe.method} is in {row['model']}")
    context = re.search(r"context (\d+) MiB", row["peak_metric"])
    overheads = memory.choose_overheads(row["gpu"])
    plan = memory.predict_memory(
        recipe, shape, layout, batch, cluster, deepspeed=_make_config(row, layout, batch, shape), work=work,
        expandable_segments="expandable_segments:True" in str(row["stack"]), states=_plain_states(row, work, recipe, steps) if plain else None,
        overheads=replace(overheads, context=int(context[1]) * MIB) if context else overheads,
    )  # fmt: skip
    names: dict[str, FigureName] = {"allocated": "allocated", "reserved": "reserved", "nvidia-smi": "total"}
    return float(plan.device(names[figure]).p50)


def hub_id(row: Row) -> str:
    return str(row["model"].split(" ")[0])


def _memory_of(gpu: str) -> int:
    told = re.search(r"(\d+) ?GB", gpu)
    return int(told[1] if told else next((size for name, size in MEMORY_GIB.items() if name in gpu), 80)) * GIB


OPTIMIZERS = (("paged.*8", "paged_adamw_8bit"), ("paged", "paged_adamw"), ("8.?bit", "adamw_8bit"), ("adafactor", "adafactor"), ("lion", "lion"),
              ("sgd", "sgd"), ("adam", "adamw"))  # fmt: skip


def optimizer_of(row: Row) -> str | None:
    return next((name for pattern, name in OPTIMIZERS if re.search(pattern, str(row["optimizer"]).lower())), None)


def _make_recipe(row: Row) -> Recipe:
    offload, loss = str(row["offload"]), "liger" if "Liger" in str(row["loss_kernel"]) else "plain"
    places = {"offload_optimizer": "optimizer=cpu" in offload, "offload_param": "param=cpu" in offload}
    return Recipe.model_validate_json(json.dumps({
        "name": "reading", "model": {"name_or_path": hub_id(row), "dtype": _dtype(row), "loss": loss},
        "data": {"train": "x", "seq_len": row["seq_len"], "packing": row["micro_batch"] == 1 and "pack" in str(row["seq_semantics"])},
        "batch": {"global_batch_size": row["n_gpus"] * row["micro_batch"] * int(row["grad_accum"] or 1), "micro_batch_size": row["micro_batch"]},
        "parallel": {"zero_stage": stage_of(row) or 0, **places}, "optim": {"name": optimizer_of(row) or "adamw"}, "method": _make_method(row),
    }))  # fmt: skip


def _dtype(row: Row) -> Dtype:
    dtypes: tuple[Dtype, ...] = ("fp32", "fp16", "bf16")
    return next((name for name in dtypes if str(row["weight_dtype"]).startswith(name)), "bf16")


def _make_method(row: Row) -> dict[str, Any]:
    if row["method"] == "full":
        return {"kind": "full"}
    lora, quant = row["lora"], str(row["quant"]).lower()
    targets = lora.get("targets", "all")
    named = [f"{t}_proj" if t in ("q", "k", "v", "o") else t for t in targets] if isinstance(targets, list) else "all-linear"
    method = {"kind": "lora", "r": lora["r"], "dropout": lora.get("dropout", 0.0), "target_modules": named}
    if row["method"].startswith("qlora"):
        method |= {"kind": "qlora", "bits": 8 if row["method"].endswith("8") else 4, "double_quant": "double" in quant or "dq" in quant}
    return method


def _make_layout(row: Row, recipe: Recipe, stage: int) -> Layout:
    attention = {"flash": "flash_attention_2", "eager": "eager"}
    kernel: Any = next((ours for theirs, ours in attention.items() if theirs in str(row["attn"])), "sdpa")
    return Layout(nodes=1, workers_per_node=row["n_gpus"], accelerator="cuda", backend="nccl", threads_per_worker=1, dtype=_dtype(row),
                  attn_implementation=kernel, liger_kernel=recipe.model.loss == "liger", zero_stage=stage, zero_init=stage == 3, leaf_modules=stage == 3,
                  gradient_checkpointing=bool(row["grad_ckpt"]), checkpoints_on_host="activation" in str(row["offload"]), loss="liger" if recipe.model.loss == "liger" else "plain",
                  offload_optimizer=recipe.parallel.offload_optimizer, offload_param=recipe.parallel.offload_param)  # fmt: skip


def _make_config(row: Row, layout: Layout, batch: BatchPlan, shape: ModelShape) -> dict[str, Any]:
    """DeepSpeed's defaults, and what the reading says of its buckets."""
    config = make_deepspeed_config(layout, batch, max_grad_norm=1.0, bucket=500_000_000, hidden_size=shape.hidden_size)
    keys = {"reduce_bucket": "reduce_bucket_size", "prefetch": "stage3_prefetch_bucket_size", "persistence": "stage3_param_persistence_threshold",
            "sub_group": "sub_group_size"}  # fmt: skip
    for word, key in keys.items():
        told = re.search(rf"{word} ([\d.e]+)", str(row["sharding"]))
        if told:
            config["zero_optimization"][key] = int(float(told[1]))
    return config


def _make_work(row: Row, recipe: Recipe, shape: ModelShape, layout: Layout, batch: BatchPlan) -> Workload:
    """A classifier's head sees one place of a row; rows that are all of one length need no mask."""
    work = memory.make_workload(recipe, shape, layout, batch)
    work = replace(work, reentrant="transformers 4" in row["framework"], packed=False)
    return replace(work, loss_columns=1) if "seq-cls" in row["model"] else work


def _plain_states(row: Row, work: Workload, recipe: Recipe, steps: int) -> States:
    """Weights in their dtype (peft keeps adapters in fp32), gradients and the optimizer's states likewise; DDP's buckets are as large as these."""
    counts = count_states(work)
    trained, width = counts.trained, 4 if work.method.r else work.width
    largest = max(counts.decayed + counts.spared, default=0)
    return States(
        weights=work.width * (sum(counts.frozen) + trained - counts.adapters) + counts.packed_bytes, quant_state=counts.quant_state_bytes,
        adapters=width * counts.adapters, persistent=0, master=0, optimizer=_plain_optimizer(work, counts, recipe) * width // 4,
        gradients=width * trained if steps > 1 else 0, bucket=width * trained if row["n_gpus"] > 1 else 0, bucket_always=row["n_gpus"] > 1, partition=trained, part_bytes=width * trained, reduce_copy=0,
        start_peak=0, step_peak=width * trained + 4 * largest, host=0, host_pinned=(),
    )  # fmt: skip


def _plain_optimizer(work: Workload, counts: Counts, recipe: Recipe) -> int:
    """Bytes beside fp32 weights. Adafactor keeps a row and a column of each matrix, where a flat partition has neither."""
    if recipe.optim.name != "adafactor":
        return optimizer_bytes(Optimizer(name=recipe.optim.name), counts.decayed + counts.spared)
    shapes = [weight.shape for block in work.shape.inventory for weight in block.weights for _ in (block.layers or (0,))]
    return sum(4 * (sum(shape[-2:]) if len(shape) > 1 else shape[0]) for shape in shapes)
