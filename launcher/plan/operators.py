"""torch's operators as far as memory goes: what each makes, keeps for its backward, and makes there (torch 2.13).

Sizes are counts of elements. A mirrored function must not rebind its arguments: torch's modules keep theirs until they return.
"""

from __future__ import annotations

from typing import Any

from launcher.plan.fused import fused_rms_norm, fused_rotate
from launcher.plan.tape import Parameter, Storage, Tape, Tensor

FP32 = 4


def _passes(grad: Storage) -> tuple[Storage]:
    return (grad,)


def cast(tape: Tape, x: Tensor, width: int) -> Tensor:
    """`x.to(dtype)`; the same tensor where it has that width already."""
    if x.width == width:
        return x
    count, back = x.count, x.width
    return tape.record(count, width, lambda grad: (tape.make(count * back),), x)


def copy(tape: Tape, x: Tensor) -> Tensor:
    """clone, or contiguous of a tensor that is not: its gradient passes through."""
    return tape.record(x.count, x.width, _passes, x)


def view(x: Tensor, count: int | None = None) -> Tensor:
    return Tensor(x.storage, x.count if count is None else count, x.width, x.node, x.slot)


def add(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """Same shapes: the gradient goes to both."""
    return tape.record(a.count, max(a.width, b.width), lambda grad: (grad, grad), a, b)


def subtract(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """Same shapes: the gradient goes to the one, and negated to the other."""
    size = b.count * b.width
    return tape.record(a.count, max(a.width, b.width), lambda grad: (grad, tape.make(size)), a, b)


def add_small(tape: Tape, a: Tensor, small: Tensor) -> Tensor:
    """`small` is broadcast (a bias); its gradient is a sum."""
    has, size = small.node is not None, small.count * small.width
    return tape.record(a.count, a.width, lambda grad: (grad, (grad, size) if has else None), a, small)


def scale(tape: Tape, x: Tensor) -> Tensor:
    """Times a Python number."""
    size = x.count * x.width
    return tape.record(x.count, x.width, lambda grad: (tape.make(size),), x)


def shift(tape: Tape, x: Tensor) -> Tensor:
    """Plus a Python number."""
    return tape.record(x.count, x.width, _passes, x)


NOTHING = Tensor(None, 0, 1)
"""Stands for a kept tensor of no size that matters here."""


def mul(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """Elementwise; either may be broadcast to the other's count, and then its gradient is summed."""
    kept_a = tape.save(a) if b.node is not None else None
    kept_b = tape.save(b) if a.node is not None else None
    count, width = max(a.count, b.count), max(a.width, b.width)
    sizes = (a.count * a.width, b.count * b.width)
    whole = count * width

    def run(grad: Storage) -> tuple[Any, Any]:
        if kept_b is not None:
            kept_b.fetch()
        grad_a = tape.make(whole) if kept_b is not None else None
        if kept_a is not None:
            kept_a.fetch()
        grad_b = tape.make(whole) if kept_a is not None else None
        return _fitted(grad_a, whole, sizes[0]), _fitted(grad_b, whole, sizes[1])

    return tape.record(count, width, run, a, b)


def _fitted(grad: Storage | None, made: int, wanted: int) -> Any:
    """A gradient that autograd still has to sum or cast to its tensor's shape."""
    return grad if grad is None or made == wanted else (grad, wanted)


def square(tape: Tape, x: Tensor) -> Tensor:
    """`x.pow(2)`."""
    kept = tape.save(x) if x.node is not None else None
    size = x.count * x.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        power = tape.make(size)
        twice = tape.make(size)
        out = tape.make(size)
        del power, twice
        return (out,)

    return tape.record(x.count, x.width, run, x)


def mean(tape: Tape, x: Tensor, rows: int) -> Tensor:
    """Over the last dimension."""
    size = x.count * x.width
    return tape.record(rows, x.width, lambda grad: (tape.make(size),), x)


def rsqrt(tape: Tape, x: Tensor) -> Tensor:
    out = tape.new(x.count, x.width)
    kept = tape.save(out) if x.node is not None else None
    size = x.count * x.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        cube = tape.make(size)
        half = tape.make(size)
        made = tape.make(size)
        del cube, half
        return (made,)

    return tape.attach(out, run, x)


def pointwise(tape: Tape, x: Tensor) -> Tensor:
    """An activation that keeps its input (silu, gelu): one gradient."""
    kept = tape.save(x) if x.node is not None else None
    size = x.count * x.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        return (tape.make(size),)

    return tape.record(x.count, x.width, run, x)


def gelu_new(tape: Tape, x: Tensor) -> Tensor:
    """GPT-2's approximation as transformers writes it out: a cube, a tanh and two products, each with what it keeps."""
    half = scale(tape, x)
    return mul(tape, half, shift(tape, pointwise_of_result(tape, scale(tape, add(tape, x, scale(tape, square(tape, x)))))))


def pointwise_of_result(tape: Tape, x: Tensor) -> Tensor:
    """An activation that keeps its output (relu, tanh, sigmoid, softmax)."""
    out = tape.new(x.count, x.width)
    kept = tape.save(out) if x.node is not None else None
    size = x.count * x.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        return (tape.make(size),)

    return tape.attach(out, run, x)


def clamp(tape: Tape, x: Tensor, *, sides: int) -> Tensor:
    """Bounded on one side or both; its backward compares anew, a byte an element and side."""
    kept = tape.save(x) if x.node is not None else None
    count, size = x.count, x.count * x.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        compared = [tape.make(count) for _ in range(sides)]
        made = tape.make(size)
        del compared
        return (made,)

    return tape.record(x.count, x.width, run, x)


def add_constant(tape: Tape, x: Tensor) -> Tensor:
    """Plus a tensor that needs no gradient."""
    return shift(tape, x)


def gather_columns(tape: Tape, x: Tensor, index: Tensor) -> Tensor:
    """x.gather(1, index): its gradient is put into zeros, in place."""
    kept = tape.save(index) if x.node is not None else None
    size = x.count * x.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        return (tape.make(size),)

    return tape.record(index.count, x.width, run, x)


def copy_into_part(tape: Tape, whole: Tensor, x: Tensor, *, expanded: int = 0) -> Tensor:
    """`whole[..., a:b].copy_(x)`: autograd's CopySlices copies the whole's gradient, and a slice of it. `expanded`: x is one for all heads."""
    size, slice_size, own = whole.count * whole.width, (expanded or x.count) * x.width, x.count * x.width
    had = whole.node is not None

    def run(grad: Storage) -> tuple[Any, Any]:
        result = tape.make(size)
        cut = tape.make(slice_size)
        if had:
            tape.make(slice_size)
        return result if had else None, (cut, own) if expanded else cut

    return tape.attach(Tensor(whole.storage, whole.count, whole.width), run, whole, x)


def dropout(tape: Tape, x: Tensor, p: float) -> Tensor:
    """CUDA's fused dropout makes a mask of one byte an element; the CPU's noise in the input's dtype, before the output."""
    if p == 0.0 or not tape.training:
        return x
    count, width = x.count, x.width
    if tape.on_cuda:
        out = tape.new(count, width)
        mask = tape.new(count, 1)
        kept = tape.save(mask) if x.node is not None else None
    else:  # a product with the noise, which it keeps before its output is there
        mask = tape.new(count, width)
        kept = tape.save(mask) if x.node is not None else None
        out = tape.new(count, width)

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        return (tape.make(count * width),)

    return tape.attach(out, run, x)


def negate(tape: Tape, x: Tensor) -> Tensor:
    size = x.count * x.width
    return tape.record(x.count, x.width, lambda grad: (tape.make(size),), x)


def part(tape: Tape, x: Tensor, count: int) -> Tensor:
    """A slice: a view, whose gradient is a whole tensor of zeros with the slice filled in."""
    size = x.count * x.width
    out = Tensor(x.storage, count, x.width)
    return tape.attach(out, lambda grad: (tape.make(size),), x)


def join(tape: Tape, *parts: Tensor) -> Tensor:
    """cat: the gradients are views of the whole's."""
    number = len(parts)
    return tape.record(sum(p.count for p in parts), parts[0].width, lambda grad: (grad,) * number, *parts)


def split(tape: Tape, x: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """split, chunk, unbind: views, whose gradients are put together again."""
    size = x.count * x.width
    outs = tuple(Tensor(x.storage, count, x.width) for count in counts)
    tape.attach_all(outs, lambda grads: (tape.make(size),), x)
    return outs


def embed(tape: Tape, weight: Parameter, tokens: int, hidden: int, indices: Tensor = NOTHING) -> Tensor:
    """Rows of a table; the gradient of the table is a whole table. `indices` are kept where they are not the batch's own."""
    kept = tape.save(indices) if weight.node is not None else None
    size = weight.count * weight.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        return (tape.make(size),)

    return tape.record(tokens * hidden, weight.width, run, weight)


def matmul(tape: Tape, x: Tensor, weight: Tensor, n_in: int, bias: Parameter | None = None) -> Tensor:
    """x · weightᵀ (+ bias): mm or addmm over the flattened rows."""
    kept_x = tape.save(x) if weight.node is not None else None
    kept_weight = tape.save(weight) if x.node is not None else None
    rows = x.count // n_in
    count = rows * (weight.count // n_in)
    sizes = (x.count * x.width, weight.count * weight.width)
    bias_size = bias.count * bias.width if bias is not None and bias.node is not None else 0

    def run(grad: Storage) -> tuple[Any, ...]:
        # What is kept is fetched as it is used: in a checkpoint, the first fetch recomputes the layer.
        grad_weight = None
        if kept_x is not None:
            kept_x.fetch()
            grad_weight = tape.make(sizes[1])
        grad_x = None
        if kept_weight is not None:
            kept_weight.fetch()
            grad_x = tape.make(sizes[0])
        return grad_x, grad_weight, (grad, bias_size) if bias_size else None

    inputs = (x, weight) if bias is None else (x, weight, bias)
    return tape.record(count, x.width, run, *inputs)


def rms_norm(tape: Tape, x: Tensor, weight: Tensor | None, *, style: str = "llama", width: int = 0) -> Tensor:
    """llama: weight · cast back; late: weight in fp32, then cast back; gemma: (1 + weight) in fp32, then cast back; l2: cast back · weight,
    or no weight over a given width."""
    if style == "l2":
        output = cast(tape, _normed(tape, cast(tape, x, FP32), weight.count if weight is not None else width), x.width)
        return output if weight is None else mul(tape, output, weight)
    assert weight is not None
    if tape.fused:
        return fused_rms_norm(tape, x, weight)
    if style == "gemma":
        output = _normed(tape, cast(tape, x, FP32), weight.count)
        output = mul(tape, output, shift(tape, cast(tape, weight, FP32)))
        return cast(tape, output, x.width)
    wide = cast(tape, x, FP32)
    variance = mean(tape, square(tape, wide), x.count // weight.count)
    wide = mul(tape, wide, rsqrt(tape, shift(tape, variance)))
    if style == "late":
        return cast(tape, mul(tape, weight, wide), x.width)
    return mul(tape, weight, cast(tape, wide, x.width))


def _normed(tape: Tape, x: Tensor, width: int) -> Tensor:
    return mul(tape, x, rsqrt(tape, shift(tape, mean(tape, square(tape, x), x.count // width))))


def layer_norm(tape: Tape, x: Tensor, weight: Parameter | None, bias: Parameter | None) -> Tensor:
    """torch's fused layer norm: keeps its input, and mean and reciprocal deviation in fp32."""
    hidden = weight.count if weight is not None else x.count
    rows = x.count // hidden
    trained = weight is not None and weight.node is not None
    needs = x.node is not None or trained
    kept = tape.save(x) if needs else None
    if needs and weight is not None:
        tape.save(weight)
    out = tape.new(x.count, x.width)
    statistics_width = FP32
    average, deviation = tape.new(rows, statistics_width), tape.new(rows, statistics_width)
    kept_statistics = (tape.save(average), tape.save(deviation)) if needs else None
    size, small = x.count * x.width, hidden * x.width
    has_x = x.node is not None

    def run(grad: Storage) -> tuple[Storage | None, ...]:
        assert kept is not None and kept_statistics is not None
        kept.fetch()
        grad_x = tape.make(size) if has_x else None
        grads = (tape.make(small), tape.make(small)) if trained else (None, None)
        return (grad_x, *grads)

    inputs: list[Tensor] = [x]
    for parameter in (weight, bias):
        if parameter is not None:
            inputs.append(parameter)
    return tape.attach(out, run, *inputs)


def rotate(tape: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + rotate_half(x) · sin, the tables broadcast over heads; back in x's dtype where the tables are wider."""
    if tape.fused:
        return fused_rotate(tape, x, cos, sin)
    straight = mul_table(tape, x, cos)
    half = x.count // 2
    first = part(tape, x, half)
    second = part(tape, x, half)
    turned = mul_table(tape, _turn(tape, first, second), sin)
    del first, second
    return add(tape, straight, turned)


def _turn(tape: Tape, first: Tensor, second: Tensor) -> Tensor:
    return join(tape, negate(tape, second), first)


def mul_table(tape: Tape, x: Tensor, table: Tensor) -> Tensor:
    kept = tape.save(table) if x.node is not None else None
    width, size = max(x.width, table.width), x.count * x.width
    whole = x.count * width

    def run(grad: Storage) -> tuple[Any]:
        assert kept is not None
        kept.fetch()
        return (_fitted(tape.make(whole), whole, size),)

    return tape.record(x.count, width, run, x)


def gather_rows(tape: Tape, x: Tensor, count: int, index: Tensor) -> Tensor:
    """x[:, index]: a copy; its gradient is put into zeros (index_put makes a copy of them)."""
    kept = tape.save(index) if x.node is not None else None
    size = x.count * x.width

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        zeros = tape.make(size)
        out = tape.make(size)
        del zeros
        return (out,)

    return tape.record(count, x.width, run, x)
