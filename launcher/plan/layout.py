"""How ranks are laid over the cluster, and what each computes with."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from launcher.cluster import Accelerator, Cluster
from launcher.errors import Fault, RecipeError
from launcher.recipe import QLora, Recipe

Attention = Literal["eager", "sdpa", "flash_attention_2"]
Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Ranks are numbered node by node; every rank holds `zero_stage`'s share of the model."""

    nodes: int
    workers_per_node: int
    accelerator: Accelerator
    backend: Literal["gloo", "nccl"]
    threads_per_worker: int
    dtype: Dtype
    attn_implementation: Attention
    liger_kernel: bool
    zero_stage: int
    offload_optimizer: bool
    offload_param: bool
    zero_init: bool
    leaf_modules: bool
    gradient_checkpointing: bool
    checkpoints_on_host: bool = False
    """Whether what gradient checkpointing keeps is moved to host memory."""
    loss: Literal["plain", "chunked", "liger"] = "plain"
    nvme_path: str | None = None
    """Where offloaded states are kept on disk; None keeps them in host memory."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.workers_per_node

    @property
    def packs_flat(self) -> bool:
        """Flash attention keeps examples apart in one row without padding; other kernels in a padded batch."""
        return self.attn_implementation == "flash_attention_2"


def make_layout(recipe: Recipe, cluster: Cluster) -> tuple[Layout, list[str]]:
    """The layout, and the reason of every choice made for the user. Raises RecipeError."""
    notes: list[str] = []
    cuda = cluster.accelerator == "cuda"
    dtype = _choose_dtype(recipe, cluster, notes)
    attention = recipe.model.attn_implementation
    if attention == "auto":
        attention = "flash_attention_2" if cuda and dtype != "fp32" and is_installed("flash_attn") else "sdpa"
        notes.append(f"attention: {attention}" + ("" if attention != "sdpa" or not cuda else " (flash_attn is not installed)"))
    elif attention == "flash_attention_2" and not cuda:
        raise RecipeError(
            [Fault("plan", "model.attn_implementation", "flash_attention_2 needs a GPU, and this cluster has none", "use auto")]
        )
    liger = recipe.model.liger_kernel
    if liger is True and not (cuda and is_installed("liger_kernel")):
        missing = "a GPU, and this cluster has none" if not cuda else "the package liger-kernel"
        raise RecipeError([Fault("plan", "model.liger_kernel", f"needs {missing}", "use auto")])
    liger = cuda and liger is not False and is_installed("liger_kernel")
    if recipe.model.loss == "liger" and not cuda:
        raise RecipeError(
            [Fault("plan", "model.loss", "liger needs a GPU, and this cluster has none", "use chunked, which takes as little")]
        )
    parallel, stage = recipe.parallel, recipe.parallel.zero_stage
    checkpointing = recipe.memory.gradient_checkpointing
    loss = recipe.model.loss
    if stage == "auto" or checkpointing == "auto" or loss == "auto":
        raise ValueError("a layout is made of a recipe that leaves nothing to choose (launcher.plan.solve)")
    if not cuda and stage == 3 and not trains_sharded_on_cpu(recipe):
        raise RecipeError([Fault("plan", "method.dora", CPU_DORA, "set parallel.zero_stage to 2, or method.dora to false")])
    zero_init = stage == 3
    leaf = stage == 3 and parallel.leaf_modules is not False
    if stage == 3 and parallel.leaf_modules == "auto":
        notes.append("leaf modules: a decoder layer is gathered at once (parallel.leaf_modules)")
    layout = Layout(
        nodes=cluster.nodes,
        workers_per_node=cluster.workers_per_node,
        accelerator=cluster.accelerator,
        backend="nccl" if cuda else "gloo",
        threads_per_worker=max(1, cluster.cpus_per_node // cluster.workers_per_node),
        dtype=dtype,
        attn_implementation=attention,
        liger_kernel=liger,
        zero_stage=stage,
        offload_optimizer=parallel.offload_optimizer,
        offload_param=parallel.offload_param,
        zero_init=zero_init,
        leaf_modules=leaf,
        gradient_checkpointing=bool(checkpointing),
        checkpoints_on_host=checkpointing == "offload" and cuda,
        loss=loss,
        nvme_path=parallel.nvme_path,
    )
    return layout, notes


CPU_DORA = "peft 0.21 puts a new weight in place of a 4-bit one's shard on a CPU, each time DoRA norms it"


def trains_sharded_on_cpu(recipe: Recipe) -> bool:
    """Whether ZeRO-3 works with the method on CPU workers (peft/utils/integrations.py, dequantize_module_weight)."""
    return not (isinstance(recipe.method, QLora) and recipe.method.dora)


def _choose_dtype(recipe: Recipe, cluster: Cluster, notes: list[str]) -> Dtype:
    wanted, cuda = recipe.model.dtype, cluster.accelerator == "cuda"
    if wanted == "fp16" and not cuda:
        raise RecipeError([Fault("plan", "model.dtype", "fp16 needs a GPU, and this cluster has none", "use auto, fp32 or bf16")])
    if wanted == "bf16" and cuda and not cluster.bf16:
        raise RecipeError([Fault("plan", "model.dtype", f"{cluster.device_name} does not compute in bf16", "use auto, fp16 or fp32")])
    if wanted != "auto":
        return wanted
    chosen: Dtype = "bf16" if cluster.bf16 else "fp16" if cuda else "fp32"
    notes.append(
        f"dtype: {chosen} (what a {cluster.device_name or cluster.accelerator} {'with' if cluster.bf16 else 'without'} native bf16 trains in)"
    )
    return chosen


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
