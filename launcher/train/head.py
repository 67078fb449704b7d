"""A head that gives the loss in place of logits, so that all logits are never there at once.

Shapes: R rows (kept positions of all samples), H hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from launcher.errors import ModelError
from launcher.plan.losses import LOSS_CHUNK
from launcher.train.encode import IGNORED

FusedLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Summed cross-entropy of hidden_RH, the head's weight_VH, targets_R and the head's bias_V."""


class LossHead(torch.nn.Linear):
    """The model's own output layer, with its weight. Where `targets_R` are set, calling it gives their summed cross-entropy, in fp32.

    The loss is made inside of the layer's call because that is when ZeRO-3 holds its weight whole, forward and backward.
    """

    def __init__(self, head: torch.nn.Linear, fused: FusedLoss | None) -> None:
        with torch.device("meta"):
            super().__init__(head.in_features, head.out_features, bias=head.bias is not None)
        self.weight, self.bias, self.fused = head.weight, head.bias, fused
        self.targets_R: torch.Tensor | None = None
        self.train(head.training)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.targets_R is None:
            return super().forward(hidden_states)
        hidden_RH = hidden_states.flatten(0, -2)
        if self.fused is None:
            return self._sum_chunks(hidden_RH, self.targets_R)
        if torch.is_grad_enabled() and not hidden_RH.requires_grad:
            # Liger makes no gradient at all where its input needs none: a head that is trained alone would stay as it is.
            hidden_RH = hidden_RH.detach().requires_grad_()
        return self.fused(hidden_RH, self.weight, self.targets_R, self.bias)

    def _sum_chunks(self, hidden_RH: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
        """A chunk's logits go when its loss is there, and are made again for its backward."""
        total = hidden_RH.new_zeros((), dtype=torch.float32)
        for hidden_CH, targets_C in zip(torch.split(hidden_RH, LOSS_CHUNK), torch.split(targets_R, LOSS_CHUNK), strict=True):
            total = total + checkpoint(self._sum_chunk, hidden_CH, targets_C, use_reentrant=False)
        return total

    def _sum_chunk(self, hidden_CH: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden_CH, self.weight, self.bias).float(), targets_C, ignore_index=IGNORED, reduction="sum")


def load_fused_loss() -> FusedLoss:
    """Liger's kernel. Raises ModelError where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError("model.loss liger: liger-kernel is not installed here", "pip install liger-kernel, or set model.loss to chunked")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def sum_loss(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, targets_R: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
        loss: torch.Tensor = liger_fused_linear_cross_entropy(
            hidden_RH, weight_VH, targets_R, bias_V, ignore_index=IGNORED, reduction="sum"
        )
        return loss

    return sum_loss


def put_loss_into_head(model: Any, kernel: str, fused: FusedLoss | None = None) -> None:
    """Replace the model's output layer by one that can give the loss. Raises ModelError where it is no plain linear layer, or Liger is missing.

    `fused` stands for Liger's kernel where there is one to stand for it.
    """
    if kernel == "liger" and fused is None:
        fused = load_fused_loss()
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        found = "no output layer" if head is None else f"a {type(head).__name__} as its output layer"
        raise ModelError(f"model.loss {kernel}: {type(model).__name__} has {found}, and it takes a linear one", "set model.loss to plain")
    model.set_output_embeddings(LossHead(head, fused if kernel == "liger" else None))
