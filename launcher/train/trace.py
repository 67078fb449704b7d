"""What a training step holds, seen by running it on the meta device: every storage, from the operator that makes it to its end.

It needs no GPU and no weights, and is exact where a kernel's own memory is told here: attention, dropout and bitsandbytes'
products are replaced by stand-ins that keep what the CUDA kernels keep. The plan's arithmetic (launcher/plan/tape.py) is
held to it, byte for byte, by tests/test_referee.py; a model whose architecture the plan has no arithmetic for is traced
(launcher/train/profiling.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.plan.allocator import round_up
from launcher.plan.losses import liger_chunk

aten = torch.ops.aten
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Event:
    """A storage that begins (size > 0) or ends (size < 0)."""

    phase: str
    size: int
    storage: int
    op: str


@dataclass(slots=True)
class Trace:
    """Live bytes over a step. What was there before is not counted."""

    events: list[Event] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    live: int = 0


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages of meta (or real CPU) tensors. `answers` is what a tensor's value is where code asks for it."""

    def __init__(self, trace: Trace, *, round_to: int, answer: bool, counted: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.round_to, self.answer, self.counted = trace, round_to, answer, counted
        self.phase = "forward"
        self.known: dict[int, int] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self.known[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self.answer if args[0].dtype == torch.bool else 1
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.counted:
                self._see(leaf, str(func))
        return out

    def _see(self, tensor: torch.Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = round_up(storage.nbytes(), self.round_to)
        if not size:
            return
        self.known[key] = size
        weakref.finalize(storage, self._end, key)
        trace = self.trace
        trace.live += size
        trace.events.append(Event(self.phase, size, key, op))
        if trace.live > trace.peaks.get(self.phase, 0):
            trace.peaks[self.phase] = trace.live

    def _end(self, key: int) -> None:
        size = self.known.pop(key, 0)
        self.trace.live -= size
        self.trace.events.append(Event(self.phase, -size, key, ""))


class _Kernels(TorchFunctionMode):
    """Calls that would take another path on the meta device than on the device that is asked about.

    torch turns function modes off inside backward, so recomputation needs it once more: see `checkpoint_as_on`.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attend(*args, device=self.device, **kwargs)
        if func is F.dropout and self.device == "cuda":
            return _drop(*args, **kwargs)
        return func(*args, **kwargs)


def _drop(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    # On CUDA a fused kernel keeps a mask of one byte an element; elsewhere the mask has the input's dtype.
    if p == 0.0 or not training:
        return input
    dropped: torch.Tensor = aten.native_dropout(input, p, True)[0]
    return dropped


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    device: Device,
) -> torch.Tensor:
    """Scaled dot product attention with the memory of the kernel torch 2.13 picks (aten/native/transformers/sdp_utils).

    CUDA: flash without a mask in 16 bits where values are as wide as keys, else the memory-efficient kernel with the mask as a bias in the query's dtype.
    CPU: the fused kernel, which takes a mask that needs no gradient, and neither dropout nor values of another width; the plain one there.
    """
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.where(attn_mask, torch.zeros((), dtype=query.dtype, device=query.device), float("-inf"))
    even = query.shape[-1] == value.shape[-1]
    if device == "cpu":
        if dropout_p or not even or (bias is not None and bias.requires_grad):
            plain: torch.Tensor = aten._scaled_dot_product_attention_math(
                query, key, value, bias, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
            return plain
        out: torch.Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
        )[0]
        return out
    if bias is None and query.dtype != torch.float32 and even:
        flash: torch.Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return flash
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    efficient: torch.Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]
    return efficient


class _FusedLoss(torch.autograd.Function):
    """Liger's fused head and loss (liger-kernel 0.8.5, ops/fused_linear_cross_entropy.py) as far as memory goes: gradients in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
        rows, words = len(hidden_RH), len(weight_VH)
        trains = hidden_RH.requires_grad
        grads = [torch.empty_like(hidden_RH), torch.empty_like(weight_VH) if trains and weight_VH.requires_grad else None,
                 torch.empty_like(bias_V) if trains and bias_V is not None else None]  # fmt: skip
        losses_R, kept_R = hidden_RH.new_empty(rows, dtype=torch.float32), hidden_RH.new_empty(rows, dtype=torch.bool)
        logits_CV = hidden_RH.new_empty(liger_chunk(rows, hidden_RH.shape[1], words), words)
        if grads[1] is not None and hidden_RH.dtype == torch.float32:
            torch.empty_like(weight_VH)
        if grads[2] is not None:
            torch.empty_like(grads[2])
        del logits_CV
        loss = losses_R.sum()
        del losses_R, kept_R
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        return tuple(ctx.saved_tensors)


def fused_loss(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, targets_R: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """Stands for Liger's kernel, which needs a GPU (launcher.train.head.FusedLoss)."""
    loss: torch.Tensor = _FusedLoss.apply(hidden_RH, weight_VH, bias_V)  # type: ignore[no-untyped-call]
    return loss


@contextmanager
def watching(trace: Trace, *, device: Device, packed: bool = False, round_to: int = 512, kernels: bool = True) -> Iterator[_Watch]:
    """Inside, every new storage is counted. `packed` answers the model's question whether a row holds several examples."""
    watch = _Watch(trace, round_to=round_to, answer=not packed, counted="meta" if kernels else device)
    if not kernels:
        with watch:
            yield watch
        return
    with _Kernels(device), watch:
        yield watch


def trace_step(
    model: torch.nn.Module, loss_of: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor], batch: dict[str, torch.Tensor], *, device: Device,
    packed: bool, keep_gradients: bool, trains: bool = True,
) -> Trace:  # fmt: skip
    """Forward and backward of one micro-batch, or forward alone without gradients. Gradients stay in their parameters, or go at once, as ZeRO-2
    and 3 have it."""
    trace = Trace()
    hooks = []
    if not keep_gradients:
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in model.parameters() if p.requires_grad]  # type: ignore[no-untyped-call]
    with watching(trace, device=device, packed=packed) as watch, torch.set_grad_enabled(trains):
        watch.ignore(model.parameters())
        watch.ignore(model.buffers())
        watch.ignore(batch.values())
        loss = loss_of(model, batch)
        if trains:
            watch.phase = "backward"
            torch.autograd.backward(loss)
        watch.phase = "end"
        del loss
    for hook in hooks:
        hook.remove()
    return trace


def checkpoint_as_on(model: Any, device: Device) -> None:
    """Gradient checkpointing as the launcher's runs have it (non-reentrant), with the device's kernels in recomputation too."""
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), _Kernels(device))})


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
