"""How the driver speaks to whoever is attached: one JSON object a line in the job's log, numbered.

The log is Ray's: it can be read from its start at any time, and cut off at any time. The numbers let a reader
that was cut off go on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

from launcher import errors
from launcher.errors import Fault, LauncherError, RecipeError
from launcher.run import Event

MARK = "@lepton "
STEPS_EVERY_S = 0.5
"""The log shows no more steps than this; metrics.jsonl on the storage has all."""
WAITS_EVERY_S = 5.0


class Speaker:
    """Prints events. Of those that come too often, the last counts."""

    def __init__(self) -> None:
        self._number = 0
        self._said_at: dict[str, float] = {}
        self._waiting = ""

    def say(self, event: Event) -> None:
        kind = event["event"]
        if kind == "step" and event["step"] not in (1, event["total_steps"]) and not self._is_due(kind, STEPS_EVERY_S):
            return
        if kind == "waiting" and event["text"] == self._waiting and not self._is_due(kind, WAITS_EVERY_S):
            return
        self._waiting = event["text"] if kind == "waiting" else ""
        self._said_at[kind] = time.monotonic()
        self._number += 1
        print(MARK + json.dumps({**event, "number": self._number}), flush=True)

    def _is_due(self, kind: str, every_s: float) -> bool:
        return time.monotonic() - self._said_at.get(kind, 0.0) >= every_s


def read_message(line: str) -> Event | None:
    """The event of a line of the job's log; None for what something else printed there, or half a line."""
    if not line.startswith(MARK):
        return None
    try:
        event: Event = json.loads(line.removeprefix(MARK))
    except ValueError:
        return None
    return event


def make_result(error: LauncherError | None) -> Event:
    """The event that ends a run: how it ended, and the error whole."""
    if error is None:
        return {"event": "result", "exit_code": 0}
    faults = [dataclasses.asdict(fault) for fault in error.faults] if isinstance(error, RecipeError) else []
    facts = {"error": type(error).__name__, "message": error.message, "remedy": error.remedy, "faults": faults}
    return {"event": "result", "exit_code": error.exit_code, **facts}


def make_error(result: Event) -> LauncherError | None:
    """The error of a result event, as it was raised there; None for a run that finished."""
    if result["exit_code"] == 0:
        return None
    if result["faults"]:
        return RecipeError([Fault(**fault) for fault in result["faults"]])
    kinds: dict[str, Any] = vars(errors)
    kind: type[LauncherError] = kinds.get(result["error"], LauncherError)
    return kind(result["message"], result["remedy"])
