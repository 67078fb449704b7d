"""LitGPT's fine-tuning with LoRA on one GPU, on the plan's tape (lit_gpt of October 2023: model.py, lora.py, finetune/lora.py; torch 2.1).

The model code is not transformers': one product makes queries, keys and values, whose keys and values LoRA may leave out; RMSNorm works in fp32;
the head makes 128 columns at a time, and Lightning Fabric casts what the model returns to fp32, which stays. bitsandbytes 0.41.1 keeps the input of each
4-bit product, quantised fp16 (Params4bit.cuda), and hence makes the dense weight in fp16 first, then in bf16. AdamW's states are bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.components import HANDLE
from launcher.plan.attention import Heads, flash, repeat_kv
from launcher.plan.operators import (
    FP32,
    add,
    cast,
    copy,
    dropout,
    join,
    layer_norm,
    matmul,
    mean,
    mul,
    mul_table,
    negate,
    part,
    pointwise,
    rsqrt,
    scale,
    shift,
    split,
)
from launcher.plan.tape import Parameter, Storage, Tape, Tensor, backward

CHUNK, DROPOUT = 128, 0.05
"""Columns of the head at a time; of the adapters (finetune/lora.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """lit_gpt/config.py: `rotary` is the share of a head that is turned, `words` the padded vocabulary."""

    layers: int
    width: int
    heads: int
    inner: int
    words: int
    groups: int = 0
    head_width: int = 0
    rotary: float = 1.0
    gated: bool = True
    parallel: bool = False
    shared_norm: bool = False
    bias: bool = False
    layer_norm: bool = False
    """LayerNorm in place of RMSNorm."""

    @property
    def key_heads(self) -> int:
        return self.groups or self.heads

    @property
    def head(self) -> int:
        return self.head_width or self.width // self.heads


NEOX: dict[str, Any] = {"gated": False, "parallel": True, "bias": True, "layer_norm": True}
MODELS = {
    "microsoft/phi-1_5": Geometry(layers=24, width=2048, heads=32, inner=8192, words=51200, rotary=0.5, shared_norm=True, **NEOX),
    "stabilityai/stablelm-base-alpha-3b": Geometry(layers=16, width=4096, heads=32, inner=16384, words=50688, rotary=0.25, **NEOX),
    "meta-llama/Llama-2-7b-hf": Geometry(layers=32, width=4096, heads=32, inner=11008, words=32000),
    "meta-llama/Meta-Llama-3-8B": Geometry(layers=32, width=4096, heads=32, groups=8, inner=14336, words=128256),
    "mistralai/Mistral-7B-v0.1": Geometry(layers=32, width=4096, heads=32, groups=8, inner=14336, words=32000),
    "TinyLlama/TinyLlama-1.1B": Geometry(layers=22, width=2048, heads=32, groups=4, inner=5632, words=32000),
    "microsoft/Phi-3-mini-4k-instruct": Geometry(layers=32, width=3072, heads=32, inner=8192, words=32064),
    "google/gemma-7b": Geometry(layers=28, width=3072, heads=16, head_width=256, inner=24576, words=256000),
    "google/gemma-2b": Geometry(layers=18, width=2048, heads=8, groups=1, head_width=256, inner=16384, words=256000),
    "tiiuae/falcon-7b": Geometry(
        layers=32, width=4544, heads=71, groups=1, inner=18176, words=65024, shared_norm=True, **{**NEOX, "bias": False}
    ),
    "microsoft/phi-2": Geometry(layers=32, width=2560, heads=32, inner=10240, words=51200, rotary=0.4, shared_norm=True, **NEOX),
    "meta-llama/Llama-3.2-1B": Geometry(layers=16, width=2048, heads=32, groups=8, inner=8192, words=128256),
    "meta-llama/Llama-3.2-3B": Geometry(layers=28, width=3072, heads=24, groups=8, inner=8192, words=128256),
    "meta-llama/Llama-2-13b-hf": Geometry(layers=40, width=5120, heads=40, inner=13824, words=32000),
}


MODELS |= {
    "meta-llama/Llama-3.1-8B": MODELS["meta-llama/Meta-Llama-3-8B"],
    "meta-llama/Meta-Llama-3.1-8B": MODELS["meta-llama/Meta-Llama-3-8B"],
    "mistralai/Mistral-7B-v0.2": MODELS["mistralai/Mistral-7B-v0.1"],
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": MODELS["TinyLlama/TinyLlama-1.1B"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One micro-step. `bits` of the linear layers, the head's among them; `double_quant`: their scales are quantised too."""

    model: Geometry
    rows: int
    columns: int
    r: int
    bits: int
    double_quant: bool
    everywhere: bool = False
    """Adapters beside every linear layer, the head too; else of queries and values alone."""
    repeated: bool = False
    """Whether the micro-step before was as long: its loss and logits live until the next ones are there, and with the loss its graph."""

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def read(row: dict[str, Any]) -> Training:
    """A reading's configuration. Of the recipes in config_hub, those for small models have adapters everywhere (their files in config_hub/finetune)."""
    quant, small = str(row["quant"] or ""), next((r for name, r in EVERYWHERE.items() if name in row["id"]), None)
    return Training(
        model=MODELS[row["model"]], rows=row["micro_batch"], columns=row["seq_len"], r=small or row["lora"]["r"], bits=4 if quant else 16,
        double_quant=quant.endswith("dq"), everywhere=small is not None, repeated="max_seq_length" in str(row["seq_semantics"]),
    )  # fmt: skip


EVERYWHERE = {"hub-phi-2": 8, "hub-phi-3": 8, "hub-tiny-llama": 32, "hub-gemma-7b": 16, "hub-gemma-2b": 8}
"""Their adapters' rank."""


def predict(run: Training) -> float:
    """torch.cuda.max_memory_allocated after training."""
    tape = Tape()
    before = _left_of_the_last(tape, run) if run.repeated else None
    logits = _forward(tape, run)
    if before is not None:
        before[0] = None
    tape.enter("loss")
    kept, loss = _chunked_cross_entropy(tape, run, logits)
    del before
    backward(tape, loss)
    del kept, loss
    return float(_weights(run) + _trained(run) + max(top for top, _ in tape.peaks.values()) + 2 * HANDLE)


def _left_of_the_last(tape: Tape, run: Training) -> list[Storage | None]:
    """The logits of the micro-step before, and what hangs on the contexts of its graph: the inputs of 4-bit products, which no backward lets go of."""
    m = run.model
    inputs = m.layers * (m.width * (1 if m.shared_norm else 2) + m.heads * m.head + m.inner) + m.width
    return [tape.make(4 * run.tokens * m.words), tape.make(2 * run.tokens * inputs if run.bits == 4 else 0)]


def _trained(run: Training) -> int:
    """Adapters and their two moments, in bf16; gradients are the tape's."""
    m = run.model
    qkv = (m.heads + 2 * m.key_heads) * m.head
    if not run.everywhere:
        return 6 * m.layers * run.r * (2 * m.width + (m.heads + m.key_heads) * m.head)
    mlp = (3 if m.gated else 2) * (m.width + m.inner)
    return 6 * run.r * (m.layers * (3 * m.width + qkv + m.heads * m.head + m.width + mlp) + m.width + m.words)


def _weights(run: Training) -> int:
    m = run.model
    qkv = (m.heads + 2 * m.key_heads) * m.head
    linear = m.layers * (m.width * (qkv + m.heads * m.head) + (3 if m.gated else 2) * m.width * m.inner) + m.words * m.width
    quantised = linear * (0.5 + (1 / 64 + 4 / (64 * 256) if run.double_quant else 4 / 64)) if run.bits == 4 else 2 * linear
    others = m.words * m.width + m.layers * (
        (1 if m.shared_norm else 2) * m.width * (2 if m.bias else 1) + (qkv + 2 * m.width + m.inner if m.bias else 0)
    )
    return int(quantised + 2 * others)


# ------------------------------------------------------------------------------------------- layers


def _linear(tape: Tape, run: Training, x: Tensor, n_in: int, n_out: int) -> Tensor:
    """LoRALinear, or a frozen linear layer."""
    pretrained = _frozen(tape, run, x, n_in, n_out)
    if not run.everywhere:
        return pretrained
    down, up = Parameter(n_in * run.r, 2, trained=True), Parameter(n_out * run.r, 2, trained=True)
    return add(tape, pretrained, scale(tape, matmul(tape, matmul(tape, dropout(tape, x, DROPOUT), down, n_in), up, run.r)))


def _frozen(tape: Tape, run: Training, x: Tensor, n_in: int, n_out: int) -> Tensor:
    return (
        _old_4bit(tape, x, n_in, n_out, run.double_quant)
        if run.bits == 4
        else matmul(tape, x, Parameter(n_in * n_out, 2, trained=False), n_in)
    )


def _old_4bit(tape: Tape, x: Tensor, n_in: int, n_out: int, double_quant: bool) -> Tensor:
    """bitsandbytes 0.41.1, MatMul4Bit: the input hangs on the context; the weight is made dense in both passes, in fp16 and then in bf16."""
    rows, held, size = x.count // n_in, x.storage, x.count * x.width

    def dense() -> Storage:
        scales = tape.make(n_in * n_out // 64 * FP32) if double_quant else None
        half = tape.make(n_in * n_out * 2)
        del scales
        made = tape.make(n_in * n_out * 2)
        del half
        return made

    weight = dense()
    out = tape.new(rows * n_out, 2)
    del weight

    def run(grad: Storage) -> tuple[Storage]:
        assert held is not None
        weight = dense()
        made = tape.make(size)
        del weight
        return (made,)

    return tape.attach(out, run, x)


def _norm(tape: Tape, run: Training, x: Tensor) -> Tensor:
    m = run.model
    if m.layer_norm:
        return layer_norm(tape, x, Parameter(m.width, 2, trained=False), Parameter(m.width, 2, trained=False))
    wide = cast(tape, x, FP32)
    average = mean(tape, mul(tape, wide, wide), wide.count // m.width)
    normed = mul(tape, wide, rsqrt(tape, shift(tape, average)))
    return cast(tape, mul(tape, Parameter(m.width, 2, trained=False), normed), 2)


def _lora_qkv(tape: Tape, run: Training, x: Tensor) -> Tensor:
    """LoRAQKVLinear: without an adapter of the keys, the product of the others' is put into zeros beside the keys' place."""
    m = run.model
    whole = (m.heads + 2 * m.key_heads) * m.head
    adapted = whole if run.everywhere else (m.heads + m.key_heads) * m.head
    pretrained = _frozen(tape, run, x, m.width, whole)
    after_a = matmul(tape, dropout(tape, x, DROPOUT), Parameter(m.width * (3 if run.everywhere else 2) * run.r, 2, trained=True), m.width)
    made = _convolve(tape, run, after_a, adapted)
    return add(tape, pretrained, scale(tape, made if run.everywhere else _pad(tape, made, run.tokens * whole)))


def _convolve(tape: Tape, run: Training, x: Tensor, adapted: int) -> Tensor:
    """conv1d over the transposed rows, in one group an adapter."""
    x = copy(tape, x)
    weight = Parameter(adapted * run.r, 2, trained=True)
    kept = tape.save(x)
    sizes = (x.count * 2, weight.count * 2)
    return tape.record(run.tokens * adapted, 2, lambda grad: (kept.fetch(), tape.make(sizes[0]), tape.make(sizes[1]))[1:], x, weight)


def _pad(tape: Tape, x: Tensor, count: int) -> Tensor:
    """index_copy into zeros: keeps its source, which is x by rows."""
    zeros = tape.new(count, 2)
    source = copy(tape, x)
    kept, size = tape.save(source), source.count * 2
    out = tape.record(count, 2, lambda grad: (kept.fetch(), tape.make(size))[1:], source)
    del zeros
    return out


def _rotate(tape: Tape, run: Training, x: Tensor) -> Tensor:
    """Part of a head is turned by tables in fp32, and joined to the rest."""
    m = run.model
    turning = part(tape, x, int(x.count * m.rotary))
    table = Tensor(None, 0, FP32)
    first, second = part(tape, turning, turning.count // 2), part(tape, turning, turning.count // 2)
    rotated = join(tape, negate(tape, second), first)
    roped = add(tape, mul_table(tape, turning, table), mul_table(tape, rotated, table))
    return join(tape, cast(tape, roped, 2), part(tape, x, x.count - turning.count))


def _attention(tape: Tape, run: Training, x: Tensor) -> Tensor:
    m = run.model
    qkv = _lora_qkv(tape, run, x)
    sizes = (run.tokens * m.heads * m.head, run.tokens * m.key_heads * m.head)
    query, key, value = split(tape, qkv, (sizes[0], sizes[1], sizes[1]))
    at = Heads(rows=run.rows, queries=run.columns, keys=run.columns, heads=m.heads, kv_heads=m.key_heads, width=m.head, value_width=m.head)
    if m.key_heads != m.heads:
        query, key, value = copy(tape, query), repeat_kv(tape, key, at), repeat_kv(tape, value, at)
        at.kv_heads = m.heads
    turned, turned_key = _rotate(tape, run, query), _rotate(tape, run, key)
    query, key = turned, turned_key
    del turned, turned_key
    mixed = copy(tape, flash(tape, query, key, value, at, workspace=True))  # the output lies as the queries do, head by head
    return _linear(tape, run, mixed, m.heads * m.head, m.width)


def _mlp(tape: Tape, run: Training, x: Tensor) -> Tensor:
    m = run.model
    if not m.gated:
        return _linear(tape, run, pointwise(tape, _linear(tape, run, x, m.width, m.inner)), m.inner, m.width)
    gate, up = _linear(tape, run, x, m.width, m.inner), _linear(tape, run, x, m.width, m.inner)
    both = mul(tape, pointwise(tape, gate), up)
    return _linear(tape, run, both, m.inner, m.width)


def _block(tape: Tape, run: Training, x: Tensor) -> Tensor:
    m = run.model
    normed = _norm(tape, run, x)
    attended = _attention(tape, run, normed)
    if m.parallel:
        return add(tape, add(tape, _mlp(tape, run, normed if m.shared_norm else _norm(tape, run, x)), attended), x)
    states = add(tape, attended, x)
    return add(tape, _mlp(tape, run, _norm(tape, run, states)), states)


def _forward(tape: Tape, run: Training) -> list[Tensor]:
    """The head's logits, a chunk of columns each, in fp32."""
    m = run.model
    x = tape.new(run.tokens * m.width, 2)
    for _ in range(m.layers):
        x = _block(tape, run, x)
    x = _norm(tape, run, x)
    columns = [CHUNK] * (run.columns // CHUNK) + ([run.columns % CHUNK] if run.columns % CHUNK else [])
    logits = [_linear(tape, run, rows, m.width, m.words) for rows in split(tape, x, tuple(run.rows * n * m.width for n in columns))]
    return [cast(tape, chunk, FP32) for chunk in logits]


def _go_back(tape: Tape, kept: Any, size: int, grad: Storage) -> tuple[Storage]:
    """A gradient of so many bytes, made of what was kept (None: nothing)."""
    if kept is not None:
        kept.fetch()
    return (tape.make(size),)


def _chunked_cross_entropy(tape: Tape, run: Training, logits: list[Tensor]) -> tuple[list[Any], Tensor]:
    """A chunk's losses each, then their mean. The logits' list stays in the training loop's frame."""
    losses = []
    for chunk in logits:
        logged = tape.new(chunk.count, FP32)
        tape.attach(logged, partial(_go_back, tape, tape.save(logged), chunk.count * FP32), chunk)
        losses.append(tape.record(chunk.count // run.model.words, FP32, partial(_go_back, tape, None, chunk.count * FP32), logged))
        del logged
    return logits, mean(tape, join(tape, *losses), 1)
