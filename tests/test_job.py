"""Whole runs through the command people type: embedded Ray, two workers, a tiny model; and how they end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import Ranks, fine_tune, losses

from launcher.plan import Plan, load_plan
from launcher.run import Event, RunFolder, read_events


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
name: tiny
model: {{name_or_path: {tiny}/model, dtype: fp32}}
method: {{kind: qlora, r: 4}}
data: {{train: {tiny}/train.jsonl, eval: {tiny}/eval.jsonl, seq_len: 64}}
batch: {{global_batch_size: 8}}
optim: {{lr: 3.0e-3}}
schedule: {{max_steps: 6}}
evaluate: {{samples: [lamp sea cat], max_new_tokens: 4}}
output_dir: {tmp_path}/runs
""")
    return path


def command(recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "launcher.cli", str(recipe), *words]


def start(recipe: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(recipe, *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Read until a line holds `text`."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"it ended without {text!r}:\n{seen}")


def session_of(process: subprocess.Popen[str]) -> set[int]:
    """The process and all that it started."""
    top = psutil.Process(process.pid)
    return {top.pid, *(child.pid for child in top.children(recursive=True))}


def alive(pids: set[int]) -> list[str]:
    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:100])
        except psutil.NoSuchProcess:
            continue
    return found


def assert_gone(pids: set[int], within_s: float = 15) -> None:
    deadline = time.monotonic() + within_s
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(pids) == []


