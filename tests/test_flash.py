"""Flash attention 2 in the plan, against a trace of transformers' own code around a stand-in for its kernel.

flash-attn needs a GPU, so that its kernel cannot run here. The stand-in keeps what flash_attn 2.8's FlashAttnFunc keeps for its backward
(flash_attn_interface.py: q, k, v, the output, a log-sum-exp a head and query in fp32, the state of the random generator) and makes
there what that makes: dq, dk and dv. What the kernel takes for itself meanwhile (the plan's workspace) no trace sees.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from test_referee import FREEZE, FULL, LORA, OTHER_SIZES, adapt, workload

from launcher.plan.step import run_step
from launcher.train import profiling

KINDS = ("llama", "qwen3", "gemma2", "phi", "gpt2", "gpt_neox", "mixtral", "bert")


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, queries, heads, _ = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sums = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, sums, torch.empty(2, dtype=torch.int64, device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def trace(work: Any, layers: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The peaks of a micro-step of transformers' model under flash attention 2: one row, as the launcher's batches are."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        return Kernel.apply(q, k, v)  # type: ignore[no-any-return]

    def build(shape: Any, depth: int, attention: str) -> Any:
        model = real(shape, depth, "eager")
        model.config._attn_implementation = "flash_attention_2"
        return model

    real = profiling._build
    monkeypatch.setattr(profiling, "_build", build)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *a, **k: ((kernel, kernel, None, None, None), (dict, dict)))
    monkeypatch.setattr(flash, "_is_packed_sequence", lambda *args: False)  # it reads values, which meta tensors have not
    return profiling.trace_layers(work, layers, keep_gradients=True).peaks


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("method", [FULL, LORA, FREEZE], ids=["full", "lora", "freeze"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_what_the_kernel_keeps(kind: str, method: Any, checkpointing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload(kind, changes=OTHER_SIZES, method=adapt(kind, method), checkpointing=checkpointing, attention="flash_attention_2",
                    micro_batch_size=1, seq_len=192, loss_columns=191)  # fmt: skip
    traced = trace(work, 2, monkeypatch)
    peaks = {phase: peak for phase, (peak, _) in run_step(work, keep_gradients=True, accumulates_in_place=False).peaks.items()}
    assert max(peaks["forward"], peaks["loss"]) == traced["forward"]
    assert max(peaks.get(name, 0) for name in ("loss backward", "early backward", "backward")) == traced["backward"]


def test_packed_rows_need_no_mask() -> None:
    work = workload(
        "llama", attention="flash_attention_2", micro_batch_size=1, seq_len=2048, loss_columns=1, checkpointing="off", packed=True
    )
    assert run_step(work, keep_gradients=True).peaks["backward"][0] < 4 * 2048 * 2048, "SDPA's bool masks and biases take more"
    assert run_step(replace(work, attention="sdpa"), keep_gradients=True).peaks["backward"][0] > 4 * 2048 * 2048
