"""Mixtures of experts on the tape (transformers 5.23, integrations/moe.py: grouped_mm)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.plan.tape import Tensor

if TYPE_CHECKING:
    from launcher.plan.decoder import Pass


def experts(run: Pass, block: dict[str, Any], hidden: Tensor) -> Tensor:
    raise NotImplementedError
