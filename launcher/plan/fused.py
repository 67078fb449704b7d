"""Liger's kernels on the tape (liger-kernel 0.8.5, ops/*.py): norms, rotary embeddings and gated MLPs that write over what they may."""

from __future__ import annotations

from typing import Any

from launcher.plan.tape import Storage, Tape, Tensor

FUSED = frozenset({"llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "smollm3"})
"""Models whose layers Liger replaces by these, to the byte (tests/test_liger.py). Others are counted without, which takes more but for Llama 4
(3 %); of the mixtures whose experts it replaces (Mixtral, Qwen 3, DeepSeek) it is not known."""
FP32, PROGRAMS = 4, 132
"""Rows of partial sums of a norm's weight gradient, where it is trained: one a multiprocessor, as many as an H100 has."""


def fused_rms_norm(tape: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """Keeps its input and a scale a row; the input's gradient is written over the output's."""
    width, trained = weight.count, weight.node is not None
    out, scales = tape.new(x.count, x.width), tape.new(x.count // width, FP32)
    kept = [tape.save(x), tape.save(scales)] if x.node is not None or trained else []
    sizes = (PROGRAMS * width * FP32, width * weight.width)

    def run(grad: Storage) -> tuple[Any, ...]:
        for tensor in kept:
            tensor.fetch()
        if not trained:
            return grad, None
        partial = tape.make(sizes[0])
        made = summed = tape.make(width * FP32)
        if weight.width != FP32:
            made = tape.make(sizes[1])
        del partial, summed
        return grad, made

    return tape.attach(out, run, x, weight)


def fused_rotate(tape: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Written over its input, and so is its gradient."""
    kept = [tape.save(cos), tape.save(sin)] if x.node is not None else []

    def run(grad: Storage) -> tuple[Storage]:
        for tensor in kept:
            tensor.fetch()
        return (grad,)

    return tape.attach(Tensor(x.storage, x.count, x.width), run, x)


def fused_gate(tape: Tape, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up: keeps both, and writes their gradients over them."""
    kept = (tape.save(gate), tape.save(up)) if gate.node is not None or up.node is not None else None

    def run(grad: Storage) -> tuple[Storage, Storage]:
        assert kept is not None
        return kept[0].fetch().storage, kept[1].fetch().storage

    return tape.record(gate.count, gate.width, run, gate, up)
