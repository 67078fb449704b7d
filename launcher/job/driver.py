"""The head's side of a run on a cluster: `python -m launcher.job.driver SUBMISSION`, started by Ray Jobs in the run's package.

It makes or reads the plan, waits for nodes, looks at them, trains, and starts the group again when machines fail.
Each line it prints is an event (messages.py); whoever is attached reads them, now or later.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import secrets as random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.errors import DataError, LauncherError, Stopped
from launcher.job.capacity import describe_places, find_fitting, holding_nodes, load_nodes, make_need, wait_for_nodes
from launcher.job.group import Group, GroupFailed, ask_to_stop, end_workers, naming_losses, run_group, start_spares, start_workers
from launcher.job.lines import HOLD_S, Merger, format_origin
from launcher.job.messages import Speaker, make_result
from launcher.job.package import GIVEN, Order, load_order, load_secrets
from launcher.job.policy import Failure, GiveUp, count_failure, decide
from launcher.job.preflight import check_reports, meeting_folder
from launcher.job.recovery import Recovery
from launcher.job.worker import News
from launcher.plan import Plan, make_plan
from launcher.resuming import Choice, choose_run, continue_plan, open_run_folder
from launcher.run import Event, RunFolder, hold_run, write_status

STOP_KEY = "lepton-launch/stop/{submission}"
"""Where `lepton-launch stop --grace` leaves its word, in Ray's key-value store: a word that comes late is not the next submission's."""
LOOK_S = 2.0
"""How often the driver looks at the cluster while a group trains."""
GROW_AFTER_S = 15.0
"""How long more nodes must have been there before a smaller run is restarted on them."""
PLACE_TIMEOUT_S = 60.0
SPARE_AFTER_S = 15.0
"""A group that has stepped for so long gets spares; a shorter run would only be slowed by them."""


def main() -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    order, secrets = load_order(Path.cwd()), load_secrets(Path.cwd())
    speaker, wish = Speaker(), StopWish(sys.argv[1])
    try:
        plan, choice = begin(order)
        speaker.say({"event": "plan", "plan": plan.to_dict()})
        if not order.dry_run:
            _run(plan, choice, secrets, speaker, wish)
    except LauncherError as error:
        speaker.say(make_result(error))
        raise SystemExit(error.exit_code) from None
    except Exception as error:  # noqa: BLE001  the boundary: who is attached must hear of it
        traceback.print_exc()
        speaker.say(make_result(LauncherError(f"{type(error).__name__}: {error}", "the traceback is in the job's log")))
        raise SystemExit(1) from None
    speaker.say(make_result(None))


def begin(order: Order) -> tuple[Plan, Choice]:
    """The plan, and the run folder it goes on in: the unfinished run's of that name, or a new one."""
    recipe = order.load_recipe()
    choice = choose_run(recipe, fresh=order.fresh or bool(order.resume))
    plan = dataclasses.replace(order.make_plan(), run_dir=str(choice.path))  # its recipe has no auto left
    return continue_plan(plan, choice, resume=order.resume or None, allow_changed=order.allow_changed), choice


