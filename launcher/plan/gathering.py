"""ZeRO-3's gathered parameters: what a rank holds whole while it computes (DeepSpeed 0.19.8, partitioned_param_coordinator.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from launcher.plan.shape import adapter_rank, is_head
from launcher.plan.states import Sharding, quantised_bytes
from launcher.plan.workload import Workload, is_quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Bytes held whole in each phase. `largest` is the largest single parameter, which loading and exporting gather; `largest_layer` is
    what a 4-bit model's loading quantises at once."""

    forward: int
    loss: int
    backward: int
    largest: int
    largest_layer: int


@lru_cache(maxsize=512)
def gather(work: Workload, sharding: Sharding) -> Gathered:
    """A layer is fetched in one buffer and copied out of it; the next parameters are fetched ahead; what is used again within
    `max_reuse` elements after the last layer stays (the head always, the last layers of a small model)."""
    layers, head, embedding, largest = sizes_of(work, sharding)
    if sharding.stage != 3 or not layers:
        return Gathered(forward=0, loss=0, backward=0, largest=0, largest_layer=0)
    layer_bytes = max(size for size, _ in layers)
    if sharding.ranks == 1 and not sharding.offload_param:  # a part is the whole: it is used where it lies (NoGatherHandle)
        return Gathered(forward=0, loss=0, backward=0, largest=largest, largest_layer=layer_bytes)
    ahead = min(work.width * sharding.prefetch, layer_bytes)
    kept, distance = 0, 2 * (head[1] or embedding[1])
    for size, elements in reversed(layers):
        if distance >= sharding.max_reuse:
            break
        kept += size
        distance += 2 * elements
    working = layer_bytes + ahead
    head_bytes = head[0] or embedding[0]
    return Gathered(forward=max(working + kept, embedding[0]), loss=head_bytes + kept, backward=working + head_bytes, largest=largest,
                    largest_layer=layer_bytes)  # fmt: skip


def sizes_of(work: Workload, sharding: Sharding) -> tuple[list[tuple[int, int]], tuple[int, int], tuple[int, int], int]:
    """Bytes and elements of each layer, of the head, of the embedding; the largest parameter's bytes. Small parameters are whole anyway."""
    shape, method = work.shape, work.method
    by_layer: dict[tuple[bool, int], tuple[int, int]] = {}
    head = embedding = (0, 0)
    largest = 0
    for block in shape.inventory:
        size = elements = 0
        for weight in block.weights:
            rank = adapter_rank(shape.model_type, block.prefix, weight, method.r, method.target_modules) if method.r else 0
            if rank:
                more = rank * sum(weight.shape[-2:]) * (weight.shape[0] if len(weight.shape) == 3 else 1)
                size, elements = size + work.width * more, elements + more
            if weight.count <= sharding.persistence:
                continue
            quantised = method.bits != 16 and is_quantised(block.prefix, weight)
            its_bytes = quantised_bytes(weight, method)[0] if quantised else work.width * weight.count
            size, elements = size + its_bytes, elements + weight.count
            largest = max(largest, its_bytes)
            if not block.layers and is_head(block.prefix, weight):
                head = (its_bytes, weight.count)
            elif not block.layers and ("embed" in weight.name or (shape.is_pair and weight.name == "shared.weight")):
                embedding = (its_bytes, weight.count)
        for layer in block.layers:
            by_layer[shape.is_pair and block.prefix.startswith("decoder."), layer] = (size, elements)
    return [by_layer[layer] for layer in sorted(by_layer)], head, embedding, largest
