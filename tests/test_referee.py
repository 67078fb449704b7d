"""The plan's arithmetic against a trace of the model itself on the meta device: equal, to the byte.

What is compared is the most that is live in the forward pass with its loss, and in the backward pass. The trace
runs transformers' code, peft's and the launcher's own loss; the plan has never seen torch.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from architectures import config_of

from launcher.plan.decoder import CLOSED_FORMS
from launcher.plan.layout import Attention
from launcher.plan.losses import changes_logits
from launcher.plan.shape import shape_of_config
from launcher.plan.step import run_step
from launcher.plan.workload import Checkpointing, Loss, MethodFacts, Workload
from launcher.recipe import Freeze, Full, Lora, Method, QLora
from launcher.train import profiling
from launcher.train.profiling import trace_layers
from launcher.train.trace import _Kernels

FULL = MethodFacts(trains="all")
LORA = MethodFacts(trains="adapters", r=4)
DROPPED = replace(LORA, dropout=0.1)
ATTENTION = MethodFacts(trains="adapters", r=4, target_modules=("q_proj", "v_proj"))
FREEZE = MethodFacts(trains="some", last_layers=1)
DORA = replace(LORA, dora=True)
DROPPED_DORA = replace(DROPPED, dora=True)
NORMS = MethodFacts(trains="some", patterns=("*norm*", "*ln_*", "*LayerNorm*"))
WORDS = MethodFacts(trains="some", patterns=("*head*", "*embed*", "*wte*", "*decoder*"))
METHODS = {"full": FULL, "lora": LORA, "dropped": DROPPED, "attention": ATTENTION, "freeze": FREEZE, "dora": DORA, "dropped dora": DROPPED_DORA,
           "norms": NORMS, "words": WORDS}  # fmt: skip
"""What the matrices go through. rslora is another scale, pissa other first values (tests/test_states.py), fp4 another code of the same size."""
WITHOUT_SDPA = {"gemma2", "gpt_oss"}
EXPERTS = {"mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"}
LATENT = MethodFacts(trains="adapters", r=4, target_modules=("kv_b_proj", "o_proj"))
OTHER_SIZES = {"vocab_size": 24, "hidden_size": 96, "intermediate_size": 256, "num_key_value_heads": 4}
"""Few words and a wide MLP, so that the peak lies in a layer and not in the loss."""
HAS_QUERIES = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "olmo2",
    "granite",
    "mixtral",
    "qwen3_moe",
    "phi",
}
KINDS = sorted(CLOSED_FORMS - {"ministral"})  # ministral is Mistral's code under another name


def workload(kind: str, layers: int = 2, changes: dict[str, Any] | None = None, **facts: Any) -> Workload:
    config = config_of(kind, num_hidden_layers=layers, **(changes or {})).to_dict()
    base: dict[str, Any] = {
        "method": FULL, "width": 2, "device": "cuda", "attention": "eager" if kind in WITHOUT_SDPA else "sdpa", "loss": "plain", "checkpointing": "on",
        "micro_batch_size": 2, "seq_len": 96, "loss_columns": 95, "packed": False, "kernel_workspace": False,
    }  # fmt: skip
    return Workload(shape=shape_of_config(json.loads(json.dumps(config)), Path("config.json")), **base | facts)


def assert_equal(kind: str, work: Workload, *, layers: int = 2, keep: bool = True, changes: dict[str, Any] | None = None) -> None:
    traced = trace_layers(work, layers, keep_gradients=keep)
    # torch adds meeting gradients in place, but not under the dispatch mode that traces.
    tape = run_step(work, keep_gradients=keep, accumulates_in_place=False, round_to=512)
    peaks = {phase: peak for phase, (peak, _) in tape.peaks.items()}
    found = {
        "forward": max(peaks["forward"], peaks["loss"]),
        "backward": max(peaks.get(name, 0) for name in ("loss backward", "early backward", "backward")),
    }
    assert found == {phase: traced.peaks[phase] for phase in found}, (kind, layers, changes, work)


def trace_evaluation(work: Workload) -> int:
    """The most that is live in a forward pass without gradients, and its loss, of the whole model."""
    layers = max(work.shape.num_layers, work.shape.total_layers - work.shape.num_layers)
    return trace_layers(work, layers, keep_gradients=False, trains=False).peaks["forward"]


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_chunked_loss(kind: str, method: MethodFacts, rows: int) -> None:
    """Up to three chunks of rows; Gemma's head is its embedding."""
    for checkpointing, keep in (("on", False), ("off", True)):
        work = workload(kind, method=method, loss="chunked", checkpointing=checkpointing, micro_batch_size=rows)
        assert_equal(kind, work, keep=keep)


