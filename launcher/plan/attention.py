"""Attention's kernels as far as memory goes: eager, SDPA on CPU and CUDA, flash attention (torch 2.13, transformers 5.23).

With a mask, transformers repeats keys and values to the number of heads (sdpa_attention.py, use_gqa_in_sdpa), and SDPA turns a
bool mask into a bias of the query's dtype in each layer (sdp_utils, convert_boolean_attn_mask).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.plan.operators import FP32, add, add_small, cast, copy, dropout, part, pointwise_of_result, scale, shift
from launcher.plan.tape import Storage, Tape, Tensor


@dataclass(slots=True)
class Heads:
    """The geometry of one attention: B rows of S queries and K keys, heads and key-value heads of a width."""

    rows: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    heads_first: bool = False
    """Queries and keys lie in memory head by head, not position by position."""
    causal: bool = True


def sdpa(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, at: Heads, *, device: str, workspace: bool, p: float = 0.0
) -> Tensor:
    """F.scaled_dot_product_attention behind transformers' sdpa_attention_forward; the output is contiguous by rows."""
    uneven = at.width != at.value_width
    if device == "cpu" and ((p and tape.training) or uneven):  # the CPU's fused kernel knows neither
        return _plain(tape, q, k, v, mask, at, p)
    if mask is None:
        if device == "cuda" and (q.width == FP32 or uneven):
            return _kernel(tape, q, k, v, None, at, padded=32, seeds=2, workspace=workspace)
        out = _kernel(tape, q, k, v, None, at, padded=1, seeds=2 if device == "cuda" else 0, workspace=workspace)
        return copy(tape, out) if at.heads_first else out  # the output lies as the queries do
    if at.kv_heads == at.heads:
        return _masked(tape, q, k, v, mask, at, device, workspace)
    key, value = repeat_kv(tape, k, at), repeat_kv(tape, v, at)
    return _masked(tape, q, key, value, mask, at, device, workspace)


def _masked(tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, at: Heads, device: str, workspace: bool) -> Tensor:
    if device == "cuda":
        return _kernel(tape, q, k, v, tape.new(mask.count, q.width), at, padded=32, seeds=2, workspace=workspace)
    out = _kernel(tape, q, k, v, tape.new(mask.count, q.width), at, padded=1, seeds=0, workspace=False)
    return copy(tape, out) if at.heads_first else out


def _plain(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, at: Heads, p: float, *, positions: Tensor | None = None
) -> Tensor:  # fmt: skip
    """aten's _scaled_dot_product_attention_math, its output made contiguous by rows. `positions`: a bias in place of a mask."""
    return copy(tape, _attend_in_fp32(tape, q, k, v, mask, at, p, positions))


def _attend_in_fp32(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, at: Heads, p: float, positions: Tensor | None
) -> Tensor:  # fmt: skip
    """Scores and all."""
    bias = tape.new(mask.count, q.width) if mask is not None else None
    query, key, value = cast(tape, q, FP32), cast(tape, k, FP32), cast(tape, v, FP32)
    scaled = scale(tape, query)
    if bias is None and positions is None and at.causal:
        lower = tape.new(at.queries * at.keys, 1)
        lower = tape.new(at.queries * at.keys, 1)
        bias = tape.new(at.queries * at.keys, FP32)
        del lower
    key, value = repeat_kv(tape, key, at), repeat_kv(tape, value, at)
    scores = _scores(tape, scaled, scale(tape, key), at)
    if bias is not None:
        scores = shift(tape, scores) if not tape.accumulates_in_place else scores
    if positions is not None:
        scores = _add_positions(tape, scores, positions)
    scores = pointwise_of_result(tape, scores)
    scores = dropout(tape, scores, p)
    unused = cast(tape, scores, q.width)
    out = cast(tape, _mix(tape, scores, value, at), q.width)
    del unused
    return out


def _add_positions(tape: Tape, scores: Tensor, bias: Tensor) -> Tensor:
    """In place, but not under the dispatch mode that traces. A bias' gradient is summed in fp32 over the rows it is for, and cast."""
    summed, own = bias.count * FP32, bias.count * bias.width
    several, wanted = scores.count > bias.count, bias.node is not None

    def run(grad: Storage) -> tuple[Storage, Storage | None]:
        if not wanted:
            return grad, None
        whole = tape.make(summed) if several else grad
        return grad, whole if own == summed else tape.make(own)

    out = Tensor(scores.storage, scores.count, FP32) if tape.accumulates_in_place else tape.new(scores.count, FP32)
    return tape.attach(out, run, scores, bias)


def flash(tape: Tape, q: Tensor, k: Tensor, v: Tensor, at: Heads, *, workspace: bool) -> Tensor:
    """The flash-attn package: as SDPA's flash kernel, whatever the mask."""
    return _kernel(tape, q, k, v, None, at, padded=1, seeds=1, workspace=workspace)


