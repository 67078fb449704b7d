"""The plan's states, buckets and peaks against the tensors of real DeepSpeed engines: gloo, CPU, a tiny model, every stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measure import measure_training
from ranks import Ranks
from test_referee import workload
from tiny import plan_tiny

from launcher.plan import Plan, states
from launcher.plan.budget import Phase
from launcher.plan.states import UPDATE_ON_CPU


def tensors(phase: Phase, *but: str) -> int:
    return sum(part.bytes for part in phase.components if part.counts_in == "allocated" and part.name not in but)


def phases_of(plan: Plan) -> dict[str, Phase]:
    return {phase.name: phase for phase in plan.memory.phases}


def steady(plan: Plan) -> int:
    """Bytes that are held after an optimizer step."""
    return tensors(phases_of(plan)["optimizer step"], "step workspace")


def measured(ranks: Ranks, tiny: Path, run_dir: Path, **sections: Any) -> tuple[Plan, dict[str, Any]]:
    micro_steps = sections.pop("micro_steps", 1)
    sections = {"batch": {"global_batch_size": 2 * micro_steps * ranks.size, "micro_batch_size": 2}} | sections
    plan = plan_tiny(tiny, run_dir, ranks=ranks.size, **sections)
    if plan.layout.zero_stage == 3:
        plan = plan_again(plan)
    answers = ranks.run(measure_training, plan)
    # The rank that holds most: padding makes parts equal, so it is any of them but for what the last one lacks.
    return plan, max(answers, key=lambda answer: answer["after"]["step 2"])


def plan_again(plan: Plan) -> Plan:
    """Predicted once more, because plan_tiny lowers a threshold of DeepSpeed's configuration after planning."""
    from dataclasses import replace

    from launcher.plan.memory import predict_memory

    memory = predict_memory(plan.recipe, plan.shape, plan.layout, plan.batch, plan.cluster, deepspeed=plan.deepspeed)
    return replace(plan, memory=memory)


