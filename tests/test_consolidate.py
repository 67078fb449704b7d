"""lepton-launch checkpoints RUN consolidate: a checkpoint of a run as a plain folder that transformers and PEFT load, without us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, evaluations, fine_tune
from safetensors.torch import load_file
from test_checkpoint_verbs import answer
from test_cli import invoke
from test_resume import plan_case

from launcher.plan import Plan
from launcher.run import Event

CASES = [("full", "3", "bf16"), ("full", "2", "fp32"), ("lora", "2", "bf16"), ("qlora4", "2", "bf16"), ("qlora8", "0", "fp32")]


def train(ranks: Ranks, plan: Plan) -> tuple[Path, list[Event]]:
    run_dir = Path(plan.run_dir)
    (run_dir / "plan.json").write_text(json.dumps(plan.to_dict()))
    return run_dir, ranks.run(fine_tune, plan)[0]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def load_plainly(folder: Path, tiny: Path, method: str) -> dict[str, torch.Tensor]:
    """The state that transformers or PEFT has after loading a folder, as anyone would."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    if method == "full":
        state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
        return state
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    adapter: dict[str, torch.Tensor] = get_peft_model_state_dict(PeftModel.from_pretrained(base, folder))
    return adapter


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("method", "stage", "dtype"), CASES)
def test_the_last_checkpoint_is_the_exported_model(
    method: str, stage: str, dtype: str, two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    run, _ = train(two_ranks, plan_case(tiny, tmp_path / "run", 2, method=method, stage=stage, dtype=dtype))
    written = answer(run, "consolidate")
    assert written == {"step": 6, "model": str(run / "step-6")}
    assert_equal(read_weights(run / "step-6"), read_weights(run / "model"))
    assert {path.name for path in (run / "step-6").iterdir()} >= {path.name for path in (run / "model").iterdir()} - {"README.md"}
    assert_equal(load_plainly(run / "step-6", tiny, method), load_plainly(run / "model", tiny, method))
    # An earlier one has other weights: those that its shards hold.
    assert answer(run, "consolidate", "--step", 3, "--output", tmp_path / "third")["step"] == 3
    third, last = read_weights(tmp_path / "third"), read_weights(run / "model")
    assert third.keys() == last.keys() and any(not torch.equal(third[name], last[name]) for name in third)
    assert_equal({name: tensor.cpu() for name, tensor in third.items()}, whole_masters(run / "checkpoints/step-000003", third))


def whole_masters(checkpoint: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masters put together from the shards with nothing but safetensors and the manifests, in the names, shapes and dtypes of `like`."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted(checkpoint.glob("rank-*.json")):
        manifest = json.loads(path.read_text())
        held = load_file(checkpoint / manifest["file"])
        for fragment in manifest["fragments"]:
            if fragment["kind"] == "master":
                name = fragment["name"].replace(".default.", ".")
                parts.setdefault(name, []).append((fragment["start"], held[f"master/{fragment['name']}"]))
    whole = {name: torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])]) for name, found in parts.items()}
    return {name: whole[name].view(tensor.shape).to(tensor.dtype) for name, tensor in like.items()}


def test_the_best_weights_of_a_checkpoint(one_rank: Ranks, tiny: Path, tmp_path: Path) -> None:
    case: dict[str, Any] = {
        "data": {"train": str(tiny / "train.jsonl")},
        "optim": {"name": "adamw", "lr": 0.15, "max_grad_norm": 0.0},
        "schedule": {"max_steps": 8, "epochs": 60.0, "kind": "constant"},
        "evaluate": {"every_steps": 2, "early_stopping": {"patience": 50}},
        "save": {"every_steps": 8},
    }
    run, events = train(one_rank, plan_case(tiny, tmp_path / "run", 1, **case))
    during = evaluations(events, "during")
    assert min(during) != during[-1], "the last is the best: nothing to tell apart"
    answer(run, "consolidate", "--best", "--output", tmp_path / "best")
    answer(run, "consolidate", "--output", tmp_path / "last")
    assert_equal(read_weights(tmp_path / "best"), read_weights(run / "model"))  # a run that may stop early ends with its best
    assert not torch.equal(*(next(iter(read_weights(tmp_path / name).values())) for name in ("best", "last")))
    again = invoke("checkpoints", run, "consolidate", "--output", tmp_path / "best")
    assert again.exit_code == 9 and "is there already" in again.output and "--output" in again.output


def test_another_base_model_is_refused(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny / "model", tmp_path / "model")
    run, _ = train(two_ranks, plan_case(tiny, tmp_path / "run", 2, method="lora", model={"name_or_path": str(tmp_path / "model")}))
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    refused = invoke("checkpoints", run, "consolidate")
    assert refused.exit_code == 9 and "model.weights" in refused.output and "bring them back" in refused.output
    assert not (run / "step-6").exists()
