"""What ZeRO-3 holds gathered: DeepSpeed's order replayed, against real engines on two ranks over gloo."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measure import profile_training
from ranks import Ranks
from tiny import plan_tiny, write_conversations, write_model

from launcher.plan import Plan
from launcher.plan.coordinator import Rules, Shard, Visit, visit_modules
from launcher.plan.memory import predict_memory


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4.5 million parameters, a quarter of them in the head and as many in the embedding."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=4096)
    write_conversations(folder / "train.jsonl", 50)
    return folder


def most_told(plan: Plan) -> int:
    return max(
        phase.allocated_bytes for phase in plan.memory.phases if phase.name in ("forward", "loss", "backward", "reduce", "optimizer step")
    )


@pytest.mark.parametrize(
    ("method", "packing", "checkpointing"),
    [({"kind": "qlora"}, True, True), ({"kind": "qlora"}, False, True), ({"kind": "lora"}, False, False), ({"kind": "full"}, False, True),
     ({"kind": "qlora", "bits": 8}, True, True)],
    ids=str,
)  # fmt: skip
def test_the_peak_of_live_tensors(
    method: dict[str, Any], packing: bool, checkpointing: bool, wide: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    """Within 3 %, of a model most of whose bytes are gathered: buckets of a prefetch, gloo's copies of them, the head at the turn."""
    sections: dict[str, Any] = {"method": method, "parallel": {"zero_stage": 3}, "memory": {"gradient_checkpointing": checkpointing},
                                "model": {"name_or_path": str(wide / "model"), "dtype": "bf16"}, "data": {"packing": packing, "eval": []},
                                "batch": {"global_batch_size": 2, "micro_batch_size": 1}}  # fmt: skip
    plan = plan_tiny(wide, tmp_path / "run", **sections)
    memory = predict_memory(plan.recipe, plan.shape, plan.layout, plan.batch, plan.cluster, deepspeed=plan.deepspeed)
    measured = max(two_ranks.run(profile_training, plan))
    assert most_told(replace(plan, memory=memory)) == pytest.approx(measured, rel=0.03)


def test_a_gathered_4_bit_weight_is_not_held_by_the_graph() -> None:
    """bitsandbytes' own parameter leaves a view of its bytes on the product's context: what ZeRO-3 releases would stay until the loss goes."""
    import torch
    from bitsandbytes.nn import Params4bit

    from launcher.train.int4 import SharedParams4bit
    from launcher.train.shard import quantise_linear

    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(128, 192, bias=False), torch.randn(4, 128, requires_grad=True)
    quantization = type("Wanted", (), {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_use_double_quant": True,
                                       "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32})()  # fmt: skip
    layer = quantise_linear(linear, quantization, "cpu")
    assert type(layer.weight) is SharedParams4bit

    def released(kind: type) -> tuple[bool, torch.Tensor]:
        layer.weight.__class__ = kind
        whole = layer.weight.data.clone()
        layer.weight.data = whole.clone()
        out = layer(rows)
        held = weakref.ref(layer.weight.data.untyped_storage())
        layer.weight.data = torch.empty(0)
        gc.collect()
        gone = held() is None
        layer.weight.data = whole
        (gradient,) = torch.autograd.grad(out.sum(), rows)
        return gone, gradient

    (gone, gradient), (plain_gone, expected) = released(SharedParams4bit), released(Params4bit)
    assert gone and not plain_gone, "if bitsandbytes' own is let go of too, int4.py is needed no more"
    assert torch.equal(gradient, expected)


RULES = Rules(is_cut=True, prefetch=150, max_reuse=10**9, copies_again=False, releases_all=False, pins_head=False)
SHARDS = [Shard(100, 200), Shard(50, 100), Shard(50, 100), Shard(50, 100), Shard(50, 100), Shard(100, 200)]
MEMBERS: dict[Any, list[int]] = {"root": [], "embedding": [0], 0: [1, 2], 1: [3, 4], "head": [5]}


def visit(rules: Rules) -> list[Visit]:
    order: list[Any] = [("forward", m) for m in ("root", "embedding", 0, 1, "head")] + [("backward", m) for m in ("root", "head", 1, 0)]
    return visit_modules(order, SHARDS, MEMBERS, rules)


def test_what_is_sent_for_comes_in_one_buffer_and_is_copied_out_of_it() -> None:
    root, embedding, first, *_ = visit(RULES)
    assert [size for size, _ in root.entering] == [300], "the embedding and a half of the first layer: 150 elements"
    assert [size for size, _ in embedding.entering] == [200, 100, 300], "both are copied when one is waited for; three more are sent for"
    assert [size for size, _ in first.entering] == [-300, 100, 100, 100, 200], (
        "the last of the first buffer was waited for, then the second is copied"
    )


def test_nothing_is_whole_after_the_pass_and_nothing_goes_twice() -> None:
    for rules in (RULES, replace(RULES, releases_all=True), replace(RULES, copies_again=True), replace(RULES, pins_head=True, releases_all=True),
                  replace(RULES, is_cut=False), replace(RULES, prefetch=0), replace(RULES, max_reuse=0)):  # fmt: skip
        live: dict[int, int] = {}
        for each in visit(rules):
            for size, key in each.entering + each.leaving:
                if size > 0:
                    assert key not in live
                    live[key] = size
                else:
                    assert live.pop(key) == -size
        assert not live, rules


def test_forward_passes_alone_make_deepspeed_release_what_the_backward_pass_needs() -> None:
    def live_at_the_turn(rules: Rules) -> int:
        return sum(size for each in visit(rules)[:5] for size, _ in each.entering + each.leaving)

    assert live_at_the_turn(RULES) == 600, "both layers and the head"
    assert live_at_the_turn(replace(RULES, releases_all=True)) == 0
    assert live_at_the_turn(replace(RULES, releases_all=True, pins_head=True)) == 200, "torch's linear keeps the head's weight"