def status(tmp_path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((tmp_path / "runs/tiny/status.json").read_text())
    return facts


@pytest.fixture
def other_ray(tmp_path: Path) -> Iterator[str]:
    """Somebody else's Ray on this machine."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    ray = str(Path(sys.executable).with_name("ray"))
    begin = [ray, "start", "--head", "--node-ip-address=127.0.0.1", "--port=27461", "--num-cpus=1", "--include-dashboard=false",
             "--object-store-memory=80000000", "--block"]  # fmt: skip
    process = subprocess.Popen(begin, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    check = [sys.executable, "-c", "import ray; ray.init('127.0.0.1:27461', log_to_driver=False); print('nodes', len(ray.nodes()))"]
    for _ in range(20):
        answer = subprocess.run(check, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if "nodes 1" in answer.stdout:
            break
        time.sleep(1)
    assert "nodes 1" in answer.stdout, answer.stderr
    yield "27461"
    still = subprocess.run(check, env=environment, capture_output=True, text=True, timeout=60, check=False)
    started = session_of(process)
    process.terminate()
    process.wait(30)
    for pid in started:
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()
    assert "nodes 1" in still.stdout, "the other Ray did not survive"


def test_a_run_from_recipe_to_adapter_beside_another_ray(recipe: Path, tmp_path: Path, other_ray: str) -> None:
    token_before = (Path.home() / ".ray/auth_token").exists()
    process = start(recipe)
    seen = wait_for(process, "training:")
    pids = session_of(process)
    listening = {c.laddr.ip for pid in pids for c in connections(pid) if c.status == psutil.CONN_LISTEN}
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 0, seen + rest
    assert_gone(pids)
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert "perplexity" in rest and "lamp sea cat" in rest and "lepton-launch generate" in rest
    assert (Path.home() / ".ray/auth_token").exists() == token_before
    folder = RunFolder(tmp_path / "runs/tiny")
    assert status(tmp_path)["state"] == "finished"
    assert {p.name for p in folder.path.iterdir()} == {"recipe.yaml", "plan.json", "metrics.jsonl", "status.json", "checkpoints", "logs", "model", "report.md",
                                                       "loss.png", "trackers"}  # fmt: skip
    assert {p.name for p in folder.model.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    assert {oct(path.stat().st_mode & 0o777) for path in folder.model.iterdir()} == {"0o644"}, "others may read it"
    assert [p.name for p in sorted((folder.path / "logs").iterdir())] == ["rank-00000.log", "rank-00001.log"]
    assert list(folder.trackers.rglob("events.out.tfevents.*"))
    events = list(read_events(folder))
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def connections(pid: int) -> list[Any]:
    try:
        return list(psutil.Process(pid).net_connections("inet"))
    except psutil.NoSuchProcess:
        return []


def test_ctrl_c_ends_it_with_130_and_nothing_left(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, "schedule.max_steps=5000", "schedule.epochs=500")
    wait_for(process, "/5000")
    pids = session_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert_gone(pids)
    assert status(tmp_path)["state"] == "stopped"
    assert not (tmp_path / "runs/tiny/model").exists()
    assert "Traceback" not in rest


def test_sigterm_ends_it_with_6(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, "schedule.max_steps=5000", "schedule.epochs=500")
    wait_for(process, "reading data")
    pids = session_of(process)
    process.terminate()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 6, rest
    assert_gone(pids)


def train_unbroken(me: Any, plan: Plan) -> list[Event]:
    """Job: fine_tune with as many threads as a worker of the plan has; their number decides in which order sums are taken."""
    import torch

    torch.set_num_threads(plan.layout.threads_per_worker)
    try:
        return fine_tune(me, plan)
    finally:
        torch.set_num_threads(1)


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_end(recipe: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    process = start(recipe, "schedule.max_steps=150", "schedule.epochs=50", "save.every_minutes=null")
    wait_for(process, "/150")
    process.terminate()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 6 and "the same command goes on from there" in rest, rest
    (saved,) = (tmp_path / "runs/tiny/checkpoints").iterdir()
    reached = int(saved.name.removeprefix("step-"))
    assert 0 < reached < 150
    again = subprocess.run(command(recipe, "schedule.max_steps=150", "schedule.epochs=50", "save.every_minutes=null"), capture_output=True,
                           text=True, timeout=300, check=False)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert f"its newest checkpoint is of step {reached} of 150" in again.stdout + again.stderr
    plan = load_plan(tmp_path / "runs/tiny/plan.json")
    straight = two_ranks.run(train_unbroken, dataclasses.replace(plan, run_dir=str(tmp_path / "straight")))[0]
    assert losses(list(read_events(RunFolder(tmp_path / "runs/tiny")))) == losses(straight)
    for path in (tmp_path / "straight/model").glob("*.safetensors"):
        assert (tmp_path / "runs/tiny/model" / path.name).read_bytes() == path.read_bytes()


def test_a_killed_worker_ends_it_with_4_and_says_which(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, "schedule.max_steps=5000", "schedule.epochs=500")
    wait_for(process, "/5000")
    pids = session_of(process)
    workers = [pid for pid in pids if "ray::Worker" in " ".join(psutil.Process(pid).cmdline())]
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 4, rest
    assert "rank" in rest and "died" in rest
    assert_gone(pids)
    assert status(tmp_path)["state"] == "failed"


def test_a_killed_launcher_leaves_no_workers(recipe: Path) -> None:
    process = start(recipe, "schedule.max_steps=5000", "schedule.epochs=500")
    wait_for(process, "/5000")
    pids = session_of(process)
    process.kill()
    process.wait()
    assert_gone(pids, within_s=100)  # Ray's own agents try for a minute to tell a head that is gone


def test_a_loss_that_is_no_number_names_step_and_samples(recipe: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(recipe, "optim.name=sgd", "optim.lr=1e30", "optim.max_grad_norm=0"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 4
    assert "at step" in done.stderr and "samples" in done.stderr and "optim.lr" in done.stderr
    assert status(tmp_path)["error"] == "NotFinite"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_named_and_leaves_no_model(recipe: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], check=True)
    try:
        done = subprocess.run(
            command(recipe, f"output_dir={disk}", "track.to=[]"), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 8, done.stdout + done.stderr
        assert "disk is full" in done.stderr
        assert not (disk / "tiny/model").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_torchrun_runs_the_same_plan_without_ray(recipe: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(recipe), capture_output=True, text=True, timeout=300, check=True)
    folder = RunFolder(tmp_path / "runs/tiny")
    through_ray = [event["loss"] for event in read_events(folder) if event["event"] == "step"]
    again = RunFolder(tmp_path / "runs/torchrun")
    (again.path / "logs").mkdir(parents=True)
    facts = json.loads(folder.plan.read_text())
    again.plan.write_text(json.dumps({**facts, "run_dir": str(again.path)}))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "launcher.train.worker",
        str(again.plan),
    ]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [event["loss"] for event in read_events(again) if event["event"] == "step"] == pytest.approx(through_ray, abs=1e-6)
    assert (again.model / "adapter_model.safetensors").is_file()
