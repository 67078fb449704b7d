"""Runs on four hosts that share nothing but storage, sent from outside with a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Attached, events_of, lepton, losses_of, run_folder, status_of, wait_for_step, write_recipe
from hosts import STORAGE
from ranks import Ranks, fine_tune, losses
from rayhosts import RayHosts
from tiny import plan_tiny

CLUSTER = ("--storage", f"{STORAGE}/runs")


@pytest.fixture(scope="module")
def one_host_losses(two_ranks: Ranks, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The same recipe on one host, through the training side alone."""
    plan = plan_tiny(
        tiny,
        tmp_path_factory.mktemp("one-host"),
        method={"kind": "lora", "r": 4},
        model={"dtype": "fp32"},
        batch={"global_batch_size": 8, "micro_batch_size": 1},
        optim={"lr": 3e-3, "weight_decay": 0.0, "max_grad_norm": 1.0},
        schedule={"kind": "constant", "max_steps": 12, "epochs": 1000.0, "warmup_steps": 2},
        parallel={"zero_stage": 2},
    )
    return losses(two_ranks.run(fine_tune, plan)[0])


def test_a_run_from_outside_is_the_one_host_run(ray_hosts: RayHosts, one_host_losses: list[float], tmp_path: Path) -> None:
    """Detach, attach, a second submit, Ctrl-C, logs, status; and the losses of one host."""
    recipe = str(write_recipe(tmp_path, "whole", steps=60))  # more than the one host's, so that it still runs when it is looked at
    submit = [recipe, "--nodes", "4", *CLUSTER]
    sent = lepton(ray_hosts.address, *submit, "--detach", "--json")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    job = json.loads(sent.stdout)
    assert job["run"] == "whole" and job["submission_id"].startswith("lepton-whole-")
    assert "lepton-launch attach whole" in sent.stderr and "(token)" in sent.stderr

    second = Attached(ray_hosts.address, *submit)
    second.wait_for("is running already")
    second.wait_for("workers:")
    second.interrupt()
    assert second.end() == 130, second.output
    assert "detached; whole goes on" in second.output and "lepton-launch stop whole" in second.output

    attached = lepton(ray_hosts.address, "attach", "whole")
    assert attached.returncode == 0, attached.stdout + attached.stderr
    assert "60 steps" in attached.stdout and "perplexity" in attached.stdout
    assert "node1 rank 0" in attached.stdout or "rank 0" in attached.stdout
    assert "Traceback" not in attached.stdout and "WARNING" not in attached.stdout

    folder = run_folder(ray_hosts.storage, "whole")
    mine = losses_of(folder)
    assert [mine[step] for step in range(1, 13)] == pytest.approx(one_host_losses, abs=1e-5)
    assert status_of(folder)["state"] == "finished"
    assert (folder.model / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in (folder.path / "logs").iterdir()) == [f"rank-{rank:05d}.log" for rank in range(4)]
    assert "As it was given" in folder.recipe.read_text()
    plan = json.loads(folder.plan.read_text())
    assert plan["layout"]["nodes"] == 4
    assert json.loads(lepton(ray_hosts.address, "list", "--json").stdout)[0]["state"] == "SUCCEEDED"
    status: dict[str, Any] = json.loads(lepton(ray_hosts.address, "status", "whole", "--json").stdout)
    assert (status["step"], status["total_steps"], status["restarts"]) == (60, 60, 0)
    events = [json.loads(line) for line in lepton(ray_hosts.address, "logs", "whole", "--json").stdout.splitlines()]
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    assert len({event["text"] for event in events if event["event"] == "note" and "workers:" in event["text"]}) == 1


def test_who_may_not_come_in_is_told_what_to_do(ray_hosts: RayHosts) -> None:
    wrong = lepton(ray_hosts.address, "list", token="wrong-token-wrong-token-wrong-token")
    assert wrong.returncode == 5 and "refused the token (403)" in wrong.stderr
    none = lepton(ray_hosts.address, "list", token=None)
    assert none.returncode == 5 and "wants a token (401)" in none.stderr
    nobody = lepton(f"http://{ray_hosts.head.address}:8266", "list")
    assert nobody.returncode == 5 and "nothing answers" in nobody.stderr
    unknown = lepton(ray_hosts.address, "status", "no-such-run")
    assert unknown.returncode == 8 and "knows no run" in unknown.stderr


def test_nodes_that_do_not_come_end_it_with_7(ray_hosts: RayHosts, tmp_path: Path) -> None:
    done = lepton(
        ray_hosts.address,
        str(write_recipe(tmp_path, "large")),
        "batch.global_batch_size=5",
        "--nodes",
        "5",
        *CLUSTER,
        "--capacity-timeout",
        "3s",
    )
    assert done.returncode == 7, done.stdout + done.stderr
    assert "waiting for nodes: 4 of 5 nodes with 1 CPU are there" in done.stdout
    assert "4 of 5 nodes" in done.stderr and "--capacity-timeout" in done.stderr


def test_what_no_node_finds_is_named_before_any_training(ray_hosts: RayHosts, tmp_path: Path) -> None:
    done = lepton(ray_hosts.address, str(write_recipe(tmp_path, "lost")), f"data.train={STORAGE}/no-such.jsonl", "--nodes", "4", *CLUSTER)
    assert done.returncode == 8, done.stdout + done.stderr
    assert "no-such.jsonl" in done.stderr
    elsewhere = lepton(ray_hosts.address, str(write_recipe(tmp_path, "unshared")), "--nodes", "4", "--storage", "/mnt/tmp/runs")
    assert elsewhere.returncode == 5, elsewhere.stdout + elsewhere.stderr
    assert "is not shared by all nodes" in elsewhere.stderr and "node3" in elsewhere.stderr


def test_stop_saves_and_the_same_command_continues(ray_hosts: RayHosts, tmp_path: Path) -> None:
    """It saves after each step, so that the stop falls into a save."""
    recipe, folder = str(write_recipe(tmp_path, "halted", 60, "save: {every_steps: 1}\n")), run_folder(ray_hosts.storage, "halted")
    submit = [recipe, "--nodes", "4", *CLUSTER]
    first = Attached(ray_hosts.address, *submit)
    wait_for_step(folder, 5)
    stopped = lepton(ray_hosts.address, "stop", "halted", "--grace", "90s")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert first.end() == 6, first.output
    assert status_of(folder)["state"] == "stopped"
    at = max(event["step"] for event in events_of(folder) if event["event"] == "checkpoint")
    assert at >= 5
    again = lepton(ray_hosts.address, *submit)
    assert again.returncode == 0, again.stdout + again.stderr
    starts = [event["step"] for event in events_of(folder) if event["event"] == "start"]
    assert starts == [0, at]
    assert sorted(losses_of(folder)) == list(range(1, 61))
