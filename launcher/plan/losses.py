"""Cross-entropy on the tape: all logits at once, some rows of them at a time, or Liger's fused kernel (launcher/train/loss.py)."""

from __future__ import annotations

from functools import partial
from typing import Any

from launcher.plan.linears import Linear, linear
from launcher.plan.operators import FP32, add, cast, matmul, pointwise_of_result, split, view
from launcher.plan.tape import LOGITS, Parameter, Sink, Storage, Tape, Tensor, checkpoint, counting_as

LOSS_CHUNK = 256
"""Rows of logits that chunked cross-entropy makes at a time: enough for a matrix product to be fast."""
POST_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
"""Keys of a config.json by which a model changes its logits after its head; a head that gives the loss is then no use."""
HEADS_OF_LAYERS = ("bert", "roberta")


def changes_logits(config: dict[str, Any]) -> bool:
    """Whether a model does something to its logits after its head, or has a head of several layers."""
    return config.get("model_type") in HEADS_OF_LAYERS or any(config.get(key) not in (None, 1, 1.0) for key in POST_HEAD)


def project(tape: Tape, rows: Tensor, head: Any, hidden_size: int) -> Tensor:
    """The head: a linear layer, or the embedding's weight."""
    return linear(tape, rows, head) if isinstance(head, Linear) else matmul(tape, rows, head, hidden_size)


def cross_entropy(tape: Tape, logits: Tensor, rows: int, targets: Tensor) -> Tensor:
    """Summed, of fp32 logits: log_softmax keeps its output, nll_loss too."""
    logged = pointwise_of_result(tape, logits)
    kept = tape.save(logged)
    kept_targets = tape.save(targets)
    loss = tape.new(1, FP32)
    weight = tape.save(tape.new(1, FP32))
    size = logits.count * FP32

    def run(grad: Storage) -> tuple[Storage]:
        kept.fetch(), kept_targets.fetch(), weight.fetch()
        return (tape.make(size),)

    return tape.attach(loss, run, logged)


def chunked_loss(tape: Tape, chosen: Tensor, head: Any, hidden_size: int, targets: Tensor) -> Tensor:
    """launcher.train.head.LossHead: each chunk's logits are made again in its backward."""
    rows = chosen.count // hidden_size
    sizes = [LOSS_CHUNK] * (rows // LOSS_CHUNK) + ([rows % LOSS_CHUNK] if rows % LOSS_CHUNK else [])
    total = tape.new(1, FP32)
    for chunk, count in zip(split(tape, chosen, tuple(size * hidden_size for size in sizes)), sizes, strict=True):
        loss = partial(_loss_of_chunk, tape, count=count, head=head, hidden_size=hidden_size, targets=targets)
        part = checkpoint(tape, loss, chunk)
        total = add(tape, total, part)
        del part
    return total


def _loss_of_chunk(tape: Tape, rows: Tensor, count: int, head: Any, hidden_size: int, targets: Tensor) -> Tensor:
    with counting_as(tape, LOGITS):
        return cross_entropy(tape, cast(tape, project(tape, rows, head, hidden_size), FP32), count, view(targets, count))


def liger_chunk(rows: int, hidden_size: int, vocab_size: int) -> int:
    """Rows that Liger takes at a time: logits no larger than the hidden states (liger-kernel 0.8.5, ops/fused_linear_cross_entropy.py)."""
    wanted = -(-rows // -(-vocab_size // hidden_size))
    return min(rows, 1 << (wanted - 1).bit_length())


def liger_loss(tape: Tape, chosen: Tensor, head: Any, hidden_size: int, *, sums_in_place: bool) -> Tensor:
    """Gradients are made in the forward pass, over the chunk's own logits, and only scaled in the backward pass.

    `sums_in_place`: a chunk's part of the head's gradient is added to the sum as it is made (in 16 bits, from Ampere on), else by way of a
    whole gradient, in fp32 too. A bias gets a gradient whether it is trained or not.
    """
    weight, bias = (head, None) if isinstance(head, Parameter) else (head.weight, head.bias)
    rows, vocab_size = chosen.count // hidden_size, weight.count // hidden_size
    trained = weight.node is not None and tape.grad_enabled
    if chosen.node is None and tape.grad_enabled:  # LossHead asks it for a gradient
        chosen = Tensor(chosen.storage, chosen.count, chosen.width, Sink(chosen.storage))
    gradients = [tape.new(chosen.count, chosen.width), tape.new(weight.count, weight.width) if trained else None,
                 tape.new(vocab_size, weight.width) if bias is not None and tape.grad_enabled else None]  # fmt: skip
    losses, mask = tape.new(rows, FP32), tape.new(rows, 1)
    logits = tape.new(liger_chunk(rows, hidden_size, vocab_size) * vocab_size, chosen.width)
    if trained and not (sums_in_place and weight.width < FP32):
        product = tape.new(weight.count, weight.width)
        cast(tape, product, FP32)
        del product
    if gradients[2] is not None:
        tape.new(vocab_size, weight.width)
    del logits
    loss = tape.new(1, FP32)
    kept = [tape.save(tensor) for tensor in gradients if tensor is not None]
    del losses, mask
    made: list[Storage | None] = [None if tensor is None else tensor.storage for tensor in gradients]
    del gradients

    def run(grad: Storage) -> tuple[Storage | None, ...]:
        for tensor in kept:
            tensor.fetch()
        out = (made[0], made[1], made[2] if bias is not None and bias.node is not None else None)
        made.clear()
        return out

    return tape.attach(loss, run, chosen, weight, *([bias] if bias is not None else []))
