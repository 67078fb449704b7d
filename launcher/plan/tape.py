"""Live bytes of a forward and backward pass, without torch: storages that begin and end, autograd's order, checkpointing.

The operators are those of `launcher.plan.operators`; they make a `Tensor` (a view of a `Storage`), say what their backward keeps,
and what it makes. A storage ends when the last Python reference to it goes, as in torch: a model written with these operators
in the order of transformers' code holds what that code holds. Facts of torch 2.13 (autograd/engine.cpp, input_buffer.cpp,
utils/checkpoint.py): nodes run in the reverse of their making; a node's kept tensors go after it ran; gradients that meet
are added in place where nothing else holds the first; a checkpointed function keeps its arguments until its last node has run, and
its recomputation stops at the last tensor that is needed.
"""

from __future__ import annotations

import heapq
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from launcher.plan.reductions import sum_of_rows_workspace

ROUND_TO = 512
"""torch's CUDA allocator hands out multiples of this (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""

ACTIVATIONS, CHECKPOINTS, LOGITS, GRADIENTS, DEQUANTISED, GATHERED, BUCKET = range(7)
KINDS = (
    "activations",
    "activation checkpoints",
    "logits and loss",
    "gradients",
    "dequantisation workspace",
    "gathered parameters",
    "buckets",
)
"""What a storage is counted as."""

GRAPH_OBJECT = 1
"""Bytes of an event that is no storage: a node of autograd's graph, which glibc's heap has a place for (launcher/plan/heap.py)."""

Gradient = "Storage | None"


@dataclass(slots=True)
class Mark:
    """Where among the events a module is entered and left; its backward pass too."""

    direction: str
    module: int | str
    entering: int
    leaving: int | None = None


class Tape:
    """The one who counts. `peaks` holds, phase by phase, the most that was live and how it was made up."""

    __slots__ = ("accumulates_in_place", "counts_workspace", "events", "frame", "fused", "on_cuda", "grad_enabled", "kind", "live", "marks", "next_id", "now", "on_gradient",
                 "has_gradients", "notes_graph", "on_host", "peaks", "phase", "recomputing", "reentrant", "round_to", "sequence", "top", "training", "unpacked")  # fmt: skip

    def __init__(
        self, *, round_to: int = ROUND_TO, record: bool = False, accumulates_in_place: bool = True, on_cuda: bool = True, counts_workspace: bool = True, training: bool = True,
        fused: bool = False, reentrant: bool = False, notes_graph: bool = False,
    ) -> None:  # fmt: skip
        self.fused = fused  # Liger's kernels in place of torch's
        self.reentrant = reentrant  # torch.utils.checkpoint(use_reentrant=True): a recomputation runs to its end, and its output stays
        self.notes_graph = notes_graph  # nodes are among the events, as objects of `GRAPH_OBJECT` bytes
        self.now = self.on_host = 0
        self.has_gradients = False
        self.marks: list[Mark] = []
        self.live = [0] * len(KINDS)
        self.peaks: dict[str, tuple[int, list[int]]] = {}
        self.events: list[tuple[str, int, int]] | None = [] if record else None
        self.phase, self.top = "forward", 0
        self.kind = ACTIVATIONS
        self.round_to = round_to
        self.next_id = 0
        self.sequence = 0
        self.frame: _Frame | None = None
        self.recomputing: _Frame | None = None
        self.accumulates_in_place = accumulates_in_place
        self.grad_enabled = self.training = training
        self.unpacked: list[Tensor] = []
        """What a node was given of a recomputation: it holds on to it while it runs."""
        self.counts_workspace = counts_workspace
        self.on_cuda = on_cuda
        """CUDA's kernels differ: dropout keeps a mask of one byte an element, where others keep one in the input's dtype."""
        self.on_gradient: Callable[[Sink, Storage], None] = _keep_gradient

    def enter(self, phase: str) -> None:
        """From here on, peaks are this phase's."""
        self.phase = phase
        self.top, _ = self.peaks.get(phase, (0, []))

    def enter_module(self, module: int | str, direction: str = "forward") -> None:
        """From here on, what is computed is this module's: ZeRO-3 gathers it here. Its backward pass is marked by `mark_backward`."""
        if self.events is not None:
            self.marks.append(Mark(direction, module, len(self.events)))

    def leave_module(self, module: int | str, direction: str = "forward") -> None:
        if self.events is not None:
            for mark in reversed(self.marks):
                if (mark.direction, mark.module) == (direction, module):
                    mark.leaving = len(self.events)
                    return

    def mark_backward(self, x: Tensor, module: int | str, *, ends: bool = False) -> Tensor:
        """The same tensor, at whose gradient a module's backward pass begins, or ends."""
        if self.events is None or x.node is None or not self.grad_enabled:
            return x
        note = self.leave_module if ends else self.enter_module

        def run(grad: Storage) -> tuple[Storage]:
            note(module, "backward")
            return (grad,)

        return self.attach(Tensor(x.storage, x.count, x.width), run, x)

    def make(self, size: int) -> Storage:
        """A storage of so many bytes."""
        return Storage(self, -(-size // self.round_to) * self.round_to)

    def new(self, count: int, width: int, node: Node | None = None) -> Tensor:
        return Tensor(Storage(self, -(-count * width // self.round_to) * self.round_to), count, width, node)

    def save(self, tensor: Tensor) -> Saved:
        """What an operator keeps for its backward: the tensor, or, in a checkpointed function, a promise to make it again."""
        if self.recomputing is not None:
            self.recomputing.store(tensor)
        elif self.frame is not None:
            return self.frame.hold()
        return Saved(tensor)

    def record(self, count: int, width: int, run: Callable[[Storage], tuple[Any, ...]], *inputs: Tensor) -> Tensor:
        """The output of an operator; `run` makes the gradients of `inputs` from the output's."""
        return self.attach(self.new(count, width), run, *inputs)

    def attach(self, out: Tensor, run: Callable[[Any], tuple[Any, ...]], *inputs: Tensor) -> Tensor:
        if self.grad_enabled:
            for tensor in inputs:
                if tensor.node is not None:
                    self.sequence += 1
                    out.node = Node(
                        self.sequence,
                        self.phase,
                        run if self.recomputing is None else None,
                        tuple((t.node, t.slot) for t in inputs),
                        _GraphObject(self) if self.notes_graph else None,
                    )
                    break
        return out

    def attach_all(self, outs: tuple[Tensor, ...], run: Callable[[list[Storage | None]], tuple[Any, ...]], *inputs: Tensor) -> None:
        """Several outputs of one operator: `run` is given the list of their gradients."""
        self.attach(outs[0], run, *inputs)
        node = outs[0].node
        if isinstance(node, Node):
            node.grads = [None] * len(outs)
            for slot, out in enumerate(outs):
                out.node, out.slot = node, slot


class Storage:
    """Bytes on the device, from its making to its last reference."""

    __slots__ = ("__weakref__", "key", "kind", "size", "tape")

    def __init__(self, tape: Tape, size: int) -> None:
        self.tape, self.size, self.kind = tape, size, tape.kind
        now = tape.now + size
        tape.now = now
        tape.live[tape.kind] += size
        if now > tape.top:
            tape.top = now
            tape.peaks[tape.phase] = (now, tape.live.copy())
        if tape.events is not None:
            tape.next_id += 1
            self.key = tape.next_id
            tape.events.append((tape.phase, size, self.key))

    def __del__(self) -> None:
        tape = self.tape
        tape.now -= self.size
        tape.live[self.kind] -= self.size
        if tape.events is not None:
            tape.events.append((tape.phase, -self.size, self.key))

    def count_as(self, kind: int) -> None:
        self.tape.live[self.kind] -= self.size
        self.tape.live[kind] += self.size
        self.kind = kind


class _GraphObject:
    """What a node is to the heap, from its making to the last reference."""

    __slots__ = ("key", "tape")

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.key = tape.next_id = tape.next_id + 1
        self._note(GRAPH_OBJECT)

    def __del__(self) -> None:
        self._note(-GRAPH_OBJECT)

    def _note(self, size: int) -> None:
        assert self.tape.events is not None
        self.tape.events.append((self.tape.phase, size, self.key))


class Tensor:
    """A view of a storage: `count` elements of `width` bytes. `node` made it, where a gradient must flow."""

    __slots__ = ("count", "node", "slot", "storage", "width")

    def __init__(self, storage: Any, count: int, width: int, node: Node | Sink | None = None, slot: int = 0) -> None:
        self.storage, self.count, self.width, self.node, self.slot = storage, count, width, node, slot


class Parameter(Tensor):
    """A weight. Its bytes are the states' (launcher/plan/states.py), not the tape's; its gradient's are."""

    __slots__ = ()

    def __init__(self, count: int, width: int, trained: bool) -> None:
        super().__init__(None, count, width, Sink(count=count) if trained else None)


class Sink:
    """Where a gradient ends: a trained weight, or a tensor that is made to need a gradient (a leaf), which the graph then keeps."""

    __slots__ = ("count", "gradient", "leaf", "pending", "users")

    def __init__(self, leaf: Storage | None = None, count: int = 0) -> None:
        self.leaf, self.count = leaf, count
        self.users = 0
        self.pending: Storage | None = None
        self.gradient: Storage | None = None


class Saved:
    """A kept tensor."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def fetch(self) -> Tensor:
        return self.tensor


class _Promise(Saved):
    """A tensor that is made again when it is asked for."""

    __slots__ = ("__weakref__", "frame")

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self.tensor: Any = None

    def fetch(self) -> Tensor:
        if not self.frame.recomputed:
            self.frame.recompute()
        found: Tensor = self.tensor
        self.tensor = None  # what is made again is given away, once
        self.frame.tape.unpacked.append(found)
        return found


class _Enough(Exception):
    """Raised inside a recomputation once the last tensor that is needed is there."""


class _Frame:
    """One checkpointed call: the function and its arguments, and the promises it gave."""

    __slots__ = ("function", "inputs", "offloaded", "output", "promises", "recomputed", "stored", "tape")

    def __init__(self, tape: Tape, function: Callable[..., Any], inputs: Any) -> None:
        self.tape, self.function, self.inputs = tape, function, inputs
        self.promises: list[weakref.ref[_Promise]] = []
        self.recomputed, self.stored, self.offloaded = False, 0, False
        self.output: Any = None

    def hold(self) -> _Promise:
        promise = _Promise(self)
        self.promises.append(weakref.ref(promise))
        return promise

    def store(self, tensor: Tensor) -> None:
        promise = self.promises[self.stored]()
        if promise is not None:
            promise.tensor = Tensor(tensor.storage, tensor.count, tensor.width)
        self.stored += 1
        if self.stored == len(self.promises) and not self.tape.reentrant:
            raise _Enough

    def recompute(self) -> None:
        self.recomputed = True
        tape = self.tape
        outer, tape.recomputing = tape.recomputing, self
        kind, tape.kind = tape.kind, ACTIVATIONS
        inputs = self.inputs
        if self.offloaded:  # made anew, with the place in the graph that it had
            inputs = tuple(Tensor(tape.new(told[0], told[1]).storage, *told) if told else None for told in self.inputs)
        try:
            self.output = self.function(*inputs)
        except _Enough:
            pass
        finally:
            tape.recomputing, tape.kind = outer, kind


def checkpoint(tape: Tape, function: Callable[..., Any], *inputs: Tensor | None, offload: bool = False) -> Any:
    """What the function gives, with its arguments kept in place of all that its backward needs (use_reentrant=False).

    `offload`: the arguments go to host memory, and come back for the recomputation (transformers' save_on_cpu).
    """
    frame = _Frame(tape, function, inputs)
    if offload:
        frame.offloaded = True
        frame.inputs = tuple(None if x is None else (x.count, x.width, x.node, x.slot) for x in inputs)
        tape.on_host += sum(x.count * x.width for x in inputs if x is not None)
    else:
        first = inputs[0]
        assert first is not None, "a layer is given a hidden state"
        first.storage.count_as(CHECKPOINTS)
    outer, tape.frame = tape.frame, frame
    try:
        return function(*inputs)
    finally:
        tape.frame = outer


class Node:
    """An operator in the graph. `run` is given the output's gradient (a list of them, with several outputs)."""

    __slots__ = ("edges", "grads", "noted", "phase", "run", "sequence")

    def __init__(self, sequence: int, phase: str, run: Any, edges: tuple[Any, ...], noted: _GraphObject | None = None) -> None:
        self.sequence, self.phase, self.run, self.edges, self.noted = sequence, phase, run, edges, noted
        self.grads: Any = None

    def __lt__(self, other: Any) -> bool:
        return bool(self.sequence > other.sequence)


def backward(tape: Tape, loss: Tensor, *, retain: bool = False) -> None:
    """Run the graph behind `loss`. Until a trained weight has its gradient, nodes made in phase "loss" run in "loss backward", all others in
    "early backward"; from then on, when DeepSpeed has its bucket (stage_1_and_2.py, setup_buckets), in "backward".

    `retain`: what the graph keeps stays (retain_graph=True).
    """
    root = loss.node
    assert isinstance(root, Node), "nothing is trained"
    tape.enter("loss backward" if root.phase == "loss" else "early backward")
    first = root.grads = tape.make(4)  # torch.autograd.backward holds on to it
    leaves = _count_users(root)  # a graph holds on to them until it goes
    ready: list[Node] = [root]
    queued = {root.sequence}
    while ready:
        node = heapq.heappop(ready)
        phase = "backward" if tape.has_gradients else "loss backward" if node.phase == "loss" else "early backward"
        if tape.phase != phase:
            tape.enter(phase)
        tape.kind = LOGITS if node.phase == "loss" else ACTIVATIONS
        run, edges, grads = node.run, node.edges, node.grads
        node.grads = None
        if not retain:
            node.run, node.edges, node.noted = None, (), None
        outputs = list(run(grads))
        tape.unpacked.clear()
        for index, output in enumerate(outputs):
            if isinstance(output, tuple):
                # Made in another shape or dtype than its tensor's; fitted before the node lets go (validate_outputs).
                outputs[index] = _fit(tape, edges[index][0], *output)
        del run, grads
        output = None
        for index, (edge, slot) in enumerate(edges):
            grad = outputs[index]
            outputs[index] = None
            if edge is None or grad is None:
                continue
            if isinstance(edge, Sink):
                _accumulate(tape, edge, grad)
            else:
                if isinstance(edge.grads, list):
                    edge.grads[slot] = _add(tape, edge.grads[slot], grad)
                else:
                    edge.grads = _add(tape, edge.grads, grad)
                if edge.sequence not in queued:
                    queued.add(edge.sequence)
                    heapq.heappush(ready, edge)
            del grad
        del edges, outputs, node
    del first, leaves


def _fit(tape: Tape, edge: Any, whole: Storage, size: int) -> Storage:
    """A gradient summed or cast to `size` bytes; a weight's is summed over rows, with a buffer beside it."""
    made = tape.make(size)
    if isinstance(edge, Sink) and edge.count and tape.on_cuda and tape.counts_workspace:
        beside = sum_of_rows_workspace(whole.size // max(1, size), edge.count)
        if beside:
            tape.make(beside)
    return made


def _count_users(root: Node) -> list[Sink]:
    """How often each parameter is used: its gradient is whole when so many have come (tied weights). Gives the leaves that are no parameters."""
    seen: set[int] = set()
    leaves: list[Sink] = []
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        for edge, _ in node.edges:
            if isinstance(edge, Sink):
                edge.users += 1
                if edge.leaf is not None:
                    leaves.append(edge)
            elif edge is not None and edge.sequence not in seen:
                seen.add(edge.sequence)
                stack.append(edge)
    return leaves


def _accumulate(tape: Tape, sink: Sink, grad: Storage) -> None:
    sink.users -= 1
    sink.pending = _add(tape, sink.pending, grad)
    del grad
    if sink.users:
        return
    whole, sink.pending = sink.pending, None
    assert whole is not None
    if sink.leaf is not None:
        sink.gradient = whole
        return
    whole.count_as(GRADIENTS)
    if not tape.has_gradients:
        tape.has_gradients = True
        tape.enter("backward")
        tape.top = tape.now
        tape.peaks["backward"] = (tape.now, tape.live.copy())
    tape.on_gradient(sink, whole)


def _add(tape: Tape, old: Storage | None, new: Storage) -> Storage:
    if old is None:
        return new
    if tape.accumulates_in_place and sys.getrefcount(old) <= _LONE:
        return old
    return Storage(tape, max(old.size, new.size))


def _count_references_of_a_lone_gradient() -> int:
    """What getrefcount says in `_add` of a gradient that only its node holds; Python versions differ."""

    def probe(tape: Any, old: Any, new: Any) -> int:
        return sys.getrefcount(old)

    node = Node(0, "", None, ())
    node.grads = object()
    return probe(None, node.grads, None)


_LONE = _count_references_of_a_lone_gradient()


def _keep_gradient(sink: Sink, grad: Storage) -> None:
    sink.gradient = grad


def drop_gradient(sink: Sink, grad: Storage) -> None:
    """What ZeRO-2 and 3 do: copied to where it belongs, and gone."""


@contextmanager
def counting_as(tape: Tape, kind: int) -> Iterator[None]:
    before, tape.kind = tape.kind, kind
    try:
        yield
    finally:
        tape.kind = before