def _run(plan: Plan, choice: Choice, secrets: dict[str, str], speaker: Speaker, wish: StopWish) -> None:
    import ray

    folder = open_run_folder(choice, plan.recipe)
    with hold_run(folder):
        _fill_folder(folder, plan)
        if choice.note:
            speaker.say({"event": "note", "text": choice.note})
        secrets = {**{name: os.environ[name] for name in plan.cluster.ray.secrets if name in os.environ}, **secrets}
        speaker.say({"event": "phase", "name": "joining the cluster"})
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False)
        signal.signal(signal.SIGTERM, wish.note_signal)  # after Ray, which puts its own handlers there
        try:
            Supervisor(ray, plan, folder, choice.newest.step if choice.newest else 0, secrets, speaker, wish).run()
        except Stopped as error:
            with suppress(OSError):  # a full disk must not hide why the run ended
                write_status(folder, "stopped", message=error.message)
            raise
        except LauncherError as error:
            facts = {"error": type(error).__name__, "message": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
            with suppress(OSError):
                write_status(folder, "failed", **facts)
            raise
        finally:
            ray.shutdown()
        write_status(folder, "finished")


def _fill_folder(folder: RunFolder, plan: Plan) -> None:
    """Write the recipe as it was given, the plan, and that the run runs. Raises DataError where the storage is full or read-only."""
    try:
        shutil.copy(GIVEN, folder.recipe)
        plan.save(folder.plan)
        write_status(folder, "running", pid=os.getpid(), host=platform.node())
    except OSError as error:
        raise DataError(
            f"the run folder {folder.path} cannot be written, seen from the head: {error.strerror}",
            "free space on the storage, or name another with --storage",
        ) from None


class StopWish:
    """Whether somebody wants the run to end, and by when: a signal (Ray's stop), or a word in Ray's key-value store."""

    def __init__(self, submission: str) -> None:
        self._key = STOP_KEY.format(submission=submission).encode()
        self.asked_at: float | None = None
        self.grace_s: float | None = None

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked_at = self.asked_at or time.monotonic()

    def look(self) -> None:
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

        word = _internal_kv_get(self._key)
        if word is not None:
            _internal_kv_del(self._key)
            self.asked_at, self.grace_s = self.asked_at or time.monotonic(), float(word)


class Supervisor:
    """Groups of one run, one after the other, until the run ends."""

    def __init__(
        self, ray: Any, plan: Plan, folder: RunFolder, committed: int, secrets: dict[str, str], speaker: Speaker, wish: StopWish
    ) -> None:
        self.ray, self.plan, self.folder, self.committed = ray, plan, folder, committed
        self.secrets, self.speaker, self.wish = secrets, speaker, wish
        self.sizes = find_sizes(plan)
        self.failures: list[Failure] = []
        self.merger = Merger()
        self.spares: list[Any] = []
        self.held: set[str] = set()
        self.leaving = ""
        self.looked_at = self.roomy_since = 0.0
        self.recovery: Recovery | None = None

    def run(self) -> None:
        """Raises what ended the run, if it is not done."""
        while not self._run_placed():
            self._say({"event": "phase", "name": "looking for nodes"})

    def _after(self, failure: Failure, alive_at: float) -> None:
        """Return to try again; raises what the run ends with."""
        if isinstance(failure.error, Stopped) or self.wish.asked_at is not None:
            if self.wish.asked_at is not None:
                raise failure.error if isinstance(failure.error, Stopped) else Stopped(_stopped_anyway(failure)) from None
            self._say({"event": "note", "text": f"{self.leaving}: the run saved at step {self.committed or failure.step} and goes on"})
            return
        self.failures = count_failure(self.failures, failure)
        decision = decide(self.failures)
        if isinstance(decision, GiveUp):
            raise decision.error
        self.recovery = self.recovery or Recovery(alive_at, failure.step)
        self._say({"event": "restart", "text": decision.why, "step": failure.step, "committed": failure.committed})
        deadline = time.monotonic() + decision.pause_s
        while time.monotonic() < deadline:
            self._check_wish()
            time.sleep(0.5)

    def _run_placed(self) -> bool:
        """Place groups on the nodes there are, one after the other; whether the run is done. False to look for nodes again."""
        options = self.plan.cluster.ray
        smallest = dataclasses.replace(make_need(self.plan), nodes=self.sizes[0])
        size = wait_for_nodes(self.ray, smallest, self.sizes, options.capacity_timeout_s, self._tell_waiting, self._check_wish)
        plan = resize(self.plan, size)
        with holding_nodes(self.ray, make_need(plan), PLACE_TIMEOUT_S) as bundles:
            seats = [options for options in bundles.values() for _ in range(plan.layout.workers_per_node)]
            self.held = set(bundles)
            try:
                while True:
                    try:
                        self._run_group(plan, seats)
                        return True
                    except GroupFailed as failed:
                        self._after(dataclasses.replace(failed.failure, committed=self.committed), failed.alive_at)
                        if self.leaving or not self._nodes_are_there():
                            return False
            finally:
                end_workers(self.ray, self.spares)
                self.spares = []

    def _run_group(self, plan: Plan, seats: list[dict[str, Any]]) -> None:
        """One group, from its start to its end, on nodes that are held."""
        self._say({"event": "phase", "name": "starting workers"})
        spares, self.spares = self.spares, []
        group = start_workers(self.ray, plan, seats, self.secrets, spares, self._nodes_are_there)
        self.leaving, self.roomy_since = "", 0.0
        try:
            self._say({"event": "note", "text": f"workers: {describe_places(group.hosts)}"})
            with naming_losses(group):
                self._look_at_nodes(plan, group)
            plan.save(self.folder.plan)
            self._say({"event": "phase", "name": "forming the group"})
            run_group(self.ray, group, plan, self._show, partial(self._hear, group), partial(self._watch, plan, seats))
        finally:
            self._say_lines(group, time.monotonic() + HOLD_S)
            end_workers(self.ray, group.workers)

    def _nodes_are_there(self) -> bool:
        """Whether every node that is held for the run still lives."""
        return self.held <= {node.node for node in load_nodes(self.ray) if not node.draining}

    def _look_at_nodes(self, plan: Plan, group: Group) -> None:
        """Preflight: every node answers for itself before anything trains on it."""
        self._say({"event": "phase", "name": "looking at the nodes"})
        nonce = random.token_hex(4)
        folder = meeting_folder(plan, nonce)
        folder.mkdir()
        try:
            (folder / "driver").write_text("here", encoding="utf-8")
            firsts = group.workers[:: plan.layout.workers_per_node]
            reports = self.ray.get([worker.report.remote(plan, nonce) for worker in firsts], timeout=PLACE_TIMEOUT_S)
            check_reports(plan, reports, {path.name for path in folder.iterdir()}, time.time())
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _tell_waiting(self, missing: str, left_s: float) -> None:
        self._say({"event": "waiting", "text": missing, "left_s": left_s})

    def _check_wish(self) -> None:
        self.wish.look()
        if self.wish.asked_at is not None:
            raise Stopped("stopped before it trained", "the same command starts it again")

    def _say(self, event: Event) -> None:
        self.speaker.say(event)
        if self.recovery and (recovered := self.recovery.note(event, time.monotonic())):
            self.recovery = None
            self.speaker.say(recovered)

    def _show(self, event: Event) -> None:
        if event["event"] == "checkpoint":
            self.committed = max(self.committed, int(event["step"]))
        self._say(event)

    def _hear(self, group: Group, rank: int, news: News) -> None:
        """Pass on what workers print, once for all that print the same."""
        now = time.monotonic()
        self.merger.add(rank, news.lines, now)
        self._say_lines(group, now)
        if news.noise:
            text, origin = "\n".join(news.noise), format_origin((rank,), dict(enumerate(group.hosts)))
            self._say({"event": "log", "origin": origin, "ranks": (rank,), "text": text, "quiet": True})

    def _say_lines(self, group: Group, now: float) -> None:
        hosts = dict(enumerate(group.hosts))
        for line in self.merger.take(now):
            self._say({"event": "log", "origin": format_origin(line.ranks, hosts), "ranks": line.ranks, "text": line.text})

    def _watch(self, plan: Plan, seats: list[dict[str, Any]], group: Group) -> None:
        """At each turn while a group trains: does somebody, or the cluster, want it to save and end?"""
        now = time.monotonic()
        if plan.cluster.ray.spare_workers and not self.spares and group.stepping_since and now - group.stepping_since > SPARE_AFTER_S:
            self.spares = start_spares(self.ray, plan, seats, self.secrets, group)
        if now - self.looked_at >= LOOK_S:
            self.looked_at = now
            self.wish.look()
            self._look_at_cluster(group, plan.layout.nodes, now)
        if self.wish.asked_at is not None:
            self._leave(group, "asked to stop")
            grace_s = self.plan.cluster.ray.stop_grace_s if self.wish.grace_s is None else self.wish.grace_s
            if now - self.wish.asked_at > grace_s:
                error = Stopped(f"stopped after step {group.step}: it did not save within {grace_s:.0f} s", _continues(self.committed))
                raise GroupFailed(Failure(error=error, kind="error", step=group.step))

    def _look_at_cluster(self, group: Group, size: int, now: float) -> None:
        nodes = load_nodes(self.ray)
        ours = {place.node: place.host for place in group.places}
        going = sorted({ours[node.node] for node in nodes if node.draining and node.node in ours})
        if going:
            self._leave(group, f"{', '.join(going)} is about to go")
        need = make_need(self.plan)
        room = sum(node.node in ours for node in nodes) + sum(node.node not in ours for node in find_fitting(nodes, need))
        if not any(bigger <= room for bigger in self.sizes if bigger > size):
            self.roomy_since = 0.0
        elif not self.roomy_since:
            self.roomy_since = now
        elif now - self.roomy_since > GROW_AFTER_S and group.step:
            self._leave(group, f"there is room for {max(bigger for bigger in self.sizes if bigger <= room)} nodes")

    def _leave(self, group: Group, why: str) -> None:
        """Have the group save and end, once."""
        if self.leaving:
            return
        self.leaving = why
        self._say({"event": "note", "text": f"{why}: saving"})
        ask_to_stop(group)


def _stopped_anyway(failure: Failure) -> str:
    return f"stopped; the group failed while it was to save: {failure.error.message}"


def _continues(committed: int) -> str:
    return f"the same command continues from step {committed}" if committed else "the same command starts it again"


def resize(plan: Plan, nodes: int) -> Plan:
    """The plan on another number of nodes, with the same global batch. Raises RecipeError where that does not divide."""
    if nodes == plan.layout.nodes:
        return plan
    cluster = plan.cluster.model_copy(update={"nodes": nodes})
    resized = make_plan(plan.recipe, cluster, base_dir=plan.base_dir, run_dir=plan.run_dir)
    return dataclasses.replace(resized, resume=plan.resume, allow_changed=plan.allow_changed)


def find_sizes(plan: Plan) -> Sequence[int]:
    """The numbers of nodes that the run may have, the most first: those over which its batch divides and on which it fits."""
    most, least = plan.layout.nodes, plan.cluster.ray.min_nodes or plan.layout.nodes
    sizes = []
    for nodes in range(most, least - 1, -1):
        try:
            resized = resize(plan, nodes)
        except LauncherError:
            continue
        if nodes == most or resized.memory.device("total").p50 <= resized.memory.budget:
            sizes.append(nodes)
    return sizes


if __name__ == "__main__":
    main()
