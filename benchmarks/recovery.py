"""From a fault to the next step, and what is lost: lepton-launch beside plain Ray Train with HF Trainer, on the same four hosts.

    python benchmarks/recovery.py [--rounds 2] [--fault "worker killed"] [--system lepton-launch] [--out ...]      (as root)

The hosts are network namespaces of this machine (tests/cluster/hosts.py), so times are this machine's. For each fault a run
trains until it has stepped for a while, the fault strikes, and we wait for the next step of a new group. Both save every
SAVE_EVERY steps. `lost_steps` are steps that had been taken and were taken again; `lost_commits` is how many saves that
had been reported were not resumed from. The hosts know the names of each other's addresses, as with any working DNS: without
(--no-names), torch waits 10 s for one in each new process that connects (pytorch#159007).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/cluster"), str(ROOT)]

from commands import Attached, environment, events_of, lepton, run_folder, wait_until, write_recipe  # noqa: E402
from hosts import STORAGE, Host, has_open  # noqa: E402
from rayhosts import RayHosts, open_cluster  # noqa: E402
from tiny import write_conversations, write_model  # noqa: E402

STEPS, SAVE_EVERY, STRIKE_AT_S = 100_000, 20, 60.0
"""The fault strikes when the run has stepped for so long: spares are up by then, as they are in any run that lasts."""

MEASURED = ("seconds_to_step", "lost_steps", "lost_commits")
OUR_WORKER, THEIR_WORKER = "ray::Worker", "RayTrainWorker"


@dataclass(frozen=True, slots=True)
class Step:
    number: int
    time: float
    group: int


def kill_workers(host: Host, pattern: str) -> None:
    """Those that train: a spare, which has the same name, has no log open yet."""
    pids = [pid for pid in host.processes(pattern) if pattern != OUR_WORKER or has_open(pid, "/logs/rank-")]
    assert pids, f"no {pattern} on {host.name}"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kill_a_worker(hosts: RayHosts, pattern: str) -> None:
    kill_workers(hosts.host(3), pattern)


def lose_a_host(hosts: RayHosts, pattern: str) -> None:
    """The host is dead, and back as soon as the cluster has missed it."""
    hosts.host(3).kill()
    wait_until(lambda: hosts.count_nodes() == 3, 90, "the loss is noticed")
    hosts.switch_on(3)


FAULTS: dict[str, Callable[[RayHosts, str], None]] = {"worker killed": kill_a_worker, "host lost and back": lose_a_host}


def ours(hosts: RayHosts, folder: Path, name: str, fault: Callable[[RayHosts, str], None]) -> dict[str, Any]:
    recipe = write_recipe(folder, name, STEPS, f"save: {{every_steps: {SAVE_EVERY}}}\n")
    attached = Attached(hosts.address, str(recipe), "--nodes", "4", "--storage", f"{STORAGE}/runs")
    run = run_folder(hosts.storage, name)

    def steps() -> list[Step]:
        found, group = [], 0
        for event in events_of(run):
            group += event["event"] == "start"
            if event["event"] == "step":
                found.append(Step(event["step"], event["time"], group))
        return found

    def committed() -> int:
        return max((event["step"] for event in events_of(run) if event["event"] == "checkpoint"), default=0)

    try:
        found = measure(hosts, steps, committed, lambda: fault(hosts, OUR_WORKER))
        told = json.loads(lepton(hosts.address, "status", name, "--json").stdout)
        return {**found, "stages_s": {stage: round(seconds, 2) for stage, seconds in told["recovery_stages_s"].items()}}
    finally:
        attached.process.kill()
        lepton(hosts.address, "stop", name, "--grace", "5s")


def theirs(hosts: RayHosts, folder: Path, name: str, fault: Callable[[RayHosts, str], None]) -> dict[str, Any]:
    from ray.job_submission import JobSubmissionClient

    log = hosts.storage / "ray-train.jsonl"
    log.unlink(missing_ok=True)
    client = JobSubmissionClient(hosts.address)
    job = client.submit_job(
        entrypoint=f"python {ROOT}/benchmarks/ray_train_hf.py {STORAGE} {STEPS} {SAVE_EVERY} 4",
        runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": "eth0", "RAY_TRAIN_V2_ENABLED": "1"}},  # without the first, gloo finds 127.0.1.1
    )

    def steps() -> list[Step]:
        if not log.exists():
            return []
        groups: dict[int, int] = {}
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        return [Step(line["step"], line["time"], groups.setdefault(line["pid"], len(groups) + 1)) for line in lines]

    def committed() -> int:
        names = [path.name for path in (hosts.storage / "ray-train").glob("*/checkpoint_*")]
        return SAVE_EVERY * len(names)

    try:
        return measure(hosts, steps, committed, lambda: fault(hosts, THEIR_WORKER))
    finally:
        client.stop_job(job)
        wait_until(lambda: client.get_job_status(job).is_terminal(), 60, "the job ends")


SYSTEMS: dict[str, Callable[[RayHosts, Path, str, Callable[[RayHosts, str], None]], dict[str, Any]]] = {
    "lepton-launch": ours,
    "Ray Train + HF Trainer": theirs,
}


def measure(hosts: RayHosts, steps: Callable[[], list[Step]], committed: Callable[[], int], strike: Callable[[], None]) -> dict[str, Any]:
    wait_until(lambda: len(steps()) > 2 and steps()[-1].time - steps()[0].time > STRIKE_AT_S, 240, "the run steps")
    before, saved, struck = steps()[-1], committed(), time.time()  # ours takes back what was not committed: read it now
    strike()
    wait_until(lambda: steps()[-1].group > before.group, 300, "it steps again")
    after = next(step for step in steps() if step.group > before.group)
    resumed = after.number - 1
    return {
        "seconds_to_step": round(after.time - struck, 2),
        "lost_steps": before.number - resumed,
        "lost_commits": max(0, (saved - resumed) // SAVE_EVERY),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--fault", action="append", choices=list(FAULTS), help="only this one")
    options.add_argument("--system", action="append", choices=list(SYSTEMS), help="only this one; what the others came to stays in --out")
    options.add_argument("--no-names", action="store_true", help="a network on which nobody tells the name of an address")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/recovery-cpu.json")
    chosen = options.parse_args()
    os.environ |= {name: value for name, value in environment().items() if name.startswith("RAY_")} | {"RAY_AUTH_MODE": "token"}
    results: dict[str, dict[str, list[Any]]] = {}
    if (chosen.fault or chosen.system) and chosen.out.exists():
        results = json.loads(chosen.out.read_text())["rounds"]
    faults, systems = chosen.fault or list(FAULTS), chosen.system or list(SYSTEMS)
    for fault, who in itertools.product(faults, systems):
        results.setdefault(fault, {})[who] = []
    with tempfile.TemporaryDirectory(prefix="recovery-") as made:
        folder = Path(made)
        tiny = folder / "tiny"
        write_model(tiny / "model")
        write_conversations(tiny / "train.jsonl", 200, seed=1)
        write_conversations(tiny / "eval.jsonl", 20, seed=2)
        with open_cluster(folder / "hosts", tiny, names=not chosen.no_names) as hosts:
            for number in range(chosen.rounds):
                for fault, who in itertools.product(faults, systems):
                    hosts.wait_for_nodes(4)
                    load = round(os.getloadavg()[0], 1)
                    found = {**SYSTEMS[who](hosts, folder, f"r{number}-{fault.replace(' ', '-')}", FAULTS[fault]), "load_before": load}
                    results[fault][who].append(found)
                    print(f"{fault:<20} {who:<24} {found}", flush=True)
                    write_results(results, chosen.out)  # each time: what is measured stays, should the rest not come to its end
    print(json.dumps(json.loads(chosen.out.read_text())["median"], indent=2))


def write_results(results: dict[str, Any], out: Path) -> None:
    from launcher.versions import read_versions

    medians = {
        fault: {who: {key: statistics.median(one[key] for one in found) for key in MEASURED} for who, found in of.items() if found}
        for fault, of in results.items()
    }
    facts = {"machine": platform.platform(), "cores": os.cpu_count(), "versions": read_versions(), "save_every_steps": SAVE_EVERY, "strike_at_s": STRIKE_AT_S,
             "median": medians, "rounds": results}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
