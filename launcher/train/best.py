"""The best weights so far, kept in host memory: each rank its own trained parameters, or its shards of them."""

from __future__ import annotations

from typing import Any

import torch


def copy_trained(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's trained weights, on the CPU."""
    return {name: _local(p).detach().to("cpu", copy=True) for name, p in engine.module.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_trained(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put copied weights back for evaluation and export. Optimizer masters stay behind: no step may follow."""
    for name, parameter in engine.module.named_parameters():
        if name in weights:
            _local(parameter).copy_(weights[name])
            # A small parameter that ZeRO-3 keeps gathered has a full copy beside its shard.
            if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
                parameter.all_gather()


def _local(parameter: torch.nn.Parameter) -> torch.Tensor:
    shard: torch.Tensor = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
    return shard
