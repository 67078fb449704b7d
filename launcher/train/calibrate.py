"""The constants of this machine, measured: run as a process of its own, so that what it holds is what a worker holds.

python -m launcher.train.calibrate cpu|cuda      prints one JSON object

On a CPU: the resident memory of a worker that has only imported its libraries and joined a group, what the memory
allocator keeps beyond live tensors over a training step, and what matrix products and copies reach. On a GPU: what the
driver and its kernels take (the context), cuBLAS' workspace, and a NCCL communicator of all GPUs here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from launcher.train.budget import forget_peak, read_peak_resident, read_resident
from launcher.train.trace import Trace, watching

RATE_S = 1.5
"""Seconds that each rate is measured for."""


def measure_cpu() -> dict[str, Any]:
    libraries = _join_and_import()
    slack = _measure_slack()
    threads = torch.get_num_threads()
    both = {"flops_fp32": _measure_flops(torch.float32), "flops_16bit": _measure_flops(torch.bfloat16), "memory_rate": _measure_copy()}
    rates = {name: rate / threads for name, rate in both.items()}
    return {"device": "CPU", "bytes": {"libraries": libraries}, "rates": rates, "slack": slack}


def _join_and_import() -> int:
    """Bytes of a worker before it has a model."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()
    return read_resident()


def _measure_slack() -> float:
    """What is resident beyond live tensors at the peak of a few training steps, as a share of these."""
    from transformers import LlamaConfig, LlamaForCausalLM

    trace = Trace()
    base = read_resident()
    forget_peak()
    with watching(trace, device="cpu", kernels=False, round_to=64):
        config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                             vocab_size=8192, max_position_embeddings=512)  # fmt: skip
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(2):
            tokens = torch.randint(0, 8192, (2, 256))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    live = max(trace.peaks.values())
    return max(0.0, (read_peak_resident() - base) / live - 1.0)


def _measure_flops(dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products on the threads this process has."""
    left, right = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 * _repeat(lambda: left @ right)


def _measure_copy() -> float:
    """Bytes/s read and written by copies that no cache holds."""
    source = torch.empty(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() * _repeat(lambda: target.copy_(source))


def _repeat(work: Callable[[], Any]) -> float:
    """How often a second."""
    work()
    began, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < RATE_S:
        work()
        count += 1
    return count / taken


def measure_cuda() -> dict[str, Any]:
    from torch import multiprocessing

    before = _used()
    torch.zeros(1, device="cuda")
    left = torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    product = left @ left
    torch.cuda.synchronize()
    workspace = torch.cuda.memory_allocated() - held - product.numel() * product.element_size()
    context = _used() - before - torch.cuda.memory_reserved()
    name = torch.cuda.get_device_name(0)
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.cuda.device_count()
        queue: Any = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(_measure_nccl, args=(ranks, os.path.join(folder, "store"), queue), nprocs=ranks)  # type: ignore[attr-defined,no-untyped-call]
        nccl = max(queue.get() for _ in range(ranks))
    return {"device": name, "bytes": {"CUDA context": context, "library workspace": workspace, "NCCL": nccl}, "rates": {}, "slack": None}


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def _measure_nccl(rank: int, ranks: int, store: str, queue: Any) -> None:
    """What a communicator over all GPUs takes of one of them."""
    torch.cuda.set_device(rank)
    payload = torch.zeros(64 << 20, device="cuda")
    torch.cuda.synchronize()
    before = _used() - torch.cuda.memory_reserved()
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    dist.all_reduce(payload)
    torch.cuda.synchronize()
    queue.put(_used() - torch.cuda.memory_reserved() - before)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    print(json.dumps(measure_cuda() if sys.argv[1:] == ["cuda"] else measure_cpu()))


if __name__ == "__main__":
    main()
