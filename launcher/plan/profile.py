"""The peaks of a micro-step, phase by phase and kind by kind, from the tape; kept, because a search asks for the same ones often."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from launcher.plan.forward import layer_type, uses_rope
from launcher.plan.losses import LOSS_CHUNK
from launcher.plan.shape import ModelShape, read_text_part
from launcher.plan.step import recorded_step, run_step
from launcher.plan.tape import KINDS
from launcher.plan.workload import Workload

Peak = dict[str, int]
"""Bytes by what they are (launcher.plan.tape.KINDS) at the moment when most was live."""

FEWEST_LAYERS = 3
"""A deep model's peaks are taken from two small depths for a search: each peak is the larger of several lines in depth, so this is never
too high, and what a search lets through is computed in full (solve.choose). A model whose layers repeat only after more than two is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Peaks of forward, loss (there and back) and backward. Weights and states are not in it."""

    forward: Peak
    loss: Peak
    backward: Peak
    """Once a trained weight has its gradient."""
    early_backward: Peak = field(default_factory=dict)
    """Before that."""
    host_checkpoints: int = 0
    """Checkpoints that were moved to host memory."""
    is_traced: bool = False


@lru_cache(maxsize=512)
def profile_step(work: Workload, *, keep_gradients: bool, gradients_exist: bool = False, exact: bool = True) -> StepProfile:
    """The profile of a training micro-step. Not `exact`: a deep model's is extrapolated."""
    layers, period = work.shape.num_layers, find_period(work.shape)
    shallow = FEWEST_LAYERS + (layers - FEWEST_LAYERS) % period
    deep = shallow + 2
    uneven = work.shape.is_pair and work.shape.total_layers != 2 * layers
    if exact or layers <= 2 * deep or period > 2 or uneven:
        return _profile(work, None, keep_gradients, gradients_exist)
    few, more = (_profile(work, depth, keep_gradients, gradients_exist) for depth in (shallow, deep))

    def extend(few: Peak, more: Peak) -> Peak:
        return {kind: more[kind] + (more[kind] - few[kind]) * (layers - deep) // (deep - shallow) for kind in more if kind in few}

    return StepProfile(forward=extend(few.forward, more.forward), loss=extend(few.loss, more.loss), backward=extend(few.backward, more.backward),
                       early_backward=extend(few.early_backward, more.early_backward),
                       host_checkpoints=extend({"": few.host_checkpoints}, {"": more.host_checkpoints})[""])  # fmt: skip


ROUNDING = 16 << 20
"""More than the 512 bytes that each live tensor may be rounded up by."""


def bound_step(work: Workload, two: Workload, three: Workload, *, keep_gradients: bool, gradients_exist: bool) -> int:
    """Bytes that a micro-step of this many rows takes at least, from those of two and three rows; 0 where that tells nothing.

    What is live at a moment is linear in the rows, so that a peak, the most of all moments, is convex: it lies above the line through
    two others. Kernels that change with the number of rows are left out, and so is the backward pass, which `profile_step` only bounds.
    """
    alike = two.is_dequantised == three.is_dequantised and (
        work.loss == "plain" or (work.loss == "chunked" and two.loss_rows >= LOSS_CHUNK)
    )
    rows = work.micro_batch_size
    if rows <= three.micro_batch_size or not alike:
        return 0
    few, more = (profile_step(w, keep_gradients=keep_gradients, gradients_exist=gradients_exist, exact=False) for w in (two, three))
    peaks = ((sum(few.forward.values()), sum(more.forward.values())), (sum(few.loss.values()), sum(more.loss.values())))
    return max(0, max(b + (b - a) * (rows - 3) for a, b in peaks) - ROUNDING * (rows - 2))


@lru_cache(maxsize=64)
def find_period(shape: ModelShape) -> int:
    """After how many layers a model's layers are the same again; their number where they never are."""
    config = read_text_part(shape.config)
    skips_rope = shape.model_type.startswith(("smollm3", "llama4"))
    weights = {layer: number for number, block in enumerate(shape.inventory) for layer in block.layers}
    kinds = [(weights.get(i), layer_type(config, i), skips_rope and uses_rope(config, i)) for i in range(shape.num_layers)]
    return next((p for p in range(1, shape.num_layers) if kinds[p:] == kinds[:-p]), shape.num_layers)


def _profile(work: Workload, layers: int | None, keep_gradients: bool, gradients_exist: bool) -> StepProfile:
    if layers is None:
        tape = recorded_step(work, keep_gradients=keep_gradients, gradients_exist=gradients_exist)
    else:
        tape = run_step(work, layers, keep_gradients=keep_gradients, gradients_exist=gradients_exist)
    peaks = tape.peaks
    loss = max((peaks[name] for name in ("loss", "loss backward") if name in peaks), key=lambda peak: peak[0])
    return StepProfile(forward=_by_kind(peaks["forward"]), loss=_by_kind(loss), backward=_by_kind(peaks.get("backward", loss)),
                       early_backward=_by_kind(peaks["early backward"]) if "early backward" in peaks else {}, host_checkpoints=tape.on_host)  # fmt: skip


@lru_cache(maxsize=512)
def profile_evaluation(work: Workload) -> Peak:
    """The peak of a forward pass without gradients, and its loss. The same at any depth from the second layer on."""
    tape = run_step(work, min(4, work.shape.num_layers), keep_gradients=False, train=False)
    return _by_kind(max(tape.peaks.values(), key=lambda peak: peak[0]))


def _by_kind(peak: tuple[int, list[int]]) -> Peak:
    return dict(zip(KINDS, peak[1], strict=True))
