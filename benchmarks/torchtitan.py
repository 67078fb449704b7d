"""torchtitan's Llama under FSDP2 with selective checkpointing, told as a stream of allocations and replayed (torchtitan of December 2024, torch 2.6).

Read in torchtitan (parallelize_llama.py, train.py) and torch (distributed/fsdp/_fully_shard). A rank holds its part of weights, gradients and
AdamW's moments in fp32. A layer is gathered in bf16 on a stream of its own and copied out of that; the root (embedding, last norm and head) stays
whole from forward to backward. Reduced gradients are made on a third stream and stay there: no other stream is given that memory. Of a layer's operators
each second matrix product and attention keep their results, all else is made again. The loss' logits are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from launcher.plan.allocator import replay
from launcher.units import GIB

Event = tuple[str, int, int]
FP32, BF16 = 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Llama's widths, the tokens of a rank's micro-batch, and the ranks."""

    tokens: int
    ranks: int
    width: int = 4096
    keys: int = 1024
    inner: int = 14336
    words: int = 128256
    layers: int = 32
    heads: int = 32
    memory: int = 94 * GIB

    @property
    def layer_weights(self) -> tuple[int, ...]:
        h, k, i = self.width, self.keys, self.inner
        return (h * h, k * h, k * h, h * h, i * h, i * h, h * i, h, h)

    @property
    def root_weights(self) -> tuple[int, ...]:
        return (self.words * self.width, self.width, self.words * self.width)


@dataclass(slots=True)
class Stream:
    """Allocations of one CUDA stream, in their order."""

    events: list[Event] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    next_key: int = 0

    def make(self, size: int) -> int:
        self.next_key += 1
        self.sizes[self.next_key] = size
        self.events.append(("run", size, self.next_key))
        return self.next_key

    def end(self, *keys: int) -> None:
        self.events += [("run", -self.sizes.pop(key), key) for key in keys]

    @contextmanager
    def holding(self, *sizes: int) -> Iterator[None]:
        keys = [self.make(size) for size in sizes]
        yield
        self.end(*reversed(keys))

    def reserved(self, limit: int | None = None) -> int:
        return max(most for most, _ in replay(self.events, expandable=True, limit=limit).values())


def predict(run: Run) -> float:
    """torch.cuda.max_memory_reserved of a run of several steps."""
    main = Stream()
    every = [*run.layer_weights * run.layers, *run.root_weights]
    parts = [FP32 * -(-count // run.ranks) for count in every]
    for part in parts:
        main.make(part)
    for iteration in range(3):
        _iterate(main, run)
        if iteration == 0:  # AdamW's moments come with the first step, in what is free by then
            for part in parts:
                main.make(part), main.make(part)
    gathering, reducing = Stream(), Stream()
    root = BF16 * sum(run.root_weights)
    with gathering.holding(root // run.ranks, root):
        pass
    layer = BF16 * sum(run.layer_weights)
    with gathering.holding(layer, layer):  # the next one is on its way
        pass
    for group in (*(run.layer_weights,) * run.layers, run.root_weights):
        reducing.make(FP32 * sum(-(-count // run.ranks) for count in group))
    return float(main.reserved(run.memory) + gathering.reserved() + reducing.reserved())


def _iterate(main: Stream, run: Run) -> None:
    """Forward, loss and backward; what is reduced goes to the other stream's memory."""
    root = [main.make(BF16 * count) for count in run.root_weights]
    x = main.make(BF16 * run.tokens * run.width)
    kept: list[list[int]] = []
    weights: list[int] = []
    for layer in range(run.layers):
        weights = [main.make(BF16 * count) for count in run.layer_weights]
        saved, out = _forward(main, run)
        kept.append([x, *saved])
        x = out
        if layer < run.layers - 1:  # the last one's are used at once
            main.end(*weights)
    grad, head_gradient = _loss(main, run, x)
    main.end(x)
    in_flight: list[int] = []
    for layer in reversed(range(run.layers)):
        if layer < run.layers - 1:
            weights = [main.make(BF16 * count) for count in run.layer_weights]
        gradients, grad = _backward(main, run, kept.pop(), grad)
        main.end(*weights)
        reduced = main.make(FP32 * sum(run.layer_weights))
        main.end(*gradients, *in_flight)
        in_flight = [reduced]
    table = main.make(BF16 * run.root_weights[0])
    main.end(grad, *in_flight)
    with main.holding(FP32 * sum(run.root_weights)):
        main.end(table, head_gradient)
    main.end(*root)


def _norm(main: Stream, run: Run) -> int:
    """RMSNorm in fp32, and back: its result."""
    wide = run.tokens * run.width * FP32
    with main.holding(wide, wide):  # x in fp32, and its square
        pass
    with main.holding(wide, run.tokens * FP32, wide):
        narrow = main.make(run.tokens * run.width * BF16)
    out = main.make(run.tokens * run.width * BF16)
    main.end(narrow)
    return out


def _forward(main: Stream, run: Run) -> tuple[list[int], int]:
    """A block: what is saved of it, and its output."""
    t, h, k, i = run.tokens * BF16, run.width, run.keys, run.inner
    normed = _norm(main, run)
    query, key, value = main.make(t * h), main.make(t * k), main.make(t * k)
    main.end(normed)
    turned = []
    for width in (h, k):
        with main.holding(2 * t * width, 2 * t * width):  # complex numbers of fp32, before and after
            turned.append(main.make(t * width))
    main.end(key)
    repeated = [main.make(t * h), main.make(t * h)]
    mixed, sums = main.make(t * h), main.make(run.tokens * run.heads * FP32)
    main.end(*turned, *repeated)
    with main.holding(t * h):
        states = main.make(t * h)
    normed = _norm(main, run)
    gate = main.make(t * i)
    active, up = main.make(t * i), main.make(t * i)
    both = main.make(t * i)
    main.end(active, up, normed)
    down = main.make(t * h)
    main.end(both)
    out = main.make(t * h)
    main.end(states)
    return [query, value, mixed, sums, gate, down], out


def _loss(main: Stream, run: Run, x: int) -> tuple[int, int]:
    """Cross-entropy of fp32 logits, there and back to the last layer's output: its gradient and the head's."""
    logits = run.tokens * run.words
    normed = _norm(main, run)
    narrow = main.make(BF16 * logits)
    wide = main.make(FP32 * logits)
    logged = main.make(FP32 * logits)
    main.end(wide, narrow)
    of_loss = main.make(FP32 * logits)
    of_logits = main.make(FP32 * logits)
    main.end(of_loss, logged)
    narrow = main.make(BF16 * logits)
    main.end(of_logits)
    head = main.make(BF16 * run.root_weights[2])
    grad = main.make(BF16 * run.tokens * run.width)
    main.end(narrow, normed)
    return grad, head


def _backward(main: Stream, run: Run, kept: list[int], grad: int) -> tuple[list[int], int]:
    """A block's recomputation and gradients: those of its weights, and of its input."""
    t, h, i = run.tokens * BF16, run.width, run.inner
    states, normed = main.make(t * h), _norm(main, run)
    active, up, both = main.make(t * i), main.make(t * i), main.make(t * i)
    with main.holding(t * i, t * i, t * i, t * h, 2 * t * h, 2 * t * h):
        pass
    main.end(active, up, both, normed)
    gradients = [main.make(BF16 * count) for count in run.layer_weights]
    with main.holding(t * h, t * h, t * h, t * h, 2 * t * h):
        pass
    out = main.make(t * h)
    main.end(states, grad, *kept)
    return gradients, out
