"""Quantised linear layers, with LoRA and DoRA: the plan's arithmetic against real bitsandbytes and peft on the CPU, storage by storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.plan.shape import shape_of_config
from launcher.plan.step import run_step
from launcher.plan.workload import MethodFacts, Workload
from launcher.train.trace import Trace, watching

ROWS, COLUMNS = 2, 96
DTYPES = {2: torch.bfloat16, 4: torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160,
             "max_position_embeddings": 256, "pad_token_id": 0}  # fmt: skip
    path: Path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
    return path


def build(folder: Path, method: MethodFacts, width: int, checkpointing: str) -> Any:
    """The base model, and it with its adapters, as launcher.train.model and methods make them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = DTYPES[width]
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": method.double_quant, "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": dtype}  # fmt: skip
    config = BitsAndBytesConfig(**(four if method.bits == 4 else {"load_in_8bit": True}))
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}, attn_implementation="sdpa"
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=method.r, lora_dropout=method.dropout, target_modules="all-linear", use_dora=method.dora)
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpointing == "on":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base, model.train()


def measure(base: Any, model: Any) -> dict[str, int]:
    """Peaks of live tensors in a second step; what the first one made once (states of 8-bit layers) is no part of them."""
    import bitsandbytes as bnb

    from launcher.train.loss import sum_token_loss

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 160, (ROWS, COLUMNS))
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(COLUMNS).expand(ROWS, COLUMNS).contiguous()}

    sum_token_loss(model, batch()).backward()
    for parameter in model.parameters():
        parameter.grad = None
    trace, given = Trace(), batch()
    with watching(trace, device="cpu", round_to=64, kernels=False) as watch:
        watch.ignore([*model.parameters(), *base.buffers(), *given.values()])
        watch.ignore(module.state.SCB for module in base.modules() if isinstance(module, bnb.nn.Linear8bitLt))
        loss = sum_token_loss(model, given)
        watch.phase = "backward"
        loss.backward()
    return trace.peaks


def tell(base: Any, method: MethodFacts, width: int, checkpointing: Any) -> dict[str, int]:
    shape = shape_of_config(json.loads(base.config.to_json_string()), Path("config.json"))
    work = Workload(shape=shape, method=method, width=width, device="cpu", attention="sdpa", loss="plain", checkpointing=checkpointing, micro_batch_size=ROWS,
                    seq_len=COLUMNS, loss_columns=COLUMNS - 1, packed=False, kernel_workspace=False)  # fmt: skip
    peaks = {phase: peak for phase, (peak, _) in run_step(work, keep_gradients=True, accumulates_in_place=False, round_to=64).peaks.items()}
    return {
        "forward": max(peaks["forward"], peaks["loss"]),
        "backward": max(peaks.get(name, 0) for name in ("loss backward", "early backward", "backward")),
    }


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("width", [2, 4], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "facts",
    [{}, {"double_quant": False}, {"dropout": 0.1}, {"dora": True}, {"dora": True, "dropout": 0.1}],
    ids=lambda f: " ".join(f) or "plain",
)
def test_four_bits_hold_what_the_plan_says(folder: Path, facts: dict[str, Any], width: int, checkpointing: str) -> None:
    method = MethodFacts(trains="adapters", bits=4, r=4, **facts)
    base, model = build(folder, method, width, checkpointing)
    assert measure(base, model) == tell(base, method, width, checkpointing)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_eight_bits_hold_their_inputs_whatever_checkpointing_does(folder: Path, dropout: float, checkpointing: str) -> None:
    method = MethodFacts(trains="adapters", bits=8, r=4, dropout=dropout)
    base, model = build(folder, method, 2, checkpointing)
    assert measure(base, model) == tell(base, method, 2, checkpointing)


def test_dora_on_eight_bits_does_not_run(folder: Path) -> None:
    """Fails where it does: then the plan need not refuse it (launcher.plan.trainable)."""
    base, model = build(folder, MethodFacts(trains="adapters", bits=8, r=4, dora=True), 2, "off")
    with pytest.raises(AttributeError, match="unsqueeze"):
        measure(base, model)
