"""What a run takes of memory, beside what it was planned with: held to `memory.budget`, and compared after the first steps.

On a GPU the driver is asked to refuse what goes beyond the budget (torch's per-process fraction), so it is never passed.
On a CPU nothing refuses: the resident memory is read after every step, and a run that passed the budget is ended then.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.errors import OutOfMemory
from launcher.plan import Plan
from launcher.plan.budget import STEPPING, FigureName, MemoryPlan
from launcher.plan.heap import ENVIRONMENT, LOADING_THRESHOLD, choose_threshold
from launcher.plan.memory import make_workload
from launcher.plan.products import count_kept
from launcher.recipe import Lora, QLora
from launcher.run import Event
from launcher.train.foreign import SMALLER
from launcher.train.model import list_loaded_files
from launcher.train.state import TrainState
from launcher.units import format_bytes

COMPARED_AFTER_STEPS = 3
"""The first step allocates the optimizer's states, and ZeRO-3 prefetches from the third on (deepspeed 0.19.8)."""
WARN_BEYOND = 0.10
BESIDE = 32 << 20
"""Bytes by which a CPU worker grows beside its model, however small that is (MKL's buffers, DeepSpeed's and Python's own objects): 17 MiB were
measured in fp32 over a model of 7 MiB."""
LATE_IMPORTS = ("functorch.compile", "torch._inductor.compile_fx", "deepspeed.module_inject.auto_ep_layer")
"""What deepspeed 0.19.8 imports with the first engine: 60 MiB, networkx and sympy among them."""
GROWTH = "resident growth"
BUILDING = ("load", "engine start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Bytes of one kind: what the plan expected, at P50 and P95, and what was seen on the rank that took most."""

    name: str
    predicted: int
    predicted_p95: int
    measured: int

    @property
    def error(self) -> float:
        """How far the measurement is above the prediction, as a share of it."""
        return self.measured / max(1, self.predicted) - 1.0


def limit_memory(plan: Plan) -> None:
    """Have torch refuse what would take this GPU beyond the recipe's budget. Nothing on a CPU, or without a budget."""
    budget = plan.recipe.memory.budget_bytes
    if budget is None or plan.layout.accelerator != "cuda":
        return
    _, total = torch.cuda.mem_get_info()
    # The fraction bounds what the allocator reserves; the context and NCCL come on top of it, as planned.
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (budget - outside_allocator(plan.memory)) / total)))


def bound_compiled_products(plan: Plan) -> None:
    """Let oneDNN keep the products of one micro-step and no more (launcher/plan/products.py). Call it before the first product.

    A number that the user has set stays.
    """
    if plan.layout.accelerator == "cpu":
        kept = str(count_kept(make_workload(plan.recipe, plan.shape, plan.layout, plan.batch)))
        for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
            os.environ.setdefault(variable, kept)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def bound_heap(plan: Plan, *, loading: bool) -> None:
    """Set glibc's two thresholds as the plan has them (launcher/plan/heap.py): otherwise what it keeps depends on what it freed before.

    What the user has set stays. Other C libraries have no such call.
    """
    others = {name: value for name, value in os.environ.items() if ENVIRONMENT.get(name) != value}
    if plan.layout.accelerator != "cpu" or any("MALLOC" in name or "glibc.malloc" in value for name, value in others.items()):
        return
    threshold = LOADING_THRESHOLD if loading else choose_threshold(make_workload(plan.recipe, plan.shape, plan.layout, plan.batch))
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, threshold)
        libc.mallopt(M_TRIM_THRESHOLD, threshold)


def outside_allocator(memory: MemoryPlan) -> int:
    """Bytes of the largest planned phase that no allocator of torch sees: the context, NCCL."""
    return max(phase.figure("total").p50 - phase.figure("reserved").p50 for phase in memory.phases)


class Watch:
    """The memory of one rank through its run."""

    def __init__(self, plan: Plan, rank: int, report: Callable[[Event], None]) -> None:
        self.plan, self.rank, self.report = plan, rank, report
        self.base = self.mapped = self.built_peak = 0
        self.steps = 0

    def start(self) -> None:
        """From here on, what the process takes is the model's: call it before the model is loaded."""
        limit_memory(self.plan)
        if self.plan.layout.accelerator == "cpu":
            _import_libraries(self.plan)
            self.check("before the model was loaded")
            self.base = read_anonymous()

    def built(self, model: torch.nn.Module) -> None:
        """The engine is there, around this model. On a CPU the peak begins anew: files that were mapped to load from are no part of a step's."""
        self.check("by the time the engine was built")
        if self.plan.layout.accelerator == "cuda":
            self.built_peak = torch.cuda.max_memory_allocated()
        if self.plan.layout.accelerator == "cpu":
            self.mapped = count_mapped(model.parameters(), list_loaded_files(self.plan))
            return_heap()
            bound_heap(self.plan, loading=False)
            forget_peak()

    def check(self, when: str) -> None:
        """Raises OutOfMemory where a CPU worker has passed the budget."""
        budget = self.plan.recipe.memory.budget_bytes
        if budget is None or self.plan.layout.accelerator != "cpu":
            return
        peak = read_peak_resident()
        if peak > budget:
            planned = self.plan.memory.device("total")
            raise OutOfMemory(
                f"rank {self.rank} took {format_bytes(peak)} {when}, and memory.budget is {format_bytes(budget)}"
                f" (planned: {format_bytes(planned.p50)}, at most {format_bytes(planned.p95)})",
                f"raise memory.budget; or {SMALLER}",
            )

    def after_step(self, state: TrainState, total_steps: int) -> TrainState:
        """Hold the run to its budget, and compare once. Every rank calls it after every step."""
        self.check(f"by step {state.step}")
        self.steps += 1
        if self.steps == COMPARED_AFTER_STEPS or (state.step == total_steps and self.steps < COMPARED_AFTER_STEPS):
            self._compare(state.step)
        return state

    def _compare(self, step: int) -> None:
        readings = _gather(read_figures(self.plan, self.base - self.mapped))
        figures = {reading.name: {"predicted": reading.predicted, "predicted_p95": reading.predicted_p95, "measured": reading.measured,
                                  "error": reading.error} for reading in readings}  # fmt: skip
        self.report({"event": "memory", "step": step, "figures": figures, "mapped_bytes": self.mapped, "built_peak_bytes": self.built_peak})
        for reading in readings:
            if is_miss(reading):
                self.report({"event": "note", "text": describe_miss(reading)})


