"""What a run knows of itself between steps: values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Counts are of finished optimizer steps. `samples_seen` is the data cursor, at any world size."""

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    evaluations_since_best: int = 0

    def after_step(self, samples: int, tokens: int) -> TrainState:
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + samples, tokens_seen=self.tokens_seen + tokens)

    def after_evaluation(self, loss: float, min_delta: float) -> TrainState:
        if loss < self.best_loss - min_delta:
            return replace(self, best_loss=loss, best_step=self.step, evaluations_since_best=0)
        return replace(self, evaluations_since_best=self.evaluations_since_best + 1)
