"""The allocator's replay, figures and verdicts and tracing of what is unknown."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import Cluster
from launcher.plan.allocator import Allocator, replay
from launcher.plan.budget import Component, Figure, MemoryPlan, add_up, judge
from launcher.plan.devices import find_device, make_cluster
from launcher.plan.gathering import gather
from launcher.plan.host import round_pinned
from launcher.plan.memory import make_sharding, make_workload, predict_memory
from launcher.plan.plan import Plan, make_plan
from launcher.recipe import Recipe
from launcher.recipe_file import load_recipe
from launcher.units import GIB, MIB

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"


# ------------------------------------------------------------------------------------------------- the allocator


def test_segments_are_those_of_torch() -> None:
    """c10/cuda/CUDACachingAllocator.cpp: 2 MiB for small blocks, 20 MiB for middling ones, their own for large ones."""
    allocator = Allocator(expandable=False)
    for key, (size, reserved) in enumerate([(1, 2), (MIB, 2), (MIB, 4), (2 * MIB, 24), (11 * MIB, 24), (10 * MIB, 34)]):
        allocator.allocate(key, size)
        assert allocator.reserved == reserved * MIB, (size, reserved)
    assert allocator.allocated == 512 + 25 * MIB


def test_a_freed_block_is_taken_again_and_joined_with_its_neighbours() -> None:
    allocator = Allocator(expandable=False)
    allocator.allocate(0, 64 * MIB)
    allocator.free(0)
    for key in (1, 2):
        allocator.allocate(key, 32 * MIB)
    assert allocator.reserved == 64 * MIB
    for key in (1, 2):
        allocator.free(key)
    allocator.allocate(3, 64 * MIB)
    assert (allocator.reserved, allocator.allocated, allocator.peak_allocated) == (64 * MIB, 64 * MIB, 64 * MIB)


@pytest.mark.parametrize("seed", range(4))
def test_expandable_segments_keep_their_books(seed: int) -> None:
    """Blocks, free ones and holes lie side by side without a gap, and what is reserved is all but the holes."""
    choose = random.Random(seed)
    allocator, held = Allocator(expandable=True), {}
    for key in range(600):
        if held and choose.random() < 0.5:
            allocator.free(held.pop(choose.choice(list(held))))
        else:
            held[key] = key
            allocator.allocate(key, choose.choice([700, 300_000, 3 * MIB, 45 * MIB, 200 * MIB]) + choose.randrange(100_000))
        if key % 50 == 49:
            allocator.empty_cache()
        for pool in (allocator.large, allocator.small):
            block, blocks = pool.tail, []
            while block is not None:
                assert block.before is None or (block.before.after is block and block.before.offset + block.before.size == block.offset)
                blocks.append(block)
                block = block.before
            assert sorted(b.offset for b in blocks if b.free) == sorted(entry[2] for entry in pool.free)
            assert all(hole in blocks and not hole.free for hole in pool.holes)
        mapped = sum(
            pool.tail.offset + pool.tail.size - sum(h.size for h in pool.holes) for pool in (allocator.large, allocator.small) if pool.tail
        )
        assert allocator.reserved == mapped >= allocator.allocated == sum(block.size for block in allocator.held.values())


def test_emptying_the_cache_gives_back_pages_within() -> None:
    allocator = Allocator(expandable=True)
    for key, size in enumerate((100, 50, 30)):
        allocator.allocate(key, size * MIB)
    allocator.free(1)  # between two others, from 100 to 150 MiB
    allocator.empty_cache()
    assert allocator.reserved == 140 * MIB, "two of its pages of 20 MiB lie in it whole; the last one is rounded up"
    allocator.allocate(3, 45 * MIB)
    assert allocator.reserved == 180 * MIB, "the same addresses again"


def test_fragmentation_costs_less_with_expandable_segments() -> None:
    growing = [("forward", size * MIB, key) for key, size in enumerate((40, 50, 60, 70))]
    events = [event for phase, size, key in growing for event in ((phase, size, key), (phase, -size, key))]
    native, expandable = (replay(events, expandable=mode)["forward"] for mode in (False, True))
    assert native == (220 * MIB, 70 * MIB) and expandable == (80 * MIB, 70 * MIB)
    assert replay(events, expandable=False, limit=100 * MIB)["forward"] == (90 * MIB, 70 * MIB), "what is cached is given back first"


# ------------------------------------------------------------------------------------------------- figures


def test_independent_errors_add_in_quadrature() -> None:
    parts = [Component(name=n, bytes=100, provenance="source", error=e) for n, e in (("a", 0.3), ("b", 0.4), ("c", 0.0))]
    assert add_up(parts) == Figure(p50=300, p95=350)


@pytest.mark.parametrize(("p95", "verdict"), [(970, "FITS"), (971, "TIGHT"), (1000, "TIGHT"), (1001, "DOES NOT FIT")])
def test_the_verdict_is_at_p95_with_a_margin(p95: int, verdict: str) -> None:
    assert judge(Figure(p50=900, p95=p95), 1000) == verdict


def test_pinned_memory_is_rounded_to_powers_of_two() -> None:
    assert [round_pinned(size) for size in (0, 1, 3, 4, (1 << 30) + 1)] == [0, 1, 4, 4, 1 << 31]


def plan_of(model: str = LLAMA_8B, *, each: int = 8, nodes: int = 1, memory: int = 80, tracer: Any = None, **sections: Any) -> Plan:
    base: dict[str, Any] = {"name": "p", "model": {"name_or_path": model}, "data": {"train": "t.jsonl", "seq_len": 2048},
                            "batch": {"global_batch_size": each * nodes, "micro_batch_size": 1}}  # fmt: skip
    recipe = Recipe.model_validate_json(json.dumps(base | sections))
    cluster = Cluster(accelerator="cuda", device_name="NVIDIA H100", nodes=nodes, workers_per_node=each, cpus_per_node=32,
                      device_memory=memory * GIB, host_memory=2048 * GIB, bf16=True)  # fmt: skip
    return make_plan(recipe, cluster, base_dir=".", run_dir="/runs/p", tracer=tracer)


def test_a_plan_is_read_back_as_it_was() -> None:
    memory = plan_of(parallel={"zero_stage": 3}).memory
    assert MemoryPlan.from_dict(json.loads(json.dumps(memory.to_dict()))) == memory


def test_the_document_has_what_the_schema_promises() -> None:
    facts = plan_of(method={"kind": "qlora"}).memory.to_dict()
    assert {"schema_version", "verdict", "decisive_phase", "device", "host", "disk", "network", "phases", "notes"} <= set(facts)
    for name in ("allocated", "reserved", "total"):
        figure = facts["device"][f"{name}_bytes"]
        assert 0 < figure["p50"] <= figure["p95"]
    assert facts["device"]["allocated_bytes"]["p50"] <= facts["device"]["reserved_bytes"]["p50"] <= facts["device"]["total_bytes"]["p50"]
    assert facts["host"]["total_bytes"] > 0 and facts["disk"]["checkpoint_bytes"] > 0
    for phase in facts["phases"]:
        assert sum(part["bytes"] for part in phase["components"]) == phase["total_bytes"]["p50"]
        assert {part["provenance"] for part in phase["components"]} <= {"exact", "source", "fitted", "assumed"}
    assert facts["decisive_phase"] in {phase["name"] for phase in facts["phases"]}


# ------------------------------------------------------------------------------------------------- by hand


def test_the_worked_example_of_the_docs_is_the_plan_to_the_byte() -> None:
    """docs/dry-run.md's: Llama-3.1-8B, every weight trained, ZeRO-3 over 8 A100s, packed rows of 2,048 tokens."""
    text = (Path(__file__).parent.parent / "docs/dry-run.md").read_text(encoding="utf-8")
    section = text[text.index("## A worked example") : text.index("## What is held")]
    told = {name: int(size.replace(",", "")) for name, size in re.findall(r"^\| ([^|]+?) \|[^|]*\| ([\d,]+) \|$", section, re.MULTILINE)}
    overrides = ("data.seq_len=2048", "batch.global_batch_size=8", "batch.micro_batch_size=1")
    assert " ".join(overrides) in section
    recipe = load_recipe(ROOT / "recipes/llama-3.1-8b-full.yaml", overrides)
    cluster = make_cluster(find_device("a100-80gb"), nodes=1, gpus_per_node=8)
    plan = make_plan(recipe, cluster, base_dir=str(ROOT / "recipes"), run_dir="/runs/p").memory
    phases = {phase.name: phase for phase in plan.phases}
    allocated = {
        part.name: part.bytes for name in ("optimizer step", "loss") for part in phases[name].components if part.counts_in == "allocated"
    }
    alike = {part.name for part in phases["optimizer step"].components}
    together = sum(part.bytes for part in phases["loss"].components if part.counts_in == "allocated" and part.name in alike)
    sums = {"together": together, "allocated in the loss": phases["loss"].allocated_bytes,
            "allocated in the optimizer step": phases["optimizer step"].allocated_bytes}  # fmt: skip
    assert told == allocated | sums
    need = plan.device("total")
    assert plan.decisive_phase == "optimizer step" and plan.verdict == "FITS"
    for size in (plan.device("reserved").p50, need.p50, plan.device("allocated").p95):
        assert f"{size:,}" in section
    assert f"{need.p95 / 1e9:.1f} GB of the {plan.budget / 1e9:.1f} GB" in section

    params, ranks, tokens = 8_030_261_248, 8, 2048
    part = params // ranks
    assert told["weights"] == 2 * part + 2 * 65 * 4096 and told["fp32 master"] == 4 * part and told["optimizer states"] == 8 * part
    assert told["gradients"] == 2 * part and told["buckets"] == 2 * 500_000_000 and told["library workspace"] == 2 * 8.125 * MIB
    assert told["gathered parameters"] == 2 * (2 * 4096**2 + 2 * 1024 * 4096 + 2 * 14_336 * 4096), "sent for, of the last layer"
    assert told["activation checkpoints"] == 2 * 4096 * 32 * tokens
    assert told["activations"] == 6 * 4096 * tokens + 4 * tokens + tokens**2 + 4 * 128 * tokens + 8 * tokens + 512
    assert told["logits and loss"] == (12 * 128_256 + 2 * 4096) * (tokens - 1) + 512
    assert told["step workspace"] == 6 * (part - 65 * 4096 // ranks)


def test_ranks_shard_and_offload_moves() -> None:
    def held(name: str, **sections: Any) -> dict[str, int]:
        plan = plan_of(**sections)
        return {part.name: part.bytes for phase in plan.memory.phases if phase.name == name for part in phase.components}

    few, many = (held("optimizer step", each=8, nodes=nodes, parallel={"zero_stage": 3}) for nodes in (1, 512))
    assert few["optimizer states"] == pytest.approx(512 * many["optimizer states"], rel=1e-3), "8 and 4,096 ranks"
    moved = plan_of(parallel={"zero_stage": 3, "offload_optimizer": True, "offload_param": True}).memory
    assert not {"optimizer states", "fp32 master"} & {part.name for phase in moved.phases for part in phase.components}
    assert moved.host.p50 > 18 * 8_030_261_248, "18 bytes a parameter over the node's ranks, and pinned memory's rounding"


@pytest.mark.parametrize("method", [{"kind": "qlora", "bits": 4}, {"kind": "qlora", "bits": 8}, {"kind": "lora", "dora": True}], ids=str)
def test_a_model_is_sharded_as_it_loads(method: dict[str, Any]) -> None:
    phases = {phase.name: phase for phase in plan_of(method=method, parallel={"zero_stage": 3}).memory.phases}
    assert phases["load"].allocated_bytes < 5 * GIB, "an eighth of the model, and twice the embedding"


def test_pissa_decomposes_one_weight_at_a_time_in_fp32() -> None:
    load = plan_of(method={"kind": "lora", "init": "pissa"}, parallel={"zero_stage": 3}).memory.phases[0]
    assert {part.name: part.bytes for part in load.components}["step workspace"] == 16 * 4096 * 14336


def test_fused_experts_are_not_quantised_and_it_is_said() -> None:
    memory = plan_of("Qwen/Qwen3-30B-A3B", method={"kind": "qlora", "target_modules": ["q_proj", "v_proj"]}).memory
    assert any("linear layers only" in note for note in memory.notes)
    weights = {part.name: part.bytes for part in memory.phases[0].components}["weights"]
    assert weights > 1.9 * 30_532_122_624 * 0.95


def test_what_zero_3_keeps_gathered_at_the_turn() -> None:
    plan = plan_of(parallel={"zero_stage": 3})
    work, sharding = make_workload(plan.recipe, plan.shape, plan.layout, plan.batch), make_sharding(plan.layout, plan.deepspeed)
    head, layer = 2 * 128_256 * 4096, 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    gathered, first = gather(work, sharding), gather(work, replace(sharding, forward_first=True))
    ahead = layer - 2 * 4096 * 14336
    assert gathered.loss == head + ahead, "the head is needed again, and the last layer's parameters were sent for but its last"
    assert first.loss == ahead, "what DeepSpeed remembers of forward passes alone is that nothing is needed again"
    assert gathered.forward == first.forward == layer + 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 14336), (
        "a layer, and 50M elements ahead"
    )


