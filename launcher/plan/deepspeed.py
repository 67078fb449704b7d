"""DeepSpeed's configuration, every value decided: no "auto" is left for a worker to fill in."""

from __future__ import annotations

from typing import Any

from launcher.plan.batch import BatchPlan
from launcher.plan.layout import Layout

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed 0.19.8's default (runtime/zero/config.py)."""


def choose_bucket(trainable_params: int) -> int:
    """Elements of the reduce bucket: never more than there are gradients to put in it."""
    return max(1 << 20, min(REDUCE_BUCKET_ELEMENTS, trainable_params))


def make_deepspeed_config(layout: Layout, batch: BatchPlan, *, max_grad_norm: float, bucket: int, hidden_size: int) -> dict[str, Any]:
    """The dict for deepspeed.initialize. Keys: deepspeed.ai/docs/config-json, checked against 0.19.8's source."""
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 1 << 31,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": layout.dtype == "bf16"},
        "fp16": {"enabled": layout.dtype == "fp16"},
        # Client optimizers are torch's and bitsandbytes'; neither needs a compiled DeepSpeed kernel.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _make_zero(layout, bucket, hidden_size),
    }


def _make_zero(layout: Layout, bucket: int, hidden_size: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": layout.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": layout.accelerator == "cuda" and layout.zero_stage == 3,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if layout.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 10 * hidden_size,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            # DeepSpeed's own linear keeps a graph from holding gathered weights, and on a CPU is a tenth slower than torch's;
            # a checkpointed layer's graph lives no longer than its weights do.
            "memory_efficient_linear": layout.accelerator != "cpu" or not layout.gradient_checkpointing,
        }
    pin = layout.accelerator == "cuda"
    place = {"device": "cpu"} if layout.nvme_path is None else {"device": "nvme", "nvme_path": layout.nvme_path}
    if layout.offload_optimizer:
        zero["offload_optimizer"] = {**place, "pin_memory": pin} | ({"buffer_count": 4} if layout.nvme_path else {})
    if layout.offload_param:
        zero["offload_param"] = {**place, "pin_memory": pin} | ({"buffer_count": 5, "buffer_size": 100_000_000} if layout.nvme_path else {})
    return zero
