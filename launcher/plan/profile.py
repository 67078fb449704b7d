"""The peaks of a micro-step, phase by phase and kind by kind, from the tape; kept, because a search asks for the same ones often."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from launcher.plan.step import recorded_step, run_step
from launcher.plan.tape import KINDS
from launcher.plan.workload import Workload

Peak = dict[str, int]
"""Bytes by what they are (launcher.plan.tape.KINDS) at the moment when most was live."""

FAST_LAYERS = (4, 8)
"""A deep model's peaks are taken from these two depths for a search: each is the larger of several lines in depth, so this is
never too high, and what a search lets through is computed in full (solve.choose)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Peaks of forward, loss (there and back) and backward. Weights and states are not in it."""

    forward: Peak
    loss: Peak
    backward: Peak
    host_checkpoints: int = 0
    """Checkpoints that were moved to host memory."""
    is_traced: bool = False


@lru_cache(maxsize=512)
def profile_step(work: Workload, *, keep_gradients: bool, gradients_exist: bool = False, exact: bool = True) -> StepProfile:
    """The profile of a training micro-step. Not `exact`: a deep model's is extrapolated."""
    layers = work.shape.num_layers
    if exact or layers <= 2 * FAST_LAYERS[1]:
        return _profile(work, None, keep_gradients, gradients_exist)
    few, more = (_profile(work, depth, keep_gradients, gradients_exist) for depth in FAST_LAYERS)
    return StepProfile(forward=_extend(few.forward, more.forward, layers), loss=_extend(few.loss, more.loss, layers),
                       backward=_extend(few.backward, more.backward, layers),
                       host_checkpoints=_extend({"": few.host_checkpoints}, {"": more.host_checkpoints}, layers)[""])  # fmt: skip


def _extend(few: Peak, more: Peak, layers: int) -> Peak:
    shallow, deep = FAST_LAYERS
    return {kind: more[kind] + (more[kind] - few[kind]) * (layers - deep) // (deep - shallow) for kind in more}


def _profile(work: Workload, layers: int | None, keep_gradients: bool, gradients_exist: bool) -> StepProfile:
    if layers is None:
        tape = recorded_step(work, keep_gradients=keep_gradients, gradients_exist=gradients_exist)
    else:
        tape = run_step(work, layers, keep_gradients=keep_gradients, gradients_exist=gradients_exist)
    peaks = tape.peaks
    loss = max((peaks["loss"], peaks["loss backward"]), key=lambda peak: peak[0])
    return StepProfile(forward=_by_kind(peaks["forward"]), loss=_by_kind(loss), backward=_by_kind(peaks.get("backward", peaks["loss backward"])),
                       host_checkpoints=tape.on_host)  # fmt: skip


@lru_cache(maxsize=512)
def profile_evaluation(work: Workload) -> Peak:
    """The peak of a forward pass without gradients, and its loss. The same at any depth from the second layer on."""
    tape = run_step(work, min(4, work.shape.num_layers), keep_gradients=False, train=False)
    return _by_kind(max(tape.peaks.values(), key=lambda peak: peak[0]))


def _by_kind(peak: tuple[int, list[int]]) -> Peak:
    return dict(zip(KINDS, peak[1], strict=True))
