"""What a client does that needs no cluster: names, packages, messages, addresses."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from tiny import make_recipe, plan_tiny

from launcher.cli.run import choose_cluster, is_elsewhere, make_ray_options
from launcher.cluster import Cluster, RayOptions, locate_cluster, make_node_range
from launcher.errors import ClusterError, DataError, Fault, LauncherError, OutOfMemory, RecipeError
from launcher.job import package
from launcher.job.client import NodeFacts, describe_access, describe_cluster, open_client
from launcher.job.driver import begin, find_sizes, resize
from launcher.job.messages import MARK, Speaker, make_error, make_result, read_message
from launcher.job.package import Order, build_package, find_own_files, load_order, load_secrets
from launcher.job.submit import make_submission_id
from launcher.units import GIB, make_seconds


def order_of(folder: Path, **facts: Any) -> Order:
    recipe = make_recipe(folder, output_dir="/mnt/runs", **facts)
    return Order(recipe=recipe.model_dump(mode="json"), cluster=Cluster(nodes=2).model_dump(mode="json"), base_dir="files", plan=None)


def test_the_submission_id_is_of_the_recipe_and_the_place_not_of_the_size(tiny: Path) -> None:
    first = make_submission_id(make_recipe(tiny))
    assert first == make_submission_id(make_recipe(tiny))
    assert first.startswith("lepton-tiny-")
    assert first != make_submission_id(make_recipe(tiny, optim={"lr": 1e-5}))
    assert first != make_submission_id(make_recipe(tiny, output_dir="/other/runs"))


def test_a_package_holds_the_code_as_it_is_now_and_no_secret_but_in_its_file(tiny: Path, tmp_path: Path) -> None:
    import launcher

    order = dataclasses.replace(order_of(tiny), fresh=True, allow_changed=("optim.lr",))
    build_package(tmp_path, order, "name: tiny\n", tiny, {"HF_TOKEN": "hf_secret"})
    source = Path(launcher.__file__).parent
    sent = {path.relative_to(tmp_path / "launcher") for path in (tmp_path / "launcher").rglob("*.py")}
    assert sent == {path.relative_to(source) for path in source.rglob("*.py")}
    assert load_order(tmp_path) == order
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert [path.name for path in holders] == ["secrets.json"]
    assert stat.S_IMODE(holders[0].stat().st_mode) == 0o600
    assert load_secrets(tmp_path) == {"HF_TOKEN": "hf_secret"}
    assert not holders[0].exists() and load_secrets(tmp_path) == {}


def test_files_beside_the_recipe_travel(tiny: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        tiny, model={"name_or_path": "./model"}, data={"train": ["*.jsonl", "/abs/x.jsonl", "hub://a/b", "../up.jsonl"], "eval": []}
    )
    names = {str(path) for path in find_own_files(recipe, tiny)}
    assert {"train.jsonl", "eval.jsonl", "model/config.json", "model/model.safetensors"} <= names
    assert not any(name.startswith(("/", "..")) for name in names)
    order = dataclasses.replace(order_of(tiny), recipe=recipe.model_dump(mode="json"))
    build_package(tmp_path, order, "", tiny, {})
    assert (tmp_path / "files/model/config.json").is_file()


def test_files_too_large_to_travel_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "LARGEST_FILES", 10)
    recipe = make_recipe(tiny, data={"train": "train.jsonl", "eval": []})
    with pytest.raises(DataError, match="too much to send"):
        build_package(tmp_path, dataclasses.replace(order_of(tiny), recipe=recipe.model_dump(mode="json")), "", tiny, {})


def test_an_order_without_a_plan_is_planned_where_it_arrives(tiny: Path) -> None:
    plan = order_of(tiny).make_plan()
    assert plan.layout.nodes == 2 and plan.run_dir == "/mnt/runs/tiny"
    assert dataclasses.replace(order_of(tiny), plan=plan.to_dict()).make_plan() == plan


def test_what_a_cluster_runs_has_no_auto_left(tiny: Path, tmp_path: Path) -> None:
    """The workers read the recipe from the plan: what auto became must be in it, not what was asked for."""
    asked = make_recipe(tiny, output_dir=str(tmp_path), parallel={"zero_stage": "auto"}, memory={"gradient_checkpointing": "auto"})
    plan, _ = begin(dataclasses.replace(order_of(tiny), recipe=asked.model_dump(mode="json")))
    assert asked.data.packing == "auto" and plan.recipe.data.packing is True
    assert isinstance(plan.recipe.parallel.zero_stage, int) and isinstance(plan.recipe.memory.gradient_checkpointing, bool)
    assert plan.run_dir == str(tmp_path / "tiny")


@pytest.mark.parametrize(
    "error", [OutOfMemory("rank 1: full", "smaller"), ClusterError("gone"), RecipeError([Fault("r.yaml:3", "lr", "no", "yes")])]
)
def test_errors_arrive_as_they_were(error: LauncherError) -> None:
    result = json.loads(json.dumps(make_result(error)))
    arrived = make_error(result)
    assert type(arrived) is type(error) and arrived.args == error.args and result["exit_code"] == error.exit_code
    assert make_error(make_result(None)) is None


def test_the_speaker_numbers_what_it_says_and_thins_what_comes_too_often(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Speaker()
    for step in range(1, 101):
        speaker.say({"event": "step", "step": step, "total_steps": 100})
    for _ in range(5):
        speaker.say({"event": "waiting", "text": "1 of 4 nodes", "left_s": 1.0})
    speaker.say({"event": "waiting", "text": "2 of 4 nodes", "left_s": 1.0})
    events = [event for line in capsys.readouterr().out.splitlines() if (event := read_message(line))]
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps[0] == 1 and steps[-1] == 100 and len(steps) < 10
    assert [event["text"] for event in events if event["event"] == "waiting"] == ["1 of 4 nodes", "2 of 4 nodes"]


def test_other_lines_are_no_messages() -> None:
    assert read_message("hello") is None
    assert read_message(MARK + '{"event": "step", "st') is None


def test_sizes_keep_the_global_batch(tiny: Path, tmp_path: Path) -> None:
    plan = plan_tiny(tiny, tmp_path / "run", ranks=1, batch={"micro_batch_size": "auto"})
    cluster = plan.cluster.model_copy(update={"nodes": 4, "ray": RayOptions(min_nodes=1)})
    four = resize(dataclasses.replace(plan, cluster=cluster), 4)
    assert list(find_sizes(four)) == [4, 2, 1]  # 8 samples do not divide over 3 nodes
    for nodes in (4, 2, 1):
        batch = resize(four, nodes).batch
        assert batch.micro_batch_size * batch.gradient_accumulation_steps * nodes == 8


@pytest.mark.parametrize(("text", "bounds"), [("4", (4, 4)), ("2..4", (2, 4)), (" 1 ", (1, 1))])
def test_node_ranges(text: str, bounds: tuple[int, int]) -> None:
    assert make_node_range(text) == bounds


@pytest.mark.parametrize("text", ["0", "4..2", "two", "1..", "-1", "2...4"])
def test_bad_node_ranges(text: str) -> None:
    with pytest.raises(ClusterError, match="--nodes"):
        make_node_range(text)


def test_times() -> None:
    assert [make_seconds(text) for text in ("90s", "10m", "2h", "1.5 d")] == [90, 600, 7200, 129600]
    with pytest.raises(ValueError, match="unit"):
        make_seconds("90")


def test_addresses_are_told_from_files(tmp_path: Path) -> None:
    assert [locate_cluster(name) for name in ("auto", "http://h:8265", "10.0.0.1:6379", "[::1]:6379")] == [None] * 4
    assert locate_cluster("local") is not None
    with pytest.raises(ClusterError, match="no such file"):
        locate_cluster("nowhere")


def test_where_a_run_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert choose_cluster(None, None, 2, "cpu").address == "local"
    assert choose_cluster(None, "1", 2, "cpu").address == "local"
    four = choose_cluster(None, "2..4", None, None)
    assert (four.address, four.nodes, four.ray.min_nodes) == ("auto", 4, 2)
    named = choose_cluster("http://h:8265", "4", None, None, make_ray_options("/mnt", "90s", 3, ["rack=a"], ["HF_TOKEN"]))
    assert named.ray == RayOptions(storage="/mnt", capacity_timeout_s=90.0, cpus_per_worker=3, labels={"rack": "a"}, secrets=("HF_TOKEN",))
    assert is_elsewhere(named, dry_run=False) and is_elsewhere(named, dry_run=True)
    planned = Cluster(address="http://h:8265", device_memory=GIB, host_memory=GIB)
    assert is_elsewhere(planned, dry_run=False) and not is_elsewhere(planned, dry_run=True)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert choose_cluster(None, None, None, None).address == "10.0.0.1:6379"


def facts(address: str, **more: Any) -> NodeFacts:
    base = NodeFacts(node=address, host=address, address=address, cpus=8, gpus=0, gpu_name="", gpu_memory=0, memory=64 * GIB, is_head=False)
    return dataclasses.replace(base, **more)


def test_a_running_cluster_is_as_strong_as_its_weakest_node() -> None:
    gpu = {"gpus": 8, "gpu_name": "NVIDIA H100 80GB HBM3", "gpu_memory": 80 * GIB}
    nodes = [facts("1", is_head=True), facts("2", **gpu), facts("3", **{**gpu, "gpu_memory": 40 * GIB, "gpu_name": "NVIDIA A100"})]
    cluster = describe_cluster(nodes, Cluster(address="http://h:8265"), workers=None)
    assert (cluster.accelerator, cluster.nodes, cluster.workers_per_node, cluster.device_memory) == ("cuda", 2, 8, 40 * GIB)
    assert cluster.bf16 and cluster.device_name == "NVIDIA A100"
    cpu = describe_cluster(nodes, Cluster(address="http://h:8265", accelerator="cpu", nodes=3), workers=2)
    assert (cpu.accelerator, cpu.nodes, cpu.workers_per_node, cpu.device_memory) == ("cpu", 3, 2, 32 * GIB)
    old = describe_cluster([facts("1", gpus=1, gpu_name="Tesla T4", gpu_memory=GIB)], Cluster(address="http://h:8265"), workers=None)
    assert not old.bf16
    with pytest.raises(ClusterError, match="no node"):
        describe_cluster([], Cluster(address="http://h:8265"), workers=None)


def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(ClusterError, match="nothing answers at 127.0.0.1:1 ") as raised:
        open_client("http://127.0.0.1:1")
    assert "--dashboard-host" in raised.value.remedy
    with pytest.raises(ClusterError, match="no address"):
        open_client("http://127.0.0.1:port")


def test_loopback_and_tls_need_no_warning() -> None:
    for url in ("http://127.0.0.1:1", "http://localhost:1", "https://127.0.0.1:1"):
        assert describe_access(url)[1] == ""
    access, warning = describe_access("http://127.0.0.2.invalid:1")
    assert "no authentication" in access and "RAY_AUTH_MODE=token" in warning


def test_the_docs_list_every_key_of_ray() -> None:
    text = (Path(__file__).parents[1] / "docs/cluster.md").read_text()
    assert {name for name in RayOptions.model_fields if f"| `{name}` |" not in text} == set()


def test_the_docs_name_every_verb_and_exit_code() -> None:
    text = (Path(__file__).parents[1] / "docs/cluster.md").read_text()
    for verb in ("list", "status", "logs", "attach", "stop"):
        assert f"lepton-launch {verb}" in text
