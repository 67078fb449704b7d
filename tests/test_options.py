"""What a recipe can ask for is planned: every optimizer, one rank to thousands, and each way to need less of something."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from launcher.errors import RecipeError
from launcher.plan import Plan, make_plan
from launcher.plan.devices import find_device, make_cluster
from launcher.plan.evaluating import TEMPLATE_TOKENS
from launcher.plan.losses import LOSS_CHUNK
from launcher.plan.states import NVME_BUFFER, NVME_IN_MEMORY
from launcher.recipe import OptimName, Recipe
from launcher.recipe_file import find_conflicts

SMALL, LLAMA_8B = "HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
TOKENS = 4096


def recipe_of(hub_id: str, **sections: Any) -> Recipe:
    base: dict[str, Any] = {"name": "p", "model": {"name_or_path": hub_id}, "data": {"train": "hub://x/y", "seq_len": TOKENS}}
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return Recipe.model_validate_json(json.dumps(base))


def plan_on(recipe: Recipe, nodes: int = 1, each: int = 8) -> Plan:
    return make_plan(recipe, make_cluster(find_device("h100-80gb"), nodes=nodes, gpus_per_node=each), base_dir="/r", run_dir="/runs/p")


def bytes_of(plan: Plan, phase: str, component: str, *, host: bool = False) -> int:
    phases = plan.memory.host_phases if host else plan.memory.phases
    return sum(part.bytes for found in phases if found.name == phase for part in found.components if part.name == component)


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "qlora"}], ids=["full", "qlora"])
@pytest.mark.parametrize("name", get_args(OptimName))
def test_every_optimizer_is_planned_under_every_stage(name: str, method: dict[str, Any]) -> None:
    states = []
    for stage in (0, 1, 2, 3):
        for offload in (False, True):
            parallel = {"zero_stage": stage, "offload_optimizer": offload}
            recipe = recipe_of(
                SMALL, optim={"name": name}, method=method, parallel=parallel, data={"seq_len": 512}, batch={"global_batch_size": 8}
            )
            if any(find_conflicts(recipe)):
                continue
            plan = plan_on(recipe)
            assert all(part.bytes >= 0 for phase in plan.memory.phases for part in phase.components)
            states.append(bytes_of(plan, "optimizer step", "optimizer states"))
    # Adafactor factors matrices, which stage 0 alone gives it: flat parts of several ranks are more than its rows and columns.
    assert len(states) >= 4 and states[1] >= states[-1] and (states[0] >= states[1] or name == "adafactor")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_to_thousands(stage: int) -> None:
    """A larger cluster never holds more of the model, and from one rank to 4,096 the states are cut by as much."""
    held = []
    for nodes, each in ((1, 1), (1, 8), (8, 8), (128, 8), (512, 8)):
        batch = {"global_batch_size": 4096, "micro_batch_size": 1}
        plan = plan_on(recipe_of(SMALL, parallel={"zero_stage": stage}, batch=batch, data={"seq_len": 512}), nodes, each)
        assert plan.layout.world_size == nodes * each
        held.append(bytes_of(plan, "optimizer step", "optimizer states"))
    assert held == sorted(held, reverse=True)
    assert held[0] == held[-1] if stage == 0 else held[0] / held[-1] == pytest.approx(4096, rel=0.05)


def test_chunked_loss_takes_what_its_chunk_takes() -> None:
    batch = {"global_batch_size": 8, "micro_batch_size": 1}
    plain, chunked = (
        plan_on(recipe_of(LLAMA_8B, model={"loss": loss}, batch=batch, method={"kind": "lora"})) for loss in ("plain", "chunked")
    )
    vocab, logits = plain.shape.vocab_size, "logits and loss"
    assert bytes_of(plain, "loss", logits) == pytest.approx(12 * vocab * (TOKENS - 1), rel=0.02)
    assert bytes_of(chunked, "loss", logits) == pytest.approx(12 * vocab * LOSS_CHUNK, rel=0.2)
    with pytest.raises(RecipeError, match="changes its logits after it"):
        plan_on(recipe_of("google/gemma-2-9b-it", model={"loss": "chunked"}, batch=batch))


def test_checkpoints_that_are_offloaded_are_the_hosts() -> None:
    batch = {"global_batch_size": 8, "micro_batch_size": 1}
    kept, moved = (plan_on(recipe_of(LLAMA_8B, memory={"gradient_checkpointing": how}, batch=batch)) for how in (True, "offload"))
    size, name = 2 * 4096 * 32 * TOKENS, "activation checkpoints"
    assert bytes_of(kept, "loss", name) == size and bytes_of(moved, "loss", name) == 0
    assert bytes_of(kept, "optimizer step", name, host=True) == 0 and bytes_of(moved, "optimizer step", name, host=True) >= 8 * size


def test_on_nvme_states_leave_the_hosts_memory_for_its_disk() -> None:
    batch = {"global_batch_size": 8, "micro_batch_size": 1}
    parallel = {"zero_stage": 3, "offload_optimizer": True, "offload_param": True}
    memory, disk = (plan_on(recipe_of(LLAMA_8B, parallel=parallel | more, batch=batch)) for more in ({}, {"nvme_path": "/nvme"}))
    params = memory.num_params
    assert memory.memory.disk.nvme_bytes == 0
    assert disk.memory.disk.nvme_bytes == pytest.approx((8 + 8 + 2) * params, rel=0.01), "masters and gradients, Adam's moments, weights"
    assert disk.memory.host.p50 < memory.memory.host.p50
    assert bytes_of(disk, "optimizer step", "optimizer states", host=True) > 8 * 2 * (5 * NVME_BUFFER + min(params // 8, NVME_IN_MEMORY))
    zero = disk.deepspeed["zero_optimization"]
    assert (
        zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "nvme" and zero["offload_param"]["nvme_path"] == "/nvme"
    )


def test_streams_of_their_own_reserve_on_top() -> None:
    """What is gathered and reduced under ZeRO-3 is another stream's memory; with offload a gradient's part is there three times."""
    batch = {"global_batch_size": 1, "micro_batch_size": 1}
    plans = {}
    for offload in (False, True):
        parallel = {"zero_stage": 3, "offload_optimizer": offload}
        plans[offload] = plan_on(recipe_of(LLAMA_8B, parallel=parallel, batch=batch, method={"kind": "full"}), 1, 1)
    head = 128_256 * 4096
    slack = bytes_of(plans[True], "loss", "allocator slack")
    assert slack > 2 * head + 4 * head, "the head, gathered, and its gradient's fp32 copy"


def test_a_run_can_be_resumed_in_what_it_was_started_in() -> None:
    plan = plan_on(recipe_of(LLAMA_8B, method={"kind": "lora"}, batch={"global_batch_size": 8, "micro_batch_size": 1}))
    sizes = {phase.name: phase.total_bytes for phase in plan.memory.phases}
    assert 0 < sizes["resume"] < sizes["optimizer step"]


# ------------------------------------------------------------------------------------------------- evaluation, and the merge that comes after


def evaluation_of(**sections: Any) -> dict[str, int]:
    plan = plan_on(recipe_of(SMALL, data={"eval_fraction": 0.1, "seq_len": 512}, **sections), 1, 1)
    found = next(phase for phase in plan.memory.phases if phase.name == "evaluation")
    return {part.name: part.bytes for part in found.components}


def test_an_evaluation_is_of_its_own_micro_batch() -> None:
    small, large = (evaluation_of(evaluate={"micro_batch_size": rows})["logits and loss"] for rows in (1, 16))
    assert large == pytest.approx(16 * small, rel=0.01)


def test_answers_to_sample_prompts_keep_keys_and_values() -> None:
    """30 layers, 3 key-value heads of 64, bf16: as many tokens as the prompt has bytes and a template, the answer, and a layer once more."""
    rows = {"micro_batch_size": 1}
    few = evaluation_of(evaluate={"samples": ["Who?"], "max_new_tokens": 8, **rows})
    assert "KV cache" not in few, "the held-out loss needs more"
    found = evaluation_of(evaluate={"samples": ["x" * 4000], "max_new_tokens": 2000, **rows}, model={"loss": "chunked"})
    assert found["KV cache"] == (30 + 1) * 2 * 3 * 64 * (4000 + TEMPLATE_TOKENS + 2000) * 2


def test_a_run_that_evaluates_nothing_has_no_such_phase() -> None:
    assert "evaluation" not in {phase.name for phase in plan_on(recipe_of(SMALL), 1, 1).memory.phases}


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_a_merge_is_a_phase_of_its_own_that_is_not_judged(kind: str) -> None:
    memory = plan_on(recipe_of(LLAMA_8B, method={"kind": kind}, batch={"global_batch_size": 8, "micro_batch_size": 1})).memory
    (merge,) = (phase for phase in memory.host_phases if phase.name == "merge")
    held = {part.name: part.bytes for part in merge.components}
    assert held["weights"] == memory.disk.merged_bytes == 2 * 8_030_261_248
    assert held["merge workspace"] == 4096 * 14336 * (2 + 4 + 4), "a copy of the largest weight, and the adapters' product twice in fp32"
    assert memory.host_decisive.name != "merge" and memory.host.p50 < merge.total_bytes
    on_device = [phase for phase in memory.phases if phase.name == "merge"]
    assert bool(on_device) == (kind == "qlora"), "a GPU turns a quantised base's weights, one at a time"
    assert memory.decisive_phase != "merge" and memory.from_dict(memory.to_dict()) == memory


def test_what_every_weight_trains_has_nothing_to_merge() -> None:
    memory = plan_on(recipe_of(SMALL)).memory
    assert "merge" not in {phase.name for phase in (*memory.phases, *memory.host_phases)} and memory.disk.merged_bytes == 0