def _kernel(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, at: Heads, *, padded: int, seeds: int, workspace: bool
) -> Tensor:
    """Keeps its inputs, its output and a log-sum-exp a query and head; `padded`: queries are rounded up to this."""
    needs = any(t.node is not None for t in (q, k, v))
    kept = [tape.save(t) for t in (q, k, v, bias) if t is not None] if needs else []
    count = at.rows * at.queries * at.heads * at.value_width
    out = tape.new(count, q.width)
    sums = tape.new(at.rows * at.heads * (-(-at.queries // padded) * padded), FP32)
    rest = [tape.new(1, 8) for _ in range(seeds)]
    if needs:
        kept += [tape.save(t) for t in (out, sums, *rest)]
    sizes = tuple((t.count * t.width, t.node is not None) for t in (q, k, v))
    del sums, rest
    extra = _backward_workspace(at, q.width) if workspace else 0
    # A bias' gradient has rows of a multiple of 16, and one for each of the batch. (Of one row alone it stays so wide, up to 15 columns too many,
    # until it is added to another: counted to the end here.)
    spread = at.rows * at.heads * at.queries * (-(-at.keys // 16) * 16) * q.width if bias is not None and bias.node is not None else 0
    has_bias = bias is not None

    def run(grad: Storage) -> tuple[Storage | None, ...]:
        for tensor in kept:
            tensor.fetch()
        grads = tuple(tape.make(size) for size, _ in sizes)
        of_bias = tape.make(spread) if spread else None
        if extra:
            tape.make(extra)
        given = tuple(g if wanted else None for g, (_, wanted) in zip(grads, sizes, strict=True))
        return (*given, of_bias) if has_bias else given

    return tape.attach(out, run, q, k, v) if bias is None else tape.attach(out, run, q, k, v, bias)


def _backward_workspace(at: Heads, width: int) -> int:
    """flash_api.cpp, mha_bwd: dq in fp32, a softmax term a query, and, with grouped heads, dk and dv for every head."""
    queries = -(-at.queries // 128) * 128
    wide = -(-at.width // 32) * 32
    size = at.rows * queries * at.heads * (wide + 1) * FP32
    if at.kv_heads != at.heads:
        size += 2 * at.rows * at.keys * at.heads * at.width * width
    return size


def repeat_kv(tape: Tape, x: Tensor, at: Heads) -> Tensor:
    """Keys or values for every head: a copy, or of a single one a view; its gradient is summed over the group."""
    if at.kv_heads == at.heads:
        return x
    size, count = x.count * x.width, x.count // at.kv_heads * at.heads
    if at.kv_heads == 1:
        return tape.attach(Tensor(x.storage, count, x.width), lambda grad: (tape.make(size),), x)
    return tape.record(count, x.width, lambda grad: (tape.make(size),), x)


def eager(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, at: Heads, *, p: float = 0.0, softcap: bool = False, wide: bool = True
) -> tuple[Tensor, Tensor]:
    """transformers' eager_attention_forward: scores of every query and key, softmax in fp32 where it is `wide`. Its weights are given back too."""
    key, value = repeat_kv(tape, k, at), repeat_kv(tape, v, at)
    scores = scale(tape, _scores(tape, q, key, at))
    if softcap:
        scores = scale(tape, scores)
        scores = pointwise_of_result(tape, scores)
        scores = scale(tape, scores)
    if mask is not None:
        scores = shift(tape, scores)
    weights = cast(tape, pointwise_of_result(tape, cast(tape, scores, FP32 if wide else scores.width)), q.width)
    del scores
    weights = dropout(tape, weights, p)
    mixed = _mix(tape, weights, value, at)
    out = copy(tape, mixed)
    return out, weights


def eager_with_sinks(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor, at: Heads
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """GPT-OSS: a column of sinks beside the scores, the row's largest taken off, softmax in the model's dtype."""
    key, value = repeat_kv(tape, k, at), repeat_kv(tape, v, at)
    scores = scale(tape, _scores(tape, q, key, at))
    if mask is not None:
        scores = shift(tape, scores)
    rows = at.rows * at.heads * at.queries
    column = Tensor(sinks.storage, rows, sinks.width, sinks.node)
    joined = _join_column(tape, scores, column, sinks)
    joined = _take_largest_off(tape, joined, rows)
    weights = pointwise_of_result(tape, joined)
    chosen = part(tape, weights, scores.count)
    scores = chosen
    out = copy(tape, batched_matmul(tape, chosen, _fold(tape, value, at, at.kv_heads), rows * at.value_width))
    return out, weights


def _join_column(tape: Tape, scores: Tensor, column: Tensor, sinks: Tensor) -> Tensor:
    """cat; the column is a view of the sinks, whose gradient is summed."""
    small = sinks.count * sinks.width
    return tape.record(scores.count + column.count, scores.width, lambda grad: (grad, (grad, small)), scores, sinks)


def _take_largest_off(tape: Tape, x: Tensor, rows: int) -> Tensor:
    """x - x.max(): the place of the largest is kept."""
    size = x.count * x.width
    values, places = tape.new(rows, x.width), tape.new(rows, 8)
    kept = tape.save(places) if x.node is not None else None
    del places

    def run(grad: Storage) -> tuple[Storage]:
        assert kept is not None
        kept.fetch()
        zeros = tape.make(size)  # the gradient is put into them; under the dispatch mode that traces, into a copy
        return (zeros if tape.accumulates_in_place else tape.make(size),)

    largest = tape.attach(values, run, x)
    small = rows * x.width

    def back(grad: Storage) -> tuple[Any, Any]:
        negated = tape.make(size)
        return grad, (negated, small)

    return tape.record(x.count, x.width, back, x, largest)


def _scores(tape: Tape, q: Tensor, key: Tensor, at: Heads) -> Tensor:
    query = q if at.heads_first else _fold(tape, q, at, at.heads)
    folded = key if at.heads_first and at.kv_heads == at.heads else _fold(tape, key, at, at.kv_heads)
    return batched_matmul(tape, query, folded, at.rows * at.heads * at.queries * at.keys)


def _mix(tape: Tape, weights: Tensor, value: Tensor, at: Heads) -> Tensor:
    return batched_matmul(tape, weights, _fold(tape, value, at, at.kv_heads), at.rows * at.queries * at.heads * at.value_width)


def _fold(tape: Tape, x: Tensor, at: Heads, heads: int) -> Tensor:
    """matmul folds rows and heads into one dimension: several rows of what was transposed are copied for it, and of one head seen by all.
    What was repeated is whole already."""
    return x if at.rows == 1 or 1 < heads < at.heads else copy(tape, x)


def batched_matmul(tape: Tape, a: Tensor, b: Tensor, count: int) -> Tensor:
    """bmm: keeps both where their gradients are needed."""
    kept_a = tape.save(a) if b.node is not None else None
    kept_b = tape.save(b) if a.node is not None else None
    sizes = (a.count * a.width, b.count * b.width)

    def run(grad: Storage) -> tuple[Storage | None, Storage | None]:
        grad_b = None
        if kept_a is not None:
            kept_a.fetch()
            grad_b = tape.make(sizes[1])
        grad_a = None
        if kept_b is not None:
            kept_b.fetch()
            grad_a = tape.make(sizes[0])
        return grad_a, grad_b

    return tape.record(count, a.width, run, a, b)


# ------------------------------------------------------------------------------------------------- with a bias of positions


def biased_eager(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor, at: Heads, *, p: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """T5's eager_attention_forward: a bias beside the mask, softmax in the model's dtype."""
    scores = scale(tape, _scores(tape, q, k, at))
    scores = add_small(tape, scores, bias) if at.rows > 1 else add(tape, scores, bias)
    if mask is not None:
        scores = shift(tape, scores)
    weights = pointwise_of_result(tape, scores)
    del scores
    weights = dropout(tape, weights, p)
    mixed = _mix(tape, weights, v, at)
    out = copy(tape, mixed)
    return out, weights


def biased_sdpa(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor, at: Heads, *, by_heads: bool, device: str, workspace: bool,
    p: float,
) -> Tensor:  # fmt: skip
    """SDPA with a bias for every head, query and key, and what of it is not to be seen at its least (sdpa_attention.py, create_position_bias_mask)."""
    whole = _cover(tape, mask, bias, at, by_heads)
    if device == "cpu" and (
        (p and tape.training) or whole.node is not None
    ):  # its fused kernel drops nothing, and gives a mask no gradient
        return _plain(tape, q, k, v, None, at, p, positions=whole)
    padded, seeds = (32, 2) if device == "cuda" else (1, 0)
    if device == "cuda":
        whole = _spread(tape, whole, at)
    return _kernel(tape, q, k, v, whole, at, padded=padded, seeds=seeds, workspace=workspace and device == "cuda")


def _spread(tape: Tape, bias: Tensor, at: Heads) -> Tensor:
    """One bias for every row of the batch: a view, whose gradient is summed where there are several."""
    size, several = bias.count * bias.width, at.rows * at.heads * at.queries * at.keys > bias.count
    out = Tensor(bias.storage, bias.count, bias.width)
    return tape.attach(out, lambda grad: (tape.make(size) if several else grad,), bias)


def _cover(tape: Tape, mask: Tensor | None, bias: Tensor, at: Heads, by_heads: bool) -> Tensor:
    """The bias where it is seen, laid out head by head."""
    if mask is None and not (at.causal and at.queries > 1):
        return bias if by_heads else copy(tape, bias)
    seen = mask
    if seen is None:
        order, beside = tape.new(at.queries, 8), tape.new(at.keys, 8)
        seen = tape.new(at.queries * at.keys, 1)
        del order, beside
    covered = _where(tape, seen, bias, bias.count if mask is None else at.rows * bias.count)
    return covered if by_heads else copy(tape, covered)


def _where(tape: Tape, seen: Tensor, x: Tensor, count: int) -> Tensor:
    """torch.where(seen, x, a number): its gradient is summed over what x was spread to."""
    kept = tape.save(seen) if x.node is not None else None
    size, own, width = count * x.width, x.count * x.width, x.width

    def run(grad: Storage) -> tuple[Any]:
        assert kept is not None
        kept.fetch()
        zero = tape.make(width)
        made = tape.make(size)
        del zero
        return (made if size == own else (made, own),)

    number = tape.new(1, x.width)
    out = tape.new(count, x.width)
    del number
    return tape.attach(out, run, x)
