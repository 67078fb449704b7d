"""Liger-Kernel's component benchmarks on the plan's tape: what each holds, from its scripts (benchmark/*.py of 2024) and liger-kernel 0.2.1.

Each program is one iteration of a benchmark after the first: parameters and inputs have their gradients from the one before. A cuBLAS
handle keeps 8.125 MiB a thread that multiplies matrices: the forward's, and autograd's where the backward multiplies too. That constant is
torch's (at::cuda::getChosenWorkspaceSize: 4096 KiB twice and 16 KiB eight times, on devices before Hopper).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.plan.linears import Linear, linear
from launcher.plan.losses import cross_entropy, liger_chunk
from launcher.plan.operators import matmul, mul, pointwise, rms_norm, rotate
from launcher.plan.reductions import sum_of_rows_workspace
from launcher.plan.tape import Parameter, Storage, Tape, Tensor, backward
from launcher.units import MIB

HANDLE = 2 * 4 * MIB + 8 * 16 * 1024
Facts = dict[str, Any]
Program = Callable[[Tape], list[Any]]


def leaf(tape: Tape, count: int, width: int) -> tuple[Tensor, list[Any]]:
    """A tensor that needs a gradient and has one from the iteration before."""
    sink = Parameter(count, width, trained=True)
    tensor = tape.new(count, width)
    tensor.node = sink.node
    return tensor, [sink, tape.new(count, width)]


def peak(program: Program, handles: int) -> float:
    """The most that is live in one iteration: `program` gives all that its variables hold when it is over."""
    tape = Tape(accumulates_in_place=False)
    tape.on_gradient = lambda sink, grad: None
    held = program(tape)
    del held
    return max(top for top, _ in tape.peaks.values()) + handles * HANDLE


def go_back(tape: Tape, outputs: list[Tensor], give: Callable[[], tuple[Storage, ...]]) -> None:
    """autograd.backward of several outputs at once, from the gradients that `give` gives."""
    root = tape.attach(tape.new(1, 4), lambda grad: give(), *outputs)
    backward(tape, root, retain=True)


# ------------------------------------------------------------------------------------------- RMSNorm


def rms_norm_peak(facts: Facts, kernel: str) -> float:
    """Both modules' weights are fp32 and the input bf16: transformers' product of the two is fp32, and its gradient is cast.

    Liger's gradient of x is a view of dy's own storage, written over it: autograd takes that tensor for x's gradient as it is.
    """
    rows, width = int(facts["M"]), int(facts["H"])

    def program(tape: Tape) -> list[Any]:
        x, keep = leaf(tape, rows * width, 2)
        dy = tape.new(rows * width, 2)
        if kernel == "liger":
            keep[1] = None
            weights = [*leaf(tape, width, 4), tape.new(width, 4)]
            y = _liger_norm(tape, x, rows, width)
            go_back(tape, [y], lambda: (dy.storage,))
        else:
            both = [leaf(tape, width, 4) for _ in range(2)]
            weights = [*both]
            y = rms_norm(tape, x, both[0][0])
            cast = tape.new(rows * width, 4)  # in torch's engine, until the backward is over
            go_back(tape, [y], lambda: (cast.storage,))
        return [x, keep, dy, weights, y]

    return peak(program, 0)


A100 = 108
"""Multiprocessors."""


def _liger_norm(tape: Tape, x: Tensor, rows: int, width: int) -> Tensor:
    """The gradient of x is written over that of y; the weight's is a row each in its own dtype, then summed."""
    out, scale = tape.new(rows * width, 2), tape.new(rows, 4)

    def run(grad: Storage) -> tuple[Storage]:
        by_row = tape.make(rows * width * 4)
        summed = tape.make(width * 4)
        beside = [tape.make(sum_of_rows_workspace(rows, width, A100)), tape.make(4 * -(-width // 128))]  # each column of blocks has a flag
        del by_row, summed, beside
        return (grad,)

    kept = tape.save(scale)
    return tape.attach(out, lambda grad: (kept, run(grad))[1], x)


# ------------------------------------------------------------------------------------------- rotary embedding


def rope_peak(facts: Facts, kernel: str) -> float:
    """Tables are made by a matrix product beforehand: one handle. Liger turns queries, keys and their gradients in place."""
    tokens, hidden = int(facts.get("T") or facts["seq_len"]), int(facts.get("hidden_size") or facts["H"])
    width = hidden // facts["num_q_heads"]
    sizes = (tokens * hidden, tokens * width * facts["num_kv_heads"])

    def program(tape: Tape) -> list[Any]:
        inputs = []
        for size in sizes:
            tensor = tape.new(size, 2)
            tensor.node = Parameter(size, 2, trained=True).node
            inputs.append(tensor)
        gradients = [tape.new(size, 2) for size in sizes]
        positions, table = tape.new(tokens, 8), (tape.new(tokens * width, 2), tape.new(tokens * width, 2))
        if kernel == "liger":
            return [inputs, gradients, positions, table]
        kept: list[Any] = []
        tape.on_gradient = lambda sink, grad: kept.append(grad)  # autograd.grad returns them
        outputs = [rotate(tape, tensor, *table) for tensor in inputs]
        go_back(tape, outputs, lambda: tuple(g.storage for g in gradients))
        return [inputs, gradients, positions, table, outputs, kept]

    return peak(program, 1)


# ------------------------------------------------------------------------------------------- SwiGLU


def swiglu_peak(facts: Facts, kernel: str) -> float:
    tokens, width, inner = int(facts["B"]) * int(facts["T"]), int(facts["hidden_size"]), int(facts["intermediate_size"])

    def program(tape: Tape) -> list[Any]:
        x, keep = leaf(tape, tokens * width, 2)
        weights = [leaf(tape, width * inner, 2) for _ in range(3)]
        gate, up, down = (_layer(weight[0], width, inner, last=index == 2) for index, weight in enumerate(weights))
        gated, raised = linear(tape, x, gate), linear(tape, x, up)
        mixed = _liger_swiglu(tape, gated, raised) if kernel == "liger" else mul(tape, pointwise(tape, gated), raised)
        del gated, raised
        y = linear(tape, mixed, down)
        del mixed
        dy = tape.new(tokens * width, 2)
        go_back(tape, [y], lambda: (dy.storage,))
        return [x, keep, weights, y, dy]

    return peak(program, 2)


def _layer(weight: Tensor, width: int, inner: int, *, last: bool) -> Linear:
    layer = Linear(inner if last else width, width if last else inner, 2, trained=True)
    layer.weight.node = weight.node
    return layer


def _liger_swiglu(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """Gradients are written over what was kept."""
    kept = (tape.save(a), tape.save(b))
    return tape.record(a.count, 2, lambda grad: (kept[0].fetch().storage, kept[1].fetch().storage), a, b)


# ------------------------------------------------------------------------------------------- cross-entropy


def cross_entropy_peak(facts: Facts, kernel: str) -> float:
    rows, words = int(facts["B"]) * int(facts["T"]), int(facts["V"])

    def program(tape: Tape) -> list[Any]:
        targets = tape.new(rows, 8)
        if kernel == "liger":  # the gradient is written over the logits, and stays there as theirs
            x, losses = tape.new(rows * words, 4), tape.new(rows, 4)
            return [x, losses, tape.new(rows, 1), targets]
        x, keep = leaf(tape, rows * words, 4)
        loss = cross_entropy(tape, x, rows, targets)
        backward(tape, loss, retain=True)
        return [x, keep, targets, loss]

    return peak(program, 0)


def head_peak(facts: Facts, kernel: str) -> float:
    """A head with its loss; both modules stand on the device, the other's weight without a gradient."""
    rows, width, words = int(facts["BT"]), int(facts["H"]), int(facts["V"])

    def program(tape: Tape) -> list[Any]:
        x, keep = leaf(tape, rows * width, 2)
        weight, keep_weight = leaf(tape, words * width, 2)
        other, targets = tape.new(words * width, 2), tape.new(rows, 8)
        loss = _fused_head(tape, x, weight, rows, words) if kernel == "liger" else _narrow_head(tape, x, weight, rows, width, targets)
        backward(tape, loss)
        return [x, keep, weight, keep_weight, other, targets, loss]

    return peak(program, 2)  # both kernels are run in one process


def _narrow_head(tape: Tape, x: Tensor, weight: Tensor, rows: int, width: int, targets: Tensor) -> Tensor:
    """torch's linear layer and cross-entropy in the logits' own dtype."""
    logits = matmul(tape, x, weight, width)
    logged = tape.new(logits.count, 2)
    kept, size = tape.save(logged), logits.count * 2
    tape.attach(logged, lambda grad: (kept, tape.make(size))[1:], logits)
    loss = tape.new(1, 2)
    return tape.attach(loss, lambda grad: (targets, tape.make(size))[1:], logged)


def _fused_head(tape: Tape, x: Tensor, weight: Tensor, rows: int, words: int) -> Tensor:
    """0.2.1: a chunk's logits in bf16, in fp32, in bf16 again, and scaled; the last of one chunk are there while the next are made."""
    width = x.count // rows
    by_weight, by_input = tape.new(weight.count, 2), tape.new(x.count, 2)
    losses = tape.new(rows, 4)
    chunk = liger_chunk(rows, width, words)
    logits = scaled = None
    for begin in range(0, rows, chunk):
        count = min(chunk, rows - begin)
        made = tape.new(count * words, 2)
        logits = made
        del made
        logits = tape.new(count * words, 4)
        logits = tape.new(count * words, 2)
        made = tape.new(count * words, 2)
        scaled = made
        del made
        product = tape.new(count * width, 2)
        del product
    del logits, scaled, losses
    loss = tape.new(1, 4)
    kept = [by_input.storage, by_weight.storage]
    return tape.attach(loss, lambda grad: tuple(kept), x, weight)


COMPONENTS: dict[str, Callable[[Facts, str], float]] = {
    "rms_norm": rms_norm_peak,
    "cross_entropy": cross_entropy_peak,
    "fused_linear_cross_entropy": head_peak,
    "swiglu": swiglu_peak,
    "geglu": swiglu_peak,  # an activation that keeps its input, either way
    "rope": rope_peak,
}
