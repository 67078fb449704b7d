"""Linear layers on the tape: dense or quantised by bitsandbytes, with an adapter of peft or none (peft 0.21.2, bitsandbytes 0.50.2)."""

from __future__ import annotations

from launcher.plan.operators import FP32, add, copy, dropout, matmul, mul, scale, shift, subtract
from launcher.plan.tape import DEQUANTISED, Node, Parameter, Sink, Storage, Tape, Tensor, counting_as


class Linear:
    """A linear layer: dense, or quantised by bitsandbytes (bits 4 or 8), with an adapter of rank `r` or none."""

    __slots__ = ("bias", "bits", "double_quant", "down", "dropout", "magnitude", "n_in", "n_out", "transposed", "up", "weight", "width")

    def __init__(self, n_in: int, n_out: int, width: int, *, trained: bool, bias: bool = False, bias_trained: bool = False, bits: int = 16,
                 double_quant: bool = True, r: int = 0, dropout: float = 0.0, dora: bool = False, transposed: bool = False) -> None:  # fmt: skip
        self.n_in, self.n_out, self.width, self.bits, self.dropout = n_in, n_out, width, bits, dropout
        self.double_quant = double_quant
        self.transposed = transposed
        self.weight = Parameter(n_in * n_out, width, trained and bits == 16)
        self.bias = Parameter(n_out, width, bias_trained) if bias else None
        self.down = Parameter(n_in * r, width, trained=True) if r else None
        self.up = Parameter(r * n_out, width, trained=True) if r else None
        self.magnitude = Parameter(n_out, width, trained=True) if r and dora else None


def linear(tape: Tape, x: Tensor, layer: Linear) -> Tensor:
    """peft's Linear.forward, Linear4bit.forward and Linear8bitLt.forward, around torch's or bitsandbytes' product."""
    if layer.down is None or layer.up is None:
        return _product(tape, x, layer)
    result = _product(tape, x, layer)
    if layer.bits == 4:
        result = copy(tape, result)
    if layer.magnitude is not None:
        return _with_dora(tape, x, layer, result)
    if layer.bits != 16:
        output = scale(tape, _adapt(tape, x, layer, p=layer.dropout))
        result = add(tape, result, output)
        return result
    return add(tape, result, scale(tape, _adapt(tape, x, layer, p=layer.dropout)))