def adapt(kind: str, method: MethodFacts) -> MethodFacts:
    """Adapters where peft can lay them: fused experts cannot be built on the meta device, and Llama 4's router takes none."""
    if method.target_modules != "all-linear" or method.r == 0:
        return method
    if kind.startswith("deepseek"):
        return replace(method, target_modules=LATENT.target_modules)
    return replace(method, target_modules=ATTENTION.target_modules) if kind in EXPERTS or kind == "llama4_text" else method


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("method", [FULL, LORA, FREEZE], ids=["full", "lora", "freeze"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_closed_form(kind: str, method: MethodFacts, checkpointing: Any, attention: Any) -> None:
    if attention == "sdpa" and kind in WITHOUT_SDPA:
        pytest.skip("transformers 5.23 refuses it")
    sizes = OTHER_SIZES if attention == "eager" or checkpointing == "off" else None
    facts = {"method": adapt(kind, method), "checkpointing": checkpointing, "attention": attention}
    assert_equal(kind, workload(kind, changes=sizes, **facts), changes=sizes)


class OnHost(torch.autograd.graph.saved_tensors_hooks):
    """Stands in for torch's save_on_cpu, which would copy values: what is packed leaves the device, and comes back as a new tensor."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda tensor: (tensor.size(), tensor.dtype), lambda told: torch.empty(told[0], dtype=told[1], device="meta"))


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "qwen3_moe", "phi"])
def test_checkpoints_on_the_host(kind: str, method: MethodFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def offloading(model: Any, device: Any) -> None:
        kept = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _Kernels(device))}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kept, offload=True)

    monkeypatch.setattr(profiling, "checkpoint_as_on", offloading)
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", OnHost)
    for sizes in (None, OTHER_SIZES):
        assert_equal(kind, workload(kind, changes=sizes, method=adapt(kind, method), checkpointing="offload"), changes=sizes)


def test_the_matrices_have_every_setting_of_a_recipe() -> None:
    """A method, a loss or a kernel that a recipe learns to name fails here until it has a referee."""
    beside = {"kind", "alpha", "rslora", "init", "quantization", "quant_type"}
    """No number of bytes in a micro-step follows from these."""
    quantised = {"bits", "double_quant"}  # tests/test_quantised.py
    varied = {field for field in MethodFacts.__dataclass_fields__ if len({getattr(method, field) for method in METHODS.values()}) > 1}
    assert set(get_args(get_args(Method)[0])) == {Full, Freeze, Lora, QLora}
    assert {name for section in (Full, Freeze, Lora, QLora) for name in section.model_fields} - beside - quantised <= varied
    assert set(get_args(Loss)) == {"plain", "chunked", "liger"}  # tests/test_liger.py
    assert set(get_args(Attention)) == {"eager", "sdpa", "flash_attention_2"}  # tests/test_flash.py
    assert set(get_args(Checkpointing)) == {"off", "on", "offload"}


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("name", ["dora", "dropped dora", "norms", "words"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_methods(kind: str, name: str, checkpointing: Any) -> None:
    facts = {"method": adapt(kind, METHODS[name]), "checkpointing": checkpointing, "attention": "eager" if kind in WITHOUT_SDPA else "sdpa"}
    assert_equal(kind, workload(kind, changes=OTHER_SIZES, **facts), changes=OTHER_SIZES)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert", "gpt2"])
def test_dora(kind: str, dropout: float, checkpointing: Any) -> None:
    """Its norm is of the base's weight and the adapters' product, which is made of an identity matrix; a bias is taken off first.
    GPT-2's weight lies the other way, and with dropout gets a gradient that nobody asked for."""
    for sizes in (None, OTHER_SIZES):
        method = replace(LORA, dora=True, dropout=dropout)
        assert_equal(kind, workload(kind, changes=sizes, method=method, checkpointing=checkpointing), changes=sizes)


WINDOW = {"sliding_window": 64}
SOME = {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("mistral", WINDOW), ("phi3", WINDOW), ("mixtral", WINDOW), ("gpt_oss", WINDOW), ("gemma3_text", WINDOW), ("qwen2", SOME), ("qwen3", SOME),
     ("qwen2_moe", SOME), ("smollm3", {"use_sliding_window": True, **WINDOW}), ("llama4_text", {"attention_chunk_size": 64, "no_rope_layers": [1, 0]})],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_window_shorter_than_the_row(kind: str, changes: dict[str, Any]) -> None:
    assert_equal(kind, workload(kind, changes=changes, method=adapt(kind, LORA)), changes=changes)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("width", [2, 4])
def test_dropout_on_a_cpu_takes_the_plain_attention(kind: str, width: int) -> None:
    assert_equal(kind, workload(kind, device="cpu", width=width, checkpointing="off", method=DROPPED))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "facts",
    [{"packed": True}, {"attention": "eager"}, {"attention": "eager", "packed": True}, {"device": "cpu", "packed": True, "width": 4},
     {"width": 4, "packed": True}, {"method": DROPPED}, {"method": DROPPED, "checkpointing": "off"}, {"device": "cpu", "width": 4, "method": LORA}],
    ids=str,
)  # fmt: skip
def test_kernels_masks_and_precisions(kind: str, facts: dict[str, Any]) -> None:
    assert_equal(kind, workload(kind, **facts))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("layers", [1, 3, 5])
def test_depth_and_gradients_that_stay_or_go(layers: int, keep: bool) -> None:
    assert_equal("llama", workload("llama", layers), layers=layers, keep=keep)


@pytest.mark.parametrize(("rows", "columns", "kept"), [(1, 31, 30), (1, 256, 3), (3, 65, 64), (4, 128, 1)])
def test_batches(rows: int, columns: int, kept: int) -> None:
    assert_equal("qwen2", workload("qwen2", micro_batch_size=rows, seq_len=columns, loss_columns=kept))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"tie_word_embeddings": True}), ("llama", {"num_key_value_heads": 4}),
     ("llama", {"num_key_value_heads": 1}), ("qwen3_moe", {"norm_topk_prob": True}), ("qwen3_moe", {"mlp_only_layers": [0]}),
     ("phi3", {"partial_rotary_factor": 0.5}), ("phi", {"qk_layernorm": True, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
     ("gpt_neox", {"use_parallel_residual": False, "hidden_dropout": 0.1}), ("bert", {"is_decoder": True}), ("gpt2", {"activation_function": "relu"}),
     ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False}), ("deepseek_v2", {"topk_method": "greedy"}),
     ("llama4_text", {"interleave_moe_layer_step": 2}), ("qwen2_moe", {"norm_topk_prob": True}),
     ("gemma2", {"final_logit_softcapping": None}), ("qwen3", {"head_dim": 32}), ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_what_a_configuration_turns_on(kind: str, changes: dict[str, Any], checkpointing: Any) -> None:
    assert_equal(kind, workload(kind, changes=changes, checkpointing=checkpointing), changes=changes)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_loss_of_every_kind(kind: str) -> None:
    """Method × checkpointing × chunks × device, where the head can give the loss (the plan refuses it elsewhere)."""
    if changes_logits(workload(kind).shape.config):
        pytest.skip("its logits are changed after the head")
    for method, checkpointing, rows, device in product((FULL, LORA, FREEZE), ("on", "off"), (1, 3), ("cuda", "cpu")):
        facts = {"method": adapt(kind, method), "checkpointing": checkpointing, "micro_batch_size": rows, "device": device}
        assert_equal(kind, workload(kind, loss="chunked", **facts))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination(kind: str) -> None:
    """Architecture × method × checkpointing × attention × packing × precision × device × gradients."""
    compared = 0
    for method, width, checkpointing, packed, attention, device, keep, sizes in product(
        METHODS.values(), (2, 4), ("on", "off"), (False, True), ("sdpa", "eager"), ("cuda", "cpu"), (True, False),
        (None, OTHER_SIZES),
    ):  # fmt: skip
        grouped_fp32 = attention == "sdpa" and not packed and width == 4 and device == "cuda"  # torch falls back to its plain kernel
        no_such = (attention == "sdpa" and kind in WITHOUT_SDPA) or (kind in EXPERTS and width == 4)
        if grouped_fp32 or no_such or (method is ATTENTION and kind not in HAS_QUERIES):
            continue
        facts = {"method": adapt(kind, method), "width": width, "checkpointing": checkpointing, "packed": packed, "attention": attention,
                 "device": device}  # fmt: skip
        assert_equal(kind, workload(kind, changes=sizes, **facts), keep=keep, changes=sizes)
        compared += 1
    assert compared >= 64
