"""Other shapes of a run, and what in cluster/ can be run without the clouds it is for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import TOKEN, environment, events_of, lepton, losses_of, run_folder, status_of, write_recipe
from hosts import HOME, STORAGE, Network, why_not
from rayhosts import QUICK_TO_NOTICE, RayHosts

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
OPTIONS = ("--storage", f"{STORAGE}/runs")


def test_two_workers_a_node_and_a_label(ray_hosts: RayHosts, tmp_path: Path) -> None:
    """Two labelled hosts with two CPUs each: ranks, local ranks, the group's address, and the losses of four hosts."""
    for number in (5, 6):
        host = ray_hosts.network.add(number, **ray_hosts.environment)
        ray_hosts.start_worker(host, "--labels=rack=b", "--num-cpus=2")
    try:
        ray_hosts.wait_for_nodes(6)
        whole = lepton(ray_hosts.address, str(write_recipe(tmp_path, "four", steps=8)), "--nodes", "4", "--workers", "1", *OPTIONS)
        assert whole.returncode == 0, whole.stdout + whole.stderr
        recipe = str(write_recipe(tmp_path, "pairs", steps=8))
        done = lepton(ray_hosts.address, recipe, "--nodes", "2", "--workers", "2", "--label", "rack=b", *OPTIONS)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "workers: node5 ranks 0-1, node6 ranks 2-3" in done.stdout
    finally:
        for host in ray_hosts.network.hosts[-2:]:
            host.kill()
    folder = run_folder(ray_hosts.storage, "pairs")
    assert losses_of(folder) == pytest.approx(losses_of(run_folder(ray_hosts.storage, "four")), abs=1e-5)
    seen = [(folder.log(rank)).read_text().splitlines()[0] for rank in range(4)]
    master = re.search(r"MASTER_ADDR=(\S+) MASTER_PORT=(\d+)", seen[0])
    assert master is not None and master[1].endswith(".5")
    for rank, line in enumerate(seen):
        assert (
            f"node{5 + rank // 2}: RANK={rank} WORLD_SIZE=4 LOCAL_RANK={rank % 2} LOCAL_WORLD_SIZE=2 {master[0]} GLOO_SOCKET_IFNAME=eth0"
            in line
        )


