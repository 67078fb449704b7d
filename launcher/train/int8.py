"""LLM.int8() layers whose weights may lie in parts on several ranks.

bitsandbytes 0.50.2 keeps a second reference to a layer's int8 weight (MatmulLtState.CB, which forward and backward multiply with), so that what
ZeRO-3 releases is not freed: every rank would go on holding the whole model. Here the state has none of its own. It gives what the
parameter holds at the moment, and ZeRO-3 gathers that before either pass.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn


class _State(bnb.MatmulLtState):  # type: ignore[misc, unused-ignore]  # bitsandbytes is not imported for types
    """The int8 weight as its parameter has it now, and the scales of its rows, which stay whole."""

    def __init__(self, weight: bnb.nn.Int8Params, scales: torch.Tensor, threshold: float) -> None:
        self.weight = weight
        super().__init__(SCB=scales)
        self.threshold, self.has_fp16_weights, self.use_pool = threshold, False, threshold > 0

    @property
    def CB(self) -> Any:
        return self.weight.data

    @CB.setter
    def CB(self, value: torch.Tensor | None) -> None:
        """bitsandbytes writes back what it has read, and None at the start."""


def quantise_to_int8(linear: nn.Linear, threshold: float, device: str) -> Any:
    """The layer in 8 bits on the device. It comes on the CPU: bitsandbytes quantises a weight that is moved."""
    with torch.device("meta"):
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=threshold
        )
    weight: Any = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False).to(device)
    layer.state = _State(weight, weight.SCB, threshold)
    weight.CB = weight.SCB = None  # or the first forward pass would take them for its state
    layer.weight = weight
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    return layer