STAGES = [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_held_after_a_step(stage: int, kind: str, dtype: str, tiny: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    """Weights, adapters, masters, optimizer states, persistent buckets: every tensor, within a thousandth (counters, norms)."""
    plan, found = measured(two_ranks, tiny, tmp_path / "run", method={"kind": kind}, model={"name_or_path": str(tiny / "model"), "dtype": dtype},
                           parallel={"zero_stage": stage})  # fmt: skip
    assert steady(plan) == pytest.approx(found["after"]["step 2"], rel=1e-3)
    peak = tensors(phases_of(plan)["optimizer step"])
    assert peak == pytest.approx(found["peaks"]["step 2"], rel=0.01), "the optimizer step's transients"
    assert peak == pytest.approx(found["peaks"]["step 3"], rel=0.01)


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_peak_of_forward_and_backward(stage: int, micro_steps: int, tiny: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    """Activations, gradients, the bucket and its reduction over a whole step, within 3 %."""
    plan, found = measured(two_ranks, tiny, tmp_path / "run", parallel={"zero_stage": stage}, micro_steps=micro_steps)
    told = max(tensors(phases_of(plan)[name]) for name in ("forward", "loss", "backward", "reduce"))
    seen = max(found["peaks"][name] for name in ("forward 2", "backward 2", "forward 3", "backward 3"))
    assert told == pytest.approx(seen, rel=0.03)


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {}), ("sgd", {}), ("sgd", {"momentum": 0.9}), ("sgd", {"weight_decay": 0.0}), ("adafactor", {}), ("adamw_8bit", {}),
    ("lion", {}), ("lion_8bit", {}), ("paged_adamw", {}), ("paged_adamw_8bit", {}),
]  # fmt: skip
ON_HOST = [(name, sections) for name, sections in OPTIMIZERS if name in ("adamw", "sgd", "adafactor")]
"""The others are bitsandbytes', and no recipe may move their states (launcher/recipe_file.py)."""


@pytest.fixture
def seen_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Predictions without what bitsandbytes' operators take inside, which the ranks' dispatch mode does not see; it is measured below."""
    monkeypatch.setattr(states, "UPDATE_ON_CPU", states.UPDATE)
    states._make_states.cache_clear()
    yield
    states._make_states.cache_clear()


def assert_held_and_peak(plan: Plan, found: dict[str, Any]) -> None:
    assert steady(plan) == pytest.approx(found["after"]["step 2"], rel=1e-3)
    peak = tensors(phases_of(plan)["optimizer step"])
    for step in ("step 2", "step 3"):
        assert peak == pytest.approx(found["peaks"][step], rel=0.01)


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.long), 3])
@pytest.mark.parametrize(("name", "sections"), OPTIMIZERS, ids=str)
def test_every_optimizer(
    name: str, sections: dict[str, Any], stage: int, tiny: Path, tmp_path: Path, one_rank: Ranks, seen_alone: None
) -> None:
    """Its states, and what its step takes: the recipe's weights decay."""
    for dtype in ("bf16", "fp32"):
        plan, found = measured(one_rank, tiny, tmp_path / dtype, optim={"name": name, **sections}, parallel={"zero_stage": stage},
                               model={"name_or_path": str(tiny / "model"), "dtype": dtype})  # fmt: skip
        assert_held_and_peak(plan, found)


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_bucket_comes_with_the_first_gradient(stage: int, kind: str, tiny: Path, tmp_path: Path, one_rank: Ranks) -> None:
    """Without checkpointing most is live before there is one; of a model that is smaller than its bucket."""
    plan, found = measured(one_rank, tiny, tmp_path / "run", method={"kind": kind}, parallel={"zero_stage": stage}, data={"packing": False},
                           memory={"gradient_checkpointing": False}, batch={"global_batch_size": 1, "micro_batch_size": 1})  # fmt: skip
    told = max(tensors(phases_of(plan)[name]) for name in ("forward", "loss", "backward", "reduce"))
    assert told == pytest.approx(max(found["peaks"][name] for name in ("forward 2", "backward 2")), rel=0.03)


@pytest.mark.parametrize(
    ("stage", "offloaded", "name", "sections"),
    [pytest.param(stage, offloaded, name, sections, marks=() if name == "adamw" or "param" in offloaded else pytest.mark.long)
     for stage, offloaded in ((1, ["optimizer"]), (2, ["optimizer"]), (3, ["optimizer"]), (3, ["optimizer", "param"]))
     for name, sections in ON_HOST],
    ids=str,
)  # fmt: skip
def test_every_optimizer_on_the_host(
    name: str, sections: dict[str, Any], stage: int, offloaded: list[str], tiny: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    """On a CPU the host is the device: all that is offloaded is there too, and what its update takes."""
    parallel = {"zero_stage": stage, **{f"offload_{what}": True for what in offloaded}}
    for dtype in ("bf16", "fp32"):
        plan, found = measured(two_ranks, tiny, tmp_path / dtype, optim={"name": name, **sections}, parallel=parallel,
                               model={"name_or_path": str(tiny / "model"), "dtype": dtype})  # fmt: skip
        assert_held_and_peak(plan, found)


def test_a_gpu_decays_all_gradients_at_once() -> None:
    """torch's foreach makes a list of new gradients, a loop on the CPU one at a time; and what lies on the host is updated there."""
    counts = states.count_states(workload("llama"))
    sharding = states.Sharding(ranks=1, stage=0, bucket=1 << 20, overlap=False, offload_optimizer=False, offload_param=False)

    def make(decays: bool, *, on_cpu: bool, **changes: Any) -> states.States:
        optimizer = states.Optimizer(name="sgd", decays=decays)
        return states.make_states(counts, replace(sharding, **changes), width=2, optimizer=optimizer, micro_steps=1, on_cpu=on_cpu)

    for on_cpu, taken in ((False, sum(counts.decayed)), (True, max(counts.decayed))):
        assert make(True, on_cpu=on_cpu).step_peak - make(False, on_cpu=on_cpu).step_peak == 4 * taken
    offloaded = make(True, on_cpu=False, stage=2, offload_optimizer=True)
    assert (offloaded.step_peak, offloaded.host_step) == (0, 4 * sum(counts.decayed))


@pytest.mark.parametrize(
    ("name", "made"), [("adamw_8bit", "AdamW8bit"), ("lion_8bit", "Lion8bit"), ("paged_adamw", "AdamW"), ("lion", "Lion")]
)
def test_what_bitsandbytes_takes_for_a_moment_on_a_cpu(name: Any, made: str) -> None:
    """Its operators are one to a dispatch mode: the profiler sees into them. Of the second step, when the states are there."""
    import bitsandbytes
    import torch
    from torch.profiler import ProfilerActivity, profile

    weight = torch.nn.Parameter(torch.randn(1 << 20))
    weight.grad = torch.randn(1 << 20)
    optimizer = getattr(bitsandbytes.optim, made)([weight], lr=1e-3)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    sizes = read_allocations(profiler)
    live = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    assert max(live) == pytest.approx(UPDATE_ON_CPU[name] * weight.numel(), rel=0.01)


@pytest.mark.parametrize("width", [2, 4], ids=["bf16", "fp32"])
def test_what_8_bits_take_for_a_moment_on_a_cpu(width: int) -> None:
    """A product of LLM.int8() forward and backward, against the tape's: rows are few, so that the dense weight and its copies in fp32 are the peak."""
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params, Linear8bitLt
    from torch.profiler import ProfilerActivity, profile

    from launcher.plan.linears import Linear, linear
    from launcher.plan.tape import Sink, Tape, Tensor, backward

    dtype = {2: torch.bfloat16, 4: torch.float32}[width]
    layer = Linear8bitLt(512, 1024, bias=False, has_fp16_weights=False, threshold=6.0)
    code, scales, _ = int8_vectorwise_quant(torch.randn(1024, 512, dtype=torch.float16))
    layer.weight = Int8Params(code, requires_grad=False, has_fp16_weights=False, CB=code, SCB=scales)
    rows = torch.randn(4, 512, dtype=dtype, requires_grad=True)
    layer(rows).sum().backward()  # the first takes the weight for its state
    rows.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer(rows).sum().backward()
    sizes = read_allocations(profiler)
    tape = Tape(on_cuda=False, round_to=64)
    out = linear(tape, Tensor(tape.new(4 * 512, width).storage, 4 * 512, width, Sink()), Linear(512, 1024, width, trained=False, bits=8))
    backward(tape, out)
    dense = 512 * 1024 * width
    told = max(peak for peak, _ in tape.peaks.values())
    assert told == pytest.approx(max(sum(sizes[: index + 1]) for index in range(len(sizes))), rel=0.03) and told > dense


def read_allocations(profiler: Any) -> list[int]:
    """Bytes that were made, or below zero freed, in the order of time."""
    from torch._C._profiler import _EventType

    found: list[tuple[int, int]] = []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
        waiting += event.children
    return [size for _, size in sorted(found)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantised_base(bits: int, double_quant: bool, tiny: Path, tmp_path: Path, one_rank: Ranks) -> None:
    method: dict[str, Any] = {"kind": "qlora", "bits": bits, "double_quant": double_quant}
    plan, found = measured(one_rank, tiny, tmp_path / "run", method=method, model={"name_or_path": str(tiny / "model"), "dtype": "bf16"})
    assert steady(plan) == pytest.approx(found["after"]["step 2"], rel=0.01)


@pytest.mark.parametrize("method", [{"kind": "qlora", "bits": 4}, {"kind": "qlora", "bits": 8}, {"kind": "lora", "dora": True},
                                    {"kind": "lora", "init": "pissa"}], ids=str)  # fmt: skip
def test_a_model_is_sharded_as_it_loads(method: dict[str, Any], tiny: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    """Two ranks, ZeRO-3: once loaded, and after steps, each holds its part of the base's weights and nothing of the other's."""
    sections: dict[str, Any] = {"method": method, "model": {"name_or_path": str(tiny / "model"), "dtype": "bf16"}}
    plan, found = measured(two_ranks, tiny, tmp_path / "run", parallel={"zero_stage": 3}, **sections)
    load = phases_of(plan)["load"]
    # Adapters are whole until the engine shards them.
    adapters = next(part.bytes for part in load.components if part.name == "adapters")
    assert tensors(load, "gathered parameters", "step workspace") + adapters == pytest.approx(found["after"]["load"], rel=0.05)
    assert steady(plan) == pytest.approx(found["after"]["step 2"], rel=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_offloaded_on_a_cpu_stays_in_the_same_memory(stage: int, tiny: Path, tmp_path: Path, one_rank: Ranks) -> None:
    plan, found = measured(one_rank, tiny, tmp_path / "run", parallel={"zero_stage": stage, "offload_optimizer": True})
    held = next(c.bytes for c in phases_of(plan)["optimizer step"].components if c.name == "optimizer states")
    assert held > 16 * plan.shape.num_params and held < found["after"]["step 2"]
    assert steady(plan) == pytest.approx(found["after"]["step 2"], rel=0.02)
    assert plan.memory.host.p50 >= found["after"]["step 2"], "a CPU's host phases are its devices'"