def test_a_secret_reaches_no_file_no_list_and_no_log(ray_hosts: RayHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray_hosts.wait_for_nodes(4)
    value = "s3cret-value-9f3a77"
    monkeypatch.setenv("LEPTON_TEST_SECRET", value)
    # A Python that tells, in a rank's log, how long the secret is that it was given: proof that it came, not what it is.
    done = lepton(
        ray_hosts.address, str(write_recipe(tmp_path, "discreet")), "--nodes", "4", *OPTIONS, "--secret", "LEPTON_TEST_SECRET"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folder = run_folder(ray_hosts.storage, "discreet")
    assert f"secrets: LEPTON_TEST_SECRET ({len(value)} characters)" in folder.log(3).read_text()
    said = [
        done.stdout,
        done.stderr,
        *(lepton(ray_hosts.address, *words).stdout for words in (["list", "--json"], ["logs", "discreet", "--json"])),
    ]
    assert not any(value in text for text in said)
    assert not [path for path in folder.path.rglob("*") if path.is_file() and value.encode() in path.read_bytes()]
    jobs = ray_hosts.head.run("ray", "job", "list", f"--address={ray_hosts.address}")
    assert value not in jobs
    for host in ray_hosts.network.hosts:
        left = subprocess.run(["grep", "-rl", value, str(host.files / "tmp")], capture_output=True, text=True, check=False).stdout
        packages = [line for line in left.splitlines() if "working_dir_files" not in line]
        assert not packages, packages


def test_no_op_is_compiled_on_any_host(ray_hosts: RayHosts, tmp_path: Path) -> None:
    """DeepSpeed's CPU ops need a compiler and leave locks behind when killed: a run uses none of them."""
    ray_hosts.wait_for_nodes(4)
    done = lepton(ray_hosts.address, str(write_recipe(tmp_path, "plain")), "--nodes", "4", *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    for host in ray_hosts.network.hosts:
        assert not (host.files / "home/.cache/torch_extensions").exists()


def test_smollm2_qlora_zero2_from_a_laptop(ray_hosts: RayHosts, tmp_path: Path) -> None:
    """The quickstart, unchanged, on four hosts: its data travels with it, its model is in a package of the image."""
    ray_hosts.wait_for_nodes(4)
    done = lepton(
        ray_hosts.address, str(ROOT / "recipes/quickstart.yaml"), "--nodes", "4", *OPTIONS,
        "batch.global_batch_size=4", "schedule.max_steps=8", "evaluate.samples=[]", timeout_s=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folder = run_folder(ray_hosts.storage, "quickstart")
    evals = {event["when"]: event["loss"] for event in events_of(folder) if event["event"] == "eval"}
    assert evals["after"] < evals["before"], evals
    assert (folder.model / "adapter_model.safetensors").is_file()
    plan = json.loads(folder.plan.read_text())
    assert (plan["layout"]["nodes"], plan["layout"]["zero_stage"], plan["recipe"]["method"]["kind"]) == (4, 2, "qlora")
    print(done.stdout)


@pytest.fixture
def two_hosts(tmp_path: Path, tiny: Path) -> Iterator[Network]:
    """Two hosts with no Ray on them, whose login shells have the environment on their PATH."""
    if reason := why_not():
        pytest.skip(reason)
    shutil.copytree(tiny, tmp_path / "storage/tiny")
    network = Network(tmp_path, tmp_path / "storage")
    try:
        for number in (1, 2):
            host = network.add(number, **QUICK_TO_NOTICE)
            exports = "".join(f"export {name}='{value}'\n" for name, value in host.environment.items())
            (host.files / "home/.bash_profile").write_text(exports)
        yield network
    finally:
        network.close()


def stand_in(folder: Path, name: str, network: Network, body: str) -> Path:
    """A command that finds hosts by address or name and runs things on them, in place of ssh or srun."""
    path = folder / name
    hosts = "".join(f"  {host.address}|{host.name}) pid={host.pid} ;;\n" for host in network.hosts)
    lookup = f'find() {{ case $1 in\n{hosts}  *) echo "no host $1" >&2; exit 255 ;;\n  esac; }}\n'
    enter = f'enter() {{ nsenter -t "$pid" --net --pid --mount --uts -- env -i HOME={HOME} TERM=dumb "$@"; }}\n'
    path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{lookup}{enter}{body}")
    path.chmod(0o755)
    return path


def test_bare_hosts(two_hosts: Network, tmp_path: Path) -> None:
    ssh = stand_in(tmp_path, "ssh", two_hosts, 'find "$1"; shift; enter bash -c "$*"\n')
    head, worker = two_hosts.hosts
    token = tmp_path / "token"
    script = [str(ROOT / "cluster/bare-hosts.sh")]
    own = {
        **os.environ,
        "LEPTON_SSH": str(ssh),
        "LEPTON_TOKEN_FILE": str(token),
        "LEPTON_RAY_OPTIONS": "--num-cpus=1 --object-store-memory=80000000",
    }
    subprocess.run([*script, "up", head.address, worker.address], env=own, check=True, timeout=200)
    assert token.stat().st_mode & 0o077 == 0
    # The dashboard listens on the head's loopback alone: what ssh -L would do, a run on the head does here.
    recipe = write_recipe(tmp_path / "storage", "bare")
    command = [
        sys.executable,
        "-m",
        "launcher.cli",
        f"{STORAGE}/{recipe.name}",
        "--nodes",
        "2",
        "--cluster",
        "http://localhost:8265",
        *OPTIONS,
    ]
    outside = lepton(f"http://{head.address}:8265", "list", token=token.read_text())
    assert outside.returncode == 5 and "nothing answers" in outside.stderr
    login = ["bash", "-lc", f"RAY_AUTH_TOKEN={token.read_text()} " + " ".join(command)]
    said = head.run(*login, timeout_s=240)
    assert "6 steps" in said
    assert status_of(run_folder(two_hosts.storage, "bare"))["state"] == "finished"
    subprocess.run([*script, "down", head.address, worker.address], env=own, check=True, timeout=120)
    assert not head.processes("raylet/raylet") and not worker.processes("raylet/raylet")


def test_slurm(two_hosts: Network, tmp_path: Path) -> None:
    """The script under a stand-in for Slurm that runs a step on every host at once: `ray symmetric-run` is the real one."""
    bins = tmp_path / "bin"
    bins.mkdir()
    names = " ".join(host.name for host in two_hosts.hosts)
    passed = '"RAY_AUTH_MODE=${RAY_AUTH_MODE:-}" "RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-}"'
    step = 'bash -lc "exec $(printf "%q " "$@")"'
    stand_in(bins, "srun", two_hosts, f"""
nodes="{names}"
while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && nodes=${{1#--nodelist=}}; shift; done
pids=()
for node in $nodes; do find "$node"; enter {passed} {step} & pids+=($!); done
for one in "${{pids[@]}}"; do wait "$one"; done
""")  # fmt: skip
    stand_in(bins, "scontrol", two_hosts, f'printf "%s\\n" {names}\n')
    recipe = write_recipe(tmp_path / "storage", "batch")
    # Files that the hosts see, as they would on a cluster: this machine's view of the storage is not theirs.
    subprocess.run(["mount", "--bind", str(two_hosts.storage), str(mount_point())], check=True)
    try:
        done = subprocess.run(
            [str(ROOT / "cluster/slurm.sh"), f"{STORAGE}/{recipe.name}"],
            env={**environment(None), "PATH": f"{bins}:{os.environ['PATH']}:{Path(sys.executable).parent}", "SLURM_JOB_NODELIST": "node[1-2]",
                 "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "1", "SLURM_SUBMIT_DIR": str(tmp_path),
                 "LEPTON_STORAGE": f"{STORAGE}/runs"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    finally:
        subprocess.run(["umount", str(mount_point())], check=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 steps" in done.stdout
    assert status_of(run_folder(two_hosts.storage, "batch"))["state"] == "finished"
    assert not list((two_hosts.storage / "runs").glob(".token-*"))
    assert TOKEN not in done.stdout


def mount_point() -> Path:
    path = Path(STORAGE)
    path.mkdir(parents=True, exist_ok=True)
    return path
