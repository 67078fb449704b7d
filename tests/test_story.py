"""What the allocator's replay is told, against what the phases hold: gradients, buckets and copies, stage by stage."""

from __future__ import annotations

from typing import Any

import pytest
from plans import A100, plan_of

from launcher.plan.allocator import replay
from launcher.plan.memory import make_sharding, make_workload
from launcher.plan.plan import Plan
from launcher.plan.states import Optimizer, count_states, make_states
from launcher.plan.timeline import tell_step
from launcher.units import GIB, MIB

ROOM = 32 * MIB
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


def allocated(plan: Plan) -> dict[str, int]:
    return {
        phase.name: sum(c.bytes for c in phase.components if c.counts_in == "allocated" and c.name != "library workspace")
        for phase in plan.memory.phases
    }


def plan_stage(stage: int, micro_steps: int, **sections: Any) -> Plan:
    batch = {"micro_batch_size": 2, "global_batch_size": 8 * micro_steps}
    parallel = {"zero_stage": stage, **sections.pop("parallel", {})}
    return plan_of(
        TINYLLAMA, A100, data={"seq_len": 1024}, batch=batch, parallel=parallel, memory={"gradient_checkpointing": True}, **sections
    )


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "lora"}], ids=["full", "lora"])
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_replay_is_told_what_the_phases_hold(stage: int, micro_steps: int, method: dict[str, Any]) -> None:
    plan = plan_stage(stage, micro_steps, method=method)
    work, sharding = make_workload(plan.recipe, plan.shape, plan.layout, plan.batch), make_sharding(plan.layout, plan.deepspeed)
    states = make_states(count_states(work), sharding, width=2, optimizer=Optimizer(name="adamw"), micro_steps=micro_steps)
    told = replay(tell_step(work, states, sharding, stage < 2, micro_steps).events, expandable=False)
    held = allocated(plan)
    assert {"forward", "loss", "backward", "reduce", "optimizer step"} <= set(told)
    assert {name: told[name][1] / MIB for name in told} == {name: pytest.approx(held[name] / MIB, abs=ROOM / MIB) for name in told}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_cache_is_emptied_at_the_start_alone(stage: int, offload: bool) -> None:
    """An event of no size empties it."""
    plan = plan_stage(stage, 1, parallel={"offload_optimizer": offload})
    work, sharding = make_workload(plan.recipe, plan.shape, plan.layout, plan.batch), make_sharding(plan.layout, plan.deepspeed)
    states = make_states(count_states(work), sharding, width=2, optimizer=Optimizer(name="adamw"), micro_steps=1)
    assert [phase for phase, size, _ in tell_step(work, states, sharding, stage < 2, 1).events if size == 0] == ["engine start"]


def test_a_bucket_that_fills_in_the_backward_pass_is_copied_beside_the_activations() -> None:
    """1.1 billion gradients in buckets of half a billion: stage 2 reduces while it goes back; adapters wait for the end."""
    whole, adapters = (
        {c.name: c.bytes for phase in plan_stage(2, 1, method=method).memory.phases if phase.name == "backward" for c in phase.components}
        for method in ({"kind": "full"}, {"kind": "lora"})
    )
    assert whole["step workspace"] == 2 * 500_000_000 and "step workspace" not in adapters


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_masters_are_made_on_the_host(stage: int) -> None:
    """The device's part of the engine's start: stage 2 flattens its weights and clones a part, stage 3 takes nothing."""
    held = allocated(plan_stage(stage, 1, parallel={"offload_optimizer": True}))
    weights = 1_100_048_384 * 2
    assert held["engine start"] < (2.1 * weights if stage == 2 else weights)


def test_where_the_device_has_no_room_a_group_is_flattened_on_the_host() -> None:
    """Weights of 2.05 GiB and their copy on devices of 8 and 4.25 GiB: DeepSpeed looks before it flattens."""
    starts = []
    for size in (8 * GIB, int(4.25 * GIB)):
        cluster = A100.model_copy(update={"device_memory": size})
        plan = plan_of(TINYLLAMA, cluster, data={"seq_len": 128}, batch={"micro_batch_size": 1, "global_batch_size": 4},
                       parallel={"zero_stage": 2, "offload_optimizer": True})  # fmt: skip
        starts.append(allocated(plan)["engine start"] / GIB)
    assert starts == [pytest.approx(2 * 2.05, abs=0.02), pytest.approx(1.25 * 2.05, abs=0.02)], "or only a rank's part is cloned"
