"""How long a run took from a failure to its next step, and where that time went."""

from __future__ import annotations

from launcher.run import Event

FIRST_STEP = "first step"


class Recovery:
    """A stopwatch that listens to what the driver says: each phase is a stage, the first step is the end.

    It starts at the last sign of life of the group that failed, `alive_at` (s, monotonic): what lies between that and the
    restart is how long the failure took to be noticed. Failures on the way to the next step belong to the same recovery.
    """

    def __init__(self, alive_at: float, step: int) -> None:
        self.step = step
        self._began: list[tuple[str, float]] = [("noticing", alive_at)]

    def note(self, event: Event, now: float) -> Event | None:
        """Count an event that was said at `now`; at the first step, the event `recovered` that tells of it all."""
        kind = event["event"]
        if kind in ("phase", "waiting", "start"):
            self._begin({"waiting": "waiting for nodes", "start": FIRST_STEP}.get(kind) or str(event["name"]), now)
        if kind != "step":
            return None
        ends = [at for _, at in self._began[1:]] + [now]
        stages: dict[str, float] = {}
        for (name, at), end in zip(self._began, ends, strict=True):
            stages[name] = stages.get(name, 0.0) + end - at
        again = max(0, self.step - event["step"] + 1)
        return {
            "event": "recovered",
            "step": event["step"],
            "steps_again": again,
            "recovery_s": now - self._began[0][1],
            "stages_s": stages,
        }

    def _begin(self, stage: str, now: float) -> None:
        if stage != self._began[-1][0]:
            self._began.append((stage, now))
