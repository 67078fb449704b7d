"""4-bit layers whose weights may lie in parts on several ranks.

bitsandbytes 0.50.2 hangs a view of the packed weight on its product's context (MatMul4Bit: `B.view(-1, 1)`, ctx.tensors), which lives as long as the loss
does. Under ZeRO-3 that is a view of the gathered weight: what is released is not freed, and by the end of a forward pass every rank holds the whole
model, 200 GB of a Llama-3.1-405B. Here a weight is its own view, so that the context holds the parameter, which ZeRO-3 gathers before either pass.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch


class SharedParams4bit(bnb.nn.Params4bit):  # type: ignore[misc, unused-ignore]  # bitsandbytes is not imported for types
    """A packed weight, a column already."""

    def view(self, *shape: Any) -> torch.Tensor:
        if shape == (-1, 1) and self.dim() == 2 and self.shape[1] == 1:
            return self
        viewed: torch.Tensor = super().view(*shape)
        return viewed