def is_miss(reading: Reading) -> bool:
    """Whether a prediction is off by more than a tenth; on a CPU by more than BESIDE too."""
    least = BESIDE if reading.name == GROWTH else 0
    return abs(reading.error) > WARN_BEYOND and abs(reading.measured - reading.predicted) > least


def describe_miss(reading: Reading) -> str:
    """The warning for a prediction that is off by more than a tenth."""
    more = "more" if reading.error > 0 else "less"
    within = "" if reading.error < 0 else f", {'within' if reading.measured <= reading.predicted_p95 else 'beyond'} its P95"
    return (
        f"warning: {reading.name}: {format_bytes(reading.measured)} measured, {format_bytes(reading.predicted)} predicted:"
        f" {abs(reading.error):.0%} {more}{within}"
    )


def read_figures(plan: Plan, base: int) -> list[Reading]:
    """What was predicted for the phases so far and what this rank has taken, like with like.

    On a GPU: torch's two counters, and what the driver counts as used on the device (other processes on it included).
    On a CPU: the growth of the process' own memory, and the weights that lie in mapped files (frozen ones are not copied), from before
    the model was loaded to the peak of the steps, beside what the plan has for these but the libraries.
    """
    reached = STEPPING if plan.layout.accelerator == "cpu" else BUILDING + STEPPING

    def reading(label: str, figure: FigureName, measured: int) -> Reading:
        figures = [phase.figure(figure) for phase in plan.memory.phases if phase.name in reached]
        return Reading(name=label, predicted=max(f.p50 for f in figures), predicted_p95=max(f.p95 for f in figures), measured=measured)

    if plan.layout.accelerator == "cpu":
        return [reading(GROWTH, "reserved", read_peak_anonymous() - base)]
    free, total = torch.cuda.mem_get_info()
    return [
        reading("allocated", "allocated", torch.cuda.max_memory_allocated()),
        reading("reserved", "reserved", torch.cuda.max_memory_reserved()),
        reading("device total", "total", total - free),
    ]


def _gather(readings: list[Reading]) -> list[Reading]:
    """The readings of the rank that took most, of each kind."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    most = torch.tensor([reading.measured for reading in readings], dtype=torch.int64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return [
        Reading(name=r.name, predicted=r.predicted, predicted_p95=r.predicted_p95, measured=int(measured))
        for r, measured in zip(readings, most.tolist(), strict=True)
    ]


def _import_libraries(plan: Plan) -> None:
    """Import what loading, DeepSpeed's engine and the method will, so that it counts as libraries and not as the model's growth."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for module in LATE_IMPORTS:
        with suppress(ImportError):
            importlib.import_module(module)
    if plan.shape.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[plan.shape.model_type])
    if isinstance(plan.recipe.method, Lora | QLora):
        import peft  # noqa: F401
    if isinstance(plan.recipe.method, QLora) or "8bit" in plan.recipe.optim.name:
        import bitsandbytes  # noqa: F401


# ------------------------------------------------------------------------------------------- what the kernel says


def read_resident() -> int:
    """Bytes of this process in memory now."""
    return _read_status().get("VmRSS", read_peak_resident())


def read_peak_resident() -> int:
    """The most bytes of this process in memory so far (or since `forget_peak`)."""
    # Not ru_maxrss, where /proc is: through fork and exec a process inherits its parent's.
    return _read_status().get("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_anonymous() -> int:
    """Bytes of this process in memory now that are no file's: what it allocated."""
    return read_resident() - _mapped(_read_status())


def read_peak_anonymous() -> int:
    """The most of these so far, if files that are mapped now were mapped at that time."""
    return read_peak_resident() - _mapped(_read_status())


def count_mapped(tensors: Iterable[torch.Tensor], files: Iterable[Path]) -> int:
    """Bytes of the tensors that lie in these files, mapped: weights that were never copied out of them."""
    names = {str(file.resolve()) for file in files}
    ranges = []
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            words = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
            if len(words) == 6 and words[5].rstrip() in names:
                begin, end = words[0].split("-")
                ranges.append((int(begin, 16), int(end, 16)))
    return sum(t.nbytes for t in tensors if any(begin <= t.data_ptr() < end for begin, end in ranges))


def _mapped(status: dict[str, int]) -> int:
    return status.get("RssFile", 0) + status.get("RssShmem", 0)


def return_heap() -> None:
    """Give back to the system what was freed: loading's copies, made by several threads, each with a heap of its own that glibc keeps.
    The quickstart's worker is 120 to 350 MiB smaller for it. Other C libraries have no such call."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Begin the peak anew from what is resident now, where the kernel lets a process do so (Linux: proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then includes what came before: the comparison can only be too high


_FIELDS = ("VmRSS", "VmHWM", "RssFile", "RssShmem")


def _read_status() -> dict[str, int]:
    if not os.path.exists("/proc/self/status"):
        return {}
    fields: dict[str, Any] = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in _FIELDS if name in fields}
