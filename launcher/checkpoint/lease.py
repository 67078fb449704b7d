"""Who writes to a run's checkpoints: one process at a time, told by a heartbeat on the storage itself.

A storage may be a bucket, so no lock of a kernel helps. The owner rewrites OWNER.json every few seconds; who finds
another's looks whether that process is alive (on its own machine), or whether the heartbeat moves (on another).
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from typing import Any

from launcher.checkpoint.storage import Storage
from launcher.errors import CheckpointError

OWNER = "OWNER.json"
BEAT_S = 3.0
PATIENCE_S = 12.0
"""How long a heartbeat may rest before its owner counts as gone: some beats may be late."""
SETTLE_S = 0.3
"""Two that start at once both write; the later write stays, and both see it after this time."""


class Lease:
    """Holds the right to write below a storage, from `take` to `release`."""

    def __init__(self, storage: Storage, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S) -> None:
        self._storage, self._beat_s, self._patience_s = storage, beat_s, patience_s
        self.token = secrets.token_hex(8)
        self._beat, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="checkpoint-lease")

    def take(self) -> None:
        """Raises CheckpointError where another run that lives holds it; one that died is followed at once, or after PATIENCE_S."""
        owner = _load_owner(self._storage)
        if owner and self._is_alive(owner):
            raise CheckpointError(
                f"another run writes to {self._storage.url}: process {owner['pid']} on {owner['host']}",
                "wait for it or stop it; to start a second run beside it, add --fresh",
            )
        self._write()
        time.sleep(SETTLE_S)
        self.check()
        self._thread.start()

    def check(self) -> None:
        """Raises CheckpointError where another took the lease meanwhile: what we would write now could harm it."""
        owner = _load_owner(self._storage)
        if owner is None or owner["token"] != self.token:
            who = f"process {owner['pid']} on {owner['host']}" if owner else "somebody removed OWNER.json, or another run"
            raise CheckpointError(f"{who} took over {self._storage.url}", "only one run may write there")

    def release(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        owner = _load_owner(self._storage)
        if owner and owner["token"] == self.token:
            self._storage.delete(OWNER)

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        here = _lives_here(owner)
        if here is False:
            return False
        # Alive here, or on a host we cannot look into. A worker whose launcher was killed ends within seconds: let it.
        deadline = time.monotonic() + self._patience_s
        while time.monotonic() < deadline:
            time.sleep(self._beat_s / 6)
            now = _load_owner(self._storage)
            if now is None or _lives_here(now) is False:
                return False
            if (now["token"], now["beat"]) != (owner["token"], owner["beat"]) and here is None:
                return True
        return here is True

    def _keep(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                self.check()
                self._write()
            except (CheckpointError, OSError):
                continue  # check() before the next commit says so where it matters

    def _write(self) -> None:
        self._beat += 1
        facts = {"token": self.token, "beat": self._beat, "host": platform.node(), "boot": _boot_id(), "pid": os.getpid(), "born": _birth_of(os.getpid()), "time": time.time()}  # fmt: skip
        self._storage.write(OWNER, [json.dumps(facts).encode()])


def find_owner(storage: Storage) -> dict[str, Any] | None:
    """The owner on this machine that is alive, or one elsewhere that may be; None where nobody holds the lease."""
    owner = _load_owner(storage)
    return owner if owner and (_lives_here(owner) is not False) else None


def _load_owner(storage: Storage) -> dict[str, Any] | None:
    try:
        facts = json.loads(storage.read(OWNER))
    except (FileNotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) and {"token", "pid", "host", "boot", "born", "beat"} <= facts.keys() else None


def _lives_here(owner: dict[str, Any]) -> bool | None:
    """Whether the owner's process is alive; None where it is of another machine."""
    if owner["boot"] != _boot_id() or owner["host"] != platform.node():
        return None
    return bool(_birth_of(owner["pid"]) == owner["born"])


def _birth_of(pid: int) -> float | None:
    """When a process started: tells it from a later one of the same number."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def _boot_id() -> str:
    """Names this machine since it was started; host names repeat in clusters."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return platform.node()
