"""A run beside its plan: held to its budget, compared after the first steps, and what was seen told wherever the run is."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ranks import Ranks, fine_tune
from tiny import plan_tiny

from launcher.plan.budget import STEPPING
from launcher.progress import describe_event
from launcher.train import budget
from launcher.train.budget import (
    Reading,
    count_mapped,
    describe_miss,
    limit_memory,
    outside_allocator,
    read_figures,
    read_resident,
    return_heap,
)

MIB = 1 << 20


def test_a_cpu_worker_that_passes_its_budget_is_ended_with_the_numbers(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    plan = plan_tiny(tiny, tmp_path, memory={"budget": "50MiB"})
    with pytest.raises(AssertionError, match=r"OutOfMemory: rank [01] took .*iB .*, and memory.budget is 50.0 MiB \(planned: "):
        two_ranks.run(fine_tune, plan)
    assert two_ranks.run(fine_tune, plan_tiny(tiny, tmp_path, memory={"budget": "64GiB"}))[0], (
        "the ranks are still there, and a large budget is none"
    )


def test_a_run_compares_itself_with_its_plan_once(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    plan = plan_tiny(tiny, tmp_path)
    events = two_ranks.run(fine_tune, plan)[0]
    (event,) = [event for event in events if event["event"] == "memory"]
    steps = [event.get("step") for event in events[: events.index(event)] if event["event"] == "step"]
    assert event["step"] == budget.COMPARED_AFTER_STEPS == steps[-1]
    ((name, figure),) = event["figures"].items()
    assert name == "resident growth" and figure["measured"] > 0 < figure["predicted"] <= figure["predicted_p95"]
    assert figure["error"] == pytest.approx(figure["measured"] / figure["predicted"] - 1)
    assert describe_event(event).startswith("memory: resident growth ") and "planned" in describe_event(event)
    warned = [event["text"] for event in events if event["event"] == "note" and event["text"].startswith("warning: resident growth")]
    seen = Reading(name=name, predicted=figure["predicted"], predicted_p95=figure["predicted_p95"], measured=figure["measured"])
    assert len(warned) == budget.is_miss(seen)


def test_what_was_planned_is_the_steps_without_libraries_and_loading(tiny: Path, tmp_path: Path) -> None:
    plan = plan_tiny(tiny, tmp_path)
    (reading,) = read_figures(plan, 0)
    stepping = [phase for phase in plan.memory.phases if phase.name in STEPPING]
    assert stepping and reading.predicted == max(phase.reserved_bytes for phase in stepping)
    assert all(part.counts_in == "total" for phase in stepping for part in phase.components if part.name == "libraries")


def test_the_peak_of_what_was_allocated_is_seen_though_it_is_gone() -> None:
    """In a process of its own: 200 MiB are taken and given back; the peak stays until it is forgotten."""
    code = """
import torch
from launcher.train.budget import forget_peak, read_anonymous, read_peak_anonymous
forget_peak()
base = read_anonymous()
torch.ones(200 << 18)
peak, now = read_peak_anonymous() - base, read_anonymous() - base
forget_peak()
print(peak >> 20, now >> 20, (read_peak_anonymous() - base) >> 20)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, now, forgotten = map(int, answer.stdout.split())
    assert 198 <= peak <= 210 and abs(now) <= 10 and abs(forgotten) <= 10


@pytest.mark.parametrize(
    ("measured", "told"),
    [(115, "15% more, within its P95"), (130, "30% more, beyond its P95"), (80, "20% less")],
)  # fmt: skip
def test_a_miss_is_told_with_its_direction(measured: int, told: str) -> None:
    reading = Reading(name="allocated", predicted=100 * MIB, predicted_p95=120 * MIB, measured=measured * MIB)
    assert describe_miss(reading) == f"warning: allocated: {measured}.0 MiB measured, 100.0 MiB predicted: {told}"


@pytest.mark.parametrize(
    ("name", "predicted", "measured", "miss"),
    [("allocated", 100, 109, False), ("allocated", 100, 111, True), ("allocated", 100, 89, True), ("resident growth", 100, 130, False),
     ("resident growth", 100, 140, True), ("resident growth", 1000, 1120, True), ("resident growth", 10_000, 10_900, False)],
)  # fmt: skip
def test_what_counts_as_a_miss(name: str, predicted: int, measured: int, miss: bool) -> None:
    assert budget.is_miss(Reading(name=name, predicted=predicted * MIB, predicted_p95=predicted * MIB, measured=measured * MIB)) == miss


def test_on_a_gpu_torch_is_told_what_the_budget_leaves_its_allocator(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda is replaced: there is no GPU where this runs."""
    import dataclasses

    import torch

    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    on_cpu = plan_tiny(tiny, tmp_path, memory={"budget": "20GiB"})
    limit_memory(on_cpu)
    assert fractions == []
    plan = dataclasses.replace(on_cpu, layout=dataclasses.replace(on_cpu.layout, accelerator="cuda"))
    limit_memory(plan)
    assert fractions == [((20 << 30) - outside_allocator(plan.memory)) / (80 << 30)] and outside_allocator(plan.memory) > 0
    limit_memory(
        dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"memory": plan.recipe.memory.model_copy(update={"budget": None})}))
    )
    assert len(fractions) == 1


def test_weights_that_lie_in_a_mapped_file_are_counted(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * (8 * MIB))
    mapped = torch.from_file(str(path), shared=True, size=8 * MIB, dtype=torch.uint8)
    assert count_mapped([mapped[: 3 * MIB], torch.zeros(MIB)], [path]) == 3 * MIB
    assert count_mapped([mapped], [tmp_path / "other"]) == 0


def test_onednn_is_told_how_many_products_to_keep(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 60 lengths in a process of its own: what it grows by stays near what the plan has, and does not without the bound."""
    plan = plan_tiny(tiny, tmp_path, ranks=1, model={"name_or_path": str(tiny / "model"), "dtype": "bf16"})
    plan.save(tmp_path / "plan.json")
    (phase,) = [phase for phase in plan.memory.phases if phase.name == "backward"]
    (part,) = [part for part in phase.components if part.name == "library workspace"]
    code = """
import sys, torch
from pathlib import Path
from launcher.plan import load_plan
from launcher.train.budget import bound_compiled_products, read_anonymous
if sys.argv[2] == "bounded":
    bound_compiled_products(load_plan(Path(sys.argv[1])))
torch.set_num_threads(1)
weight, rows = torch.randn(192, 96).bfloat16(), torch.randn(700, 96).bfloat16()
for length in range(32, 64):
    rows[:length] @ weight.T
base = read_anonymous()
for length in range(100, 500):
    rows[:length] @ weight.T
print(read_anonymous() - base)
"""
    grown = {
        mode: int(subprocess.run([sys.executable, "-c", code, str(tmp_path / "plan.json"), mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("bounded", "free")
    }  # fmt: skip
    from launcher.cluster import cpu_has_bf16

    if cpu_has_bf16():  # without, torch has its own kernels
        assert grown["bounded"] < 2 * part.bytes and grown["free"] > 4 * grown["bounded"]


def test_what_loading_freed_goes_back_to_the_system() -> None:
    """Blocks below one that stays are what glibc keeps."""

    def load() -> bytearray:
        blocks = [bytearray(64 << 10) for _ in range(2048)]
        return blocks[-1]

    with ThreadPoolExecutor(1) as threads:
        kept = threads.submit(load).result()
        held = read_resident()
        return_heap()
        assert held - read_resident() > 64 << 20
        assert len(kept) == 64 << 10