def _adapt(tape: Tape, x: Tensor, layer: Linear, *, p: float = 0.0) -> Tensor:
    """lora_B(lora_A(dropout(x))): nothing but lora_A's own graph holds on to what was dropped."""
    assert layer.down is not None and layer.up is not None
    return matmul(tape, matmul(tape, dropout(tape, x, p), layer.down, layer.n_in), layer.up, layer.down.count // layer.n_in)


def _with_dora(tape: Tape, x: Tensor, layer: Linear, result: Tensor) -> Tensor:
    """DoraLinearVariant.forward: with dropout, the base's product is taken again of what was dropped."""
    if layer.dropout and tape.training:
        dropped = dropout(tape, x, layer.dropout)
        return add(tape, result, _dora(tape, dropped, layer, None))
    return add(tape, result, _dora(tape, x, layer, result))


def _dora(tape: Tape, x: Tensor, layer: Linear, base: Tensor | None) -> Tensor:
    """DoraLinearLayer.forward: the adapter's product is made of an identity matrix, to norm the sum of both weights."""
    assert layer.magnitude is not None
    change, beside = _make_change(tape, layer)
    weight = layer.weight if layer.bits == 16 else _dequantise(tape, layer)
    norm = _norm_rows(tape, weight, change, layer)
    factor = _divide(tape, layer.magnitude, norm)
    adapted = _adapt(tape, x, layer)
    if base is None:
        if (
            layer.transposed
        ):  # peft 0.21 turns it into a parameter of its own (utils/other.py, transpose), whose gradient is made and never used
            weight = Tensor(weight.storage, weight.count, weight.width, Sink(tape.make(0)))
        base = matmul(tape, x, weight, layer.n_in)
    elif layer.bias is not None:
        base = subtract(tape, base, layer.bias) if layer.bias.node is not None else shift(tape, base)
    out = add(tape, mul(tape, shift(tape, factor), base), scale(tape, mul(tape, factor, adapted)))
    del change, beside
    return out


def _make_change(tape: Tape, layer: Linear) -> tuple[Tensor, tuple[Tensor, ...]]:
    """get_lora_weight, and what its graph keeps (a checkpoint's first pass and an evaluation keep nothing, a recomputation does)."""
    assert layer.down is not None and layer.up is not None
    eye = tape.new(layer.n_in**2, layer.width)
    middle = matmul(tape, eye, layer.down, layer.n_in)
    change = matmul(tape, middle, layer.up, layer.down.count // layer.n_in)
    return change, (eye, middle) if tape.frame is None and tape.grad_enabled else ()


def _norm_rows(tape: Tape, weight: Tensor, change: Tensor, layer: Linear) -> Tensor:
    """Without a gradient."""
    scaled = tape.new(change.count, layer.width)
    total = tape.new(change.count, layer.width)
    del scaled
    norm = tape.new(layer.n_out, layer.width)
    del total
    return norm


def _divide(tape: Tape, x: Tensor, by: Tensor) -> Tensor:
    """`by` needs no gradient."""
    kept = tape.save(by)
    size = x.count * x.width

    def run(grad: Storage) -> tuple[Storage]:
        kept.fetch()
        return (tape.make(size),)

    return tape.record(x.count, x.width, run, x)


def _product(tape: Tape, x: Tensor, layer: Linear) -> Tensor:
    if layer.bits == 16:
        return matmul(tape, x, layer.weight, layer.n_in, layer.bias)
    return _product_4bit(tape, x, layer) if layer.bits == 4 else _product_8bit(tape, x, layer)


DEQUANTISING_ROWS = 1536
"""About from so many rows on, bitsandbytes on CUDA multiplies with the dequantised weight rather than its own kernel (0.50.2, by shape)."""


def _dequantise(tape: Tape, layer: Linear) -> Tensor:
    """The dense weight; beside it, until it is there, scales in fp32 where they are quantised themselves.

    On a CPU 8 bits are turned into 16 and multiplied in place by their rows' scales, which are in fp32: torch's TensorIterator does that in fp32,
    with a copy of the weight and of the product (bitsandbytes' MatMul8bitFp; torch 2.13, aten/src/ATen/TensorIterator.cpp, compute_types).
    """
    count = layer.n_in * layer.n_out
    with counting_as(tape, DEQUANTISED):
        scales = tape.make(count // 64 * FP32) if layer.bits == 4 and layer.double_quant else None
        dense = tape.new(count, layer.width)
        if layer.bits == 8 and layer.width < FP32 and tape.counts_workspace and not tape.on_cuda:
            wide = tape.make(count * FP32)
            product = tape.make(count * FP32)
            del wide, product
        del scales
        return dense


def _product_4bit(tape: Tape, x: Tensor, layer: Linear) -> Tensor:
    """MatMul4Bit: keeps no activation; forward (for many rows, on a CPU always) and backward dequantise the whole weight."""
    size, rows = x.count * x.width, x.count // layer.n_in
    if tape.counts_workspace and (rows > DEQUANTISING_ROWS or not tape.on_cuda):
        dense = _dequantise(tape, layer)
        out = tape.new(rows * layer.n_out, x.width)
        del dense
    else:
        out = tape.new(rows * layer.n_out, x.width)

    def run(grad: Storage) -> tuple[Storage]:
        weight = _dequantise(tape, layer)
        made = tape.make(size)
        del weight
        return (made,)

    return tape.attach(out, run, x)


def _product_8bit(tape: Tape, x: Tensor, layer: Linear) -> Tensor:
    """MatMul8bitLt, on a CPU MatMul8bitFp: the input hangs on the context as an attribute, where checkpointing does not see it.

    CUDA: x in fp16, what is an outlier, x in int8; the product in int32 and fp16, in the model's dtype, and with the outliers' added.
    """
    rows, size = x.count // layer.n_in, x.count * x.width
    held = x.storage
    out = _multiply_int8(tape, x, layer, rows) if tape.on_cuda else _multiply_dense(tape, layer, rows)

    def run(grad: Storage) -> tuple[Storage]:
        assert held is not None  # what this function closes over stays as long as its node
        weight = _dequantise(tape, layer)
        made = tape.make(size)
        del weight
        return (made,)

    out = tape.attach(out, run, x)
    if isinstance(out.node, Node):
        out.node.run = run  # in a recomputation's graph too
    return out


def _multiply_dense(tape: Tape, layer: Linear, rows: int) -> Tensor:
    dense = _dequantise(tape, layer)
    out = tape.new(rows * layer.n_out, layer.width)
    del dense
    return out


def _multiply_int8(tape: Tape, x: Tensor, layer: Linear, rows: int) -> Tensor:
    quantised, scales = _quantise_int8(tape, x, rows)
    product = tape.new(rows * layer.n_out, FP32)  # int32
    half = tape.new(rows * layer.n_out, 2)
    out = tape.new(rows * layer.n_out, layer.width)
    del product, half
    out = tape.new(rows * layer.n_out, layer.width)
    del quantised, scales
    return out


def _quantise_int8(tape: Tape, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    half = tape.new(x.count, 2)
    scales = tape.new(rows, FP32)
    quantised = tape.new(x.count, 1)
    sizes = tape.new(x.count, 2)
    outliers = tape.new(x.count, 1)
    del half, sizes, outliers
    return quantised, scales