def test_a_host_holds_a_spare_worker_a_rank_once_a_run_steps() -> None:
    """540 MiB were measured of a process with a worker's libraries and nothing else."""
    plan = plan_of(parallel={"zero_stage": 3})
    without = plan.cluster.model_copy(update={"ray": plan.cluster.ray.model_copy(update={"spare_workers": False})})
    alone = predict_memory(plan.recipe, plan.shape, plan.layout, plan.batch, without, deepspeed=plan.deepspeed)
    for phase in plan.memory.host_phases:
        bare = next(other for other in alone.host_phases if other.name == phase.name)
        stands_by = phase.name in ("optimizer step", "save")
        assert phase.total_bytes - bare.total_bytes == (8 * 540 * MIB if stands_by else 0), phase.name
        assert stands_by == ("spare workers" in {part.name for part in phase.components})


# ------------------------------------------------------------------------------------------------- speed


def test_the_quick_prediction_is_near_the_exact_one() -> None:
    plan = plan_of("meta-llama/Llama-3.1-405B", nodes=8, parallel={"zero_stage": 3})
    facts = (plan.recipe, plan.shape, plan.layout, plan.batch, plan.cluster)
    quick, exact = (predict_memory(*facts, deepspeed=plan.deepspeed, replay=replays) for replays in (False, True))
    needs = quick.device("allocated").p50, exact.device("allocated").p50
    assert 0.9 * needs[1] < needs[0] <= needs[1], "never too high; what it lets through is predicted exactly (solve.choose)"
