"""Every method, optimizer, schedule and precision trains, and what it exports is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, evaluations, fine_tune, losses
from tiny import plan_tiny

from launcher.plan import Plan

PROMPT = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 2]])


def tune_and_answer(me: Any, plan: Plan) -> tuple[list[Any], torch.Tensor]:
    """Job: fine-tune, and the logits of the trained engine's model, taken as it is exported."""
    from launcher.train import worker

    kept: dict[str, torch.Tensor] = {}
    real_export = worker.export_model

    def export_and_keep(engine: Any, *args: Any) -> None:
        engine.eval()
        with torch.no_grad():
            kept["logits"] = engine.module(input_ids=PROMPT, use_cache=False).logits.float()
        real_export(engine, *args)

    worker.export_model = export_and_keep  # type: ignore[assignment]
    try:
        events = fine_tune(me, plan)
    finally:
        worker.export_model = real_export
    return events, kept["logits"]


def tune(ranks: Ranks, tiny: Path, run_dir: Path, **sections: Any) -> tuple[list[Any], torch.Tensor]:
    events, logits = ranks.run(tune_and_answer, plan_tiny(tiny, run_dir, ranks=ranks.size, **sections))[0]
    return events, logits


def load_adapter(tiny: Path, run_dir: Path, base: Any = None) -> torch.Tensor:
    """Logits of the exported adapter, loaded as anyone would."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base or AutoModelForCausalLM.from_pretrained(tiny / "model")
    model = PeftModel.from_pretrained(base, run_dir / "model").eval()
    with torch.no_grad():
        return model(input_ids=PROMPT, use_cache=False).logits.float()


def assert_learned(events: list[Any]) -> None:
    assert evaluations(events, "after")[0] < evaluations(events, "before")[0] - 0.01


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"init": "pissa"}, {"init": "pissa", "rslora": True}, {"dropout": 0.1},
                                     {"target_modules": ["q_proj", "v_proj"]}], ids=str)  # fmt: skip
def test_adapter_loads_with_plain_peft_and_gives_the_same_logits(
    options: dict[str, Any], stage: int, two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    events, logits = tune(
        two_ranks, tiny, tmp_path, method={"kind": "lora", "r": 4, "alpha": 8.0, **options}, parallel={"zero_stage": stage}
    )
    assert_learned(events)
    torch.testing.assert_close(load_adapter(tiny, tmp_path), logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 4, "quant_type": "fp4", "double_quant": False}, {"bits": 8}], ids=str)
def test_quantised_base_trains_and_its_adapter_loads(
    options: dict[str, Any], stage: int, two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    from launcher.train.model import load_base

    method = {"kind": "qlora", "r": 4, **options}
    events, logits = tune(two_ranks, tiny, tmp_path, method=method, parallel={"zero_stage": stage})
    assert_learned(events)
    base = load_base(plan_tiny(tiny, tmp_path, method=method), "cpu")
    torch.testing.assert_close(load_adapter(tiny, tmp_path, base), logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_full_model_loads_with_plain_transformers(stage: int, two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    events, logits = tune(two_ranks, tiny, tmp_path, parallel={"zero_stage": stage})
    assert_learned(events)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(input_ids=PROMPT).logits
    torch.testing.assert_close(loaded, logits, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


@pytest.mark.parametrize("stage", [2, 3])
def test_freeze_trains_only_what_it_names(stage: int, two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    events, _ = tune(
        two_ranks, tiny, tmp_path, method={"kind": "freeze", "last_layers": 1, "patterns": ["*norm*"]}, parallel={"zero_stage": stage}
    )
    assert_learned(events)
    before, after = load_file(tiny / "model/model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".layers.2." in name or "norm" in name}


OPTIMIZERS = {
    "adamw": 3e-3,
    "adamw_8bit": 3e-3,
    "paged_adamw": 3e-3,
    "paged_adamw_8bit": 3e-3,
    "sgd": 0.1,
    "lion": 3e-4,
    "lion_8bit": 3e-4,
    "adafactor": 1e-2,
}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name: str, stage: int, two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    events = two_ranks.run(
        fine_tune, plan_tiny(tiny, tmp_path, optim={"name": name, "lr": OPTIMIZERS[name]}, parallel={"zero_stage": stage})
    )[0]
    assert_learned(events)


@pytest.mark.parametrize("parallel", [{"zero_stage": 2, "offload_optimizer": True}, {"zero_stage": 3, "offload_optimizer": True},
                                      {"zero_stage": 3, "offload_param": True, "offload_optimizer": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "qlora", "r": 4}], ids=["full", "qlora"])
def test_offload_gives_the_same_losses(
    parallel: dict[str, Any], method: dict[str, Any], two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    offloaded = two_ranks.run(fine_tune, plan_tiny(tiny, tmp_path / "a", method=method, parallel=parallel))[0]
    resident = two_ranks.run(fine_tune, plan_tiny(tiny, tmp_path / "b", method=method, parallel={"zero_stage": parallel["zero_stage"]}))[0]
    assert losses(offloaded) == pytest.approx(losses(resident), abs=1e-5)


def test_bf16_stages_agree(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    """Stage 0 too: DeepSpeed's step on empty gradients, taken to allocate states, is undone."""
    found = {}
    for stage in (0, 1, 2, 3):
        plan = plan_tiny(tiny, tmp_path / str(stage), parallel={"zero_stage": stage}, model={"dtype": "bf16"}, schedule={"max_steps": 8})
        found[stage] = losses(two_ranks.run(fine_tune, plan)[0])
    for stage in (0, 1, 3):
        assert found[stage] == pytest.approx(found[2], abs=0.02), stage
    assert found[0][0] == found[2][0]


def test_early_stopping_ends_with_the_best_weights(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    for stage in (2, 3):
        run_dir = tmp_path / str(stage)
        plan = plan_tiny(tiny, run_dir, parallel={"zero_stage": stage}, optim={"lr": 0.05, "max_grad_norm": 0.0},
                         schedule={"max_steps": 40, "epochs": 20.0, "kind": "constant"},
                         evaluate={"every_steps": 2, "early_stopping": {"patience": 2}})  # fmt: skip
        events = two_ranks.run(fine_tune, plan)[0]
        during = evaluations(events, "during")
        stopped = [event for event in events if event["event"] == "early_stop"]
        assert len(stopped) == 1
        assert during[-1] > min(during) and during[-2] > min(during)
        assert stopped[0]["step"] < 40
        assert stopped[0]["best_loss"] == min(during)
        assert evaluations(events, "after")[0] == pytest.approx(min(during), abs=1e-6)


def test_loss_that_is_no_number_ends_the_run(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"NotFinite: the loss is (nan|inf) at step \d+; samples \d+"):
        two_ranks.run(fine_tune, plan_tiny(tiny, tmp_path, optim={"name": "sgd", "lr": 1e20, "max_grad_norm": 0.0}))


def test_samples_are_answered_before_and_after(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    prompts = ["lamp sea cat", "bell fog", "oil"]
    answered = {}
    for stage in (2, 3):
        plan = plan_tiny(tiny, tmp_path / str(stage), parallel={"zero_stage": stage}, evaluate={"samples": prompts, "max_new_tokens": 8})
        events = two_ranks.run(fine_tune, plan)[0]
        shown = {event["when"]: event["answers"] for event in events if event["event"] == "samples"}
        assert [pair["prompt"] for pair in shown["before"]] == prompts
        assert shown["before"] != shown["after"]
        answered[stage] = json.dumps(shown)
    assert answered[2] == answered[3]
