"""What a CPU worker keeps beside tensors: oneDNN's products, and the objects of Python and C++ that a model is made of.

torch hands oneDNN every matrix product in bf16, and it compiles code for each shape anew. Two caches hold what was compiled (torch's,
LRU_CACHE_CAPACITY; oneDNN's, ONEDNN_PRIMITIVE_CACHE_CAPACITY), each up to 1,024 products. Where rows differ in length that is without bound in
practice: SmolLM2-135M grows by 550 MiB, the heap's holes between products among them. Products of fp32 go to MKL, which keeps
up to 7 MiB of packed matrices (nine shapes were measured): not counted.
Workers therefore bound both caches to what one micro-step computes (launcher/train/budget.py), and the plan counts that.
"""

from __future__ import annotations

from functools import lru_cache

from launcher.plan.inventory_others import reads_source
from launcher.plan.shape import adapter_rank, is_head
from launcher.plan.workload import Workload

LEAST_KEPT = 48
"""Products; so that a model of unknown parts does not compile each anew: a Llama with adapters has 31."""
SPARE = 8
CODE_BYTES = 448 << 10
"""Compiled code and buffers a product: 300 to 1,400 KiB were measured over twelve shapes on a CPU with AMX (torch 2.13, oneDNN's brg_matmul),
2,400 KiB for one; on average 430 to 590 KiB of those that are there in the four runs in bf16 of the models 64 wide below. Rows of one length make fewer
products than the caches hold: it was set below that average with the tiny rows of docs/dry-run.md in sight."""
ATTENTION = 6
"""Small products in the backward pass of torch's fused attention on a CPU."""


@lru_cache(maxsize=256)
def count_products(work: Workload) -> int:
    """How many different products a micro-step has."""
    shape, method, tokens = work.shape, work.method, work.tokens
    found: set[tuple[str, int, int, int]] = set()

    def add(kind: str, rows: int, n_in: int, n_out: int, *, trained: bool) -> None:
        found.add(("forward" + kind, rows, n_in, n_out))
        found.add(("of input" + kind, rows, n_out, n_in))
        if trained:
            found.add(("of weight" + kind, rows, n_in, n_out))

    columns = work.micro_batch_size * work.loss_columns
    for block in shape.inventory:
        for weight in block.weights:
            head = is_head(block.prefix, weight) or (shape.tied_embeddings and ("embed" in weight.name or weight.name == "shared.weight"))
            if len(weight.shape) < 2 or not (weight.matrix or head):  # a head's bias is a vector
                continue
            n_in, n_out = weight.fan
            rows = columns if head or (shape.is_pair and not reads_source(block.prefix + weight.name)) else tokens  # of a pair a target's
            names = [block.prefix.format(layer) + weight.name for layer in block.layers or (0,)]
            trained = any(method.trains_base(name, shape.depth_of(name)) for name in names)
            add("", rows, n_in, n_out, trained=trained)
            rank = adapter_rank(shape.model_type, block.prefix, weight, method.r, method.target_modules) if method.r else 0
            if rank:
                add(" A", rows, n_in, rank, trained=True)
                add(" B", rows, rank, n_out, trained=True)
    return len(found) + ATTENTION


def count_kept(work: Workload) -> int:
    """Products that each cache may hold."""
    return max(LEAST_KEPT, count_products(work) + SPARE)


def predict_products(work: Workload) -> int:
    """Bytes that the caches hold once a micro-step was taken."""
    return count_kept(work) * CODE_BYTES if work.device == "cpu" and work.width == 2 else 0


WORKER_OBJECTS, LAYER_OBJECTS, ADAPTER_OBJECTS = 2 << 20, 280 << 10, 70 << 10
"""Bytes of a worker's engine; of a layer's modules, parameters and DeepSpeed's hooks; of the ten modules that peft puts in a linear layer's place.
Fitted on models 64 wide, of 2 and 24 layers, full and LoRA, in fp32, that no table of results has (growth of 10 to 48 MiB: -5 to +16 %)."""


def predict_objects(work: Workload) -> int:
    """Bytes of Python's and C++'s own objects around the tensors."""
    shape, method = work.shape, work.method
    adapted = sum(
        block.repeats for block in shape.inventory for weight in block.weights
        if method.r and adapter_rank(shape.model_type, block.prefix, weight, method.r, method.target_modules)
    )  # fmt: skip
    return WORKER_OBJECTS + LAYER_OBJECTS * shape.total_layers + ADAPTER_OBJECTS * adapted
