"""What a run knows of itself between steps: values, no behaviour."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Counts are of finished optimizer steps. `samples_seen` is the data cursor, at any world size."""

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    evaluations_since_best: int = 0
    train_s: float = 0.0
    """Seconds of training so far, over all sessions of the run; set when it is saved."""

    def after_step(self, samples: int, tokens: int) -> TrainState:
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + samples, tokens_seen=self.tokens_seen + tokens)

    def after_evaluation(self, loss: float, min_delta: float) -> TrainState:
        if loss < self.best_loss - min_delta:
            return replace(self, best_loss=loss, best_step=self.step, evaluations_since_best=0)
        return replace(self, evaluations_since_best=self.evaluations_since_best + 1)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def read_state(facts: dict[str, Any]) -> TrainState:
    known: dict[str, Any] = {name: math.inf if value is None else value for name, value in facts.items()}
    return TrainState(**known)
