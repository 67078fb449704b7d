"""The catalogue of devices, names as people and drivers write them, and the estimate of speed that stands on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import Cluster
from launcher.errors import ClusterError, DataError
from launcher.plan import make_plan
from launcher.plan.calibration import Calibration, apply_calibration, calibration_path, find_rates, load_calibrations, save_calibration
from launcher.plan.devices import find_device, find_device_called, find_device_of, load_devices, make_cluster
from launcher.plan.dry_run import estimate_plan
from launcher.plan.speed import Speed, count_tokens
from launcher.recipe import Data, Recipe
from launcher.units import GIB

WANTED = {"a10", "a100-40gb", "a100-80gb", "l4", "l40s", "h100-80gb", "h200", "b200", "mi300x", "rtx-3090", "rtx-4090", "rtx-5090", "t4",
          "v100-16gb", "v100-32gb"}  # fmt: skip
SOLD_AS_GIB = {"a10": 24, "a100-40gb": 40, "a100-80gb": 80, "l4": 24, "l40s": 48, "h100-80gb": 80, "h200": 141, "b200": 192, "mi300x": 192,
               "rtx-3090": 24, "rtx-4090": 24, "rtx-5090": 32, "t4": 16, "v100-16gb": 16, "v100-32gb": 32}  # fmt: skip


def test_the_catalogue_has_what_was_asked_for_with_plausible_numbers() -> None:
    devices = load_devices()
    assert set(devices) >= WANTED
    for name, sold in SOLD_AS_GIB.items():
        device = devices[name]
        assert 0.9 * sold * 1e9 < device.memory <= sold * GIB, "what a process sees is a little less than what is sold"
        assert device.flops_16bit > device.flops_fp32 > 1e12 and device.memory_rate > device.host_rate >= 16e9
    assert [name for name, device in devices.items() if not device.bf16] == ["t4", "v100-16gb", "v100-32gb"]


@pytest.mark.parametrize(
    ("said", "meant"),
    [("h100-80gb", "h100-80gb"), ("H100", "h100-80gb"), ("NVIDIA H100 80GB HBM3", "h100-80gb"), ("rtx4090", "rtx-4090"), ("RTX 4090", "rtx-4090"),
     ("NVIDIA GeForce RTX 3090", "rtx-3090"), ("a100_80GB", "a100-80gb"), ("Tesla T4", "t4"), ("V100-32G", "v100-32gb"), ("AMD Instinct MI300X OAM", "mi300x")],
)  # fmt: skip
def test_names(said: str, meant: str) -> None:
    assert find_device(said).name == meant


def test_a_name_nearly_right_is_told_the_nearest() -> None:
    with pytest.raises(ClusterError, match="did you mean h200 or h100-80gb") as caught:
        find_device("h300")
    assert caught.value.exit_code == 5 and "it has a10, a10g, a100-40gb" in caught.value.remedy


def test_a_cpu_is_told_how_it_is_planned_for() -> None:
    with pytest.raises(ClusterError) as caught:
        find_device("CPU")
    assert "--accelerator cpu" in caught.value.remedy


def test_aws_a10g_has_rates_of_its_own() -> None:
    """Its tensor cores do 70 TFLOP/s where an A10's do 125, by the makers' data sheets."""
    assert find_device("NVIDIA A10G").flops_16bit < 0.6 * find_device("A10").flops_16bit

    assert find_device_called("NVIDIA H300") is None


def test_every_smi_name_and_alias_is_one_devices() -> None:
    for device in load_devices().values():
        for name in (device.name, *device.aliases, *(smi.replace("*", "X") for smi in device.smi_names)):
            assert find_device(name) == device, name


def test_a_planned_cluster_says_what_it_knows_and_no_more() -> None:
    cluster = make_cluster(find_device("t4"), nodes=3, gpus_per_node=2)
    assert (cluster.nodes, cluster.workers_per_node, cluster.bf16, cluster.address) == (3, 2, False, "planned")
    assert cluster.host_memory == 1 and find_device_of(cluster) == find_device("t4")


def recipe_of(**sections: Any) -> Recipe:
    base = {"name": "p", "model": {"name_or_path": "meta-llama/Llama-3.1-8B-Instruct"}, "data": {"train": "t.jsonl", "seq_len": 4096},
            "batch": {"global_batch_size": 64}, "schedule": {"max_steps": 100}}  # fmt: skip
    return Recipe.model_validate_json(json.dumps(base | sections))


def speed_of(gpu: str, nodes: int = 1, each: int = 8, price: float | None = None, **sections: Any) -> Speed:
    cluster = make_cluster(find_device(gpu), nodes=nodes, gpus_per_node=each).model_copy(update={"price_per_device_hour": price})
    speed = estimate_plan(make_plan(recipe_of(**sections), cluster, base_dir="/nowhere", run_dir="/r"))
    assert speed is not None
    return speed


def test_speed_is_plausible_and_moves_the_right_way() -> None:
    full = {"method": {"kind": "full"}, "parallel": {"zero_stage": 3}, "data": {"train": "hub://x/y", "seq_len": 4096}}
    h100, a100, two = speed_of("h100-80gb", **full), speed_of("a100-80gb", **full), speed_of("h100-80gb", nodes=2, **full)
    assert 0.25 < h100.mfu < 0.6 and 0.25 < a100.mfu < 0.65, "what well-tuned full fine-tuning of an 8B reaches"
    assert h100.step_s < a100.step_s and two.step_s < h100.step_s
    assert h100.flops_per_step == pytest.approx(6 * 8.03e9 * 64 * 4096, rel=0.15), "6 FLOPs a weight and token, and attention"
    offloaded = speed_of("h100-80gb", **{**full, "parallel": {"zero_stage": 3, "offload_optimizer": True}})
    assert offloaded.step_s > h100.step_s


def test_time_and_cost_of_a_run_follow_from_its_steps() -> None:
    hub = {"data": {"train": "hub://x/y", "seq_len": 4096}, "method": {"kind": "lora"}}
    speed = speed_of("h100-80gb", price=2.5, **hub)
    assert speed.steps == 100 and speed.total_s == pytest.approx(100 * speed.step_s)
    assert speed.cost == pytest.approx(2.5 * 8 * 100 * speed.step_s / 3600)
    unknown = speed_of("h100-80gb", price=2.5, **hub, schedule={"epochs": 1.0})
    assert (unknown.steps, unknown.total_s, unknown.cost) == (None, None, None)


def test_tokens_are_guessed_from_the_size_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x" * 42_000)
    read = Data.model_validate_json
    assert count_tokens(read('{"train": "a.jsonl"}'), str(tmp_path)) == pytest.approx(10_000, rel=0.01)
    assert count_tokens(read('{"train": {"path": "a.jsonl", "weight": 3.0}, "eval_fraction": 0.5}'), str(tmp_path)) == pytest.approx(
        15_000, rel=0.01
    )
    for silent in ('{"train": "hub://a/b"}', '{"train": {"path": "a.jsonl", "limit": 5}}', '{"train": "a.jsonl", "packing": false}'):
        assert count_tokens(read(silent), str(tmp_path)) is None


# ------------------------------------------------------------------------------------------------- calibration

MEASURED = Calibration(
    device="CPU", measured_at="2026-01-01", versions={}, bytes={"libraries": 700 << 20}, rates={"flops_fp32": 5e10}, slack=0.1
)
HERE = Cluster(device_name="CPU", workers_per_node=2, cpus_per_node=4, device_memory=8 << 30, host_memory=16 << 30)


@pytest.fixture
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_a_calibration_that_was_saved_is_found_beside_others(own_config: Path) -> None:
    from dataclasses import replace

    assert load_calibrations() == {}
    save_calibration(MEASURED)
    save_calibration(replace(MEASURED, device="NVIDIA L4", bytes={"CUDA context": 1}))
    assert load_calibrations()["CPU"] == MEASURED and set(load_calibrations()) == {"CPU", "NVIDIA L4"}
    calibration_path().write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_calibrations()


def test_a_plan_takes_measured_constants_in_place_of_assumed_ones(own_config: Path) -> None:
    recipe = recipe_of(
        method={"kind": "lora"}, model={"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}, data={"train": "hub://x/y", "seq_len": 512}
    )
    before = make_plan(recipe, HERE, base_dir="/", run_dir="/r").memory
    save_calibration(MEASURED)
    after = make_plan(recipe, HERE, base_dir="/", run_dir="/r").memory
    elsewhere = make_plan(recipe, HERE.model_copy(update={"address": "10.0.0.1:6379"}), base_dir="/", run_dir="/r").memory
    (libraries,) = [part for part in after.decisive.components if part.name == "libraries"]
    assert (libraries.bytes, libraries.provenance) == (700 << 20, "fitted")
    assert any("measured on this machine" in note and "700.0 MiB" in note for note in after.notes)
    assert elsewhere == before != after and after.device("allocated") == before.device("allocated")
    (host,) = [part for part in after.host_decisive.components if part.name == "libraries"]
    assert host.bytes == 2 * (700 << 20), "a node's libraries are those of its ranks"
    assert apply_calibration(after, MEASURED, 2).device("total") == after.device("total")


def test_measured_rates_are_a_cores(own_config: Path) -> None:
    save_calibration(MEASURED)
    device = find_rates(HERE)
    assert device is not None and device.flops_fp32 == 2 * 5e10


def test_calibrate_measures_this_machine_and_later_plans_use_it(own_config: Path) -> None:
    """The real thing, in a process of its own: libraries, a few training steps of a small model, matrix products."""
    from test_cli import invoke

    result = invoke("calibrate", "--accelerator", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["device"] == "CPU" and found["path"].startswith(str(own_config))
    assert 200 << 20 < found["bytes"]["libraries"] < 3 << 30, "torch, transformers, DeepSpeed, peft and bitsandbytes, imported"
    assert 0.0 <= found["slack"] < 1.5
    assert 1e9 < found["rates"]["flops_fp32"] < 1e12 and 1e8 < found["rates"]["memory_rate"] < 1e12
    document = json.loads(invoke("quickstart", "--dry-run", "--json").stdout)
    (libraries,) = [part for part in document["phases"][-1]["components"] if part["name"] == "libraries"]
    assert libraries["bytes"] == found["bytes"]["libraries"] and libraries["provenance"] == "fitted"
    assert any("measured on this machine" in note for note in document["notes"])
    assert invoke("calibrate", "--accelerator", "cuda").exit_code in (0, 5)
