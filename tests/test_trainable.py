"""What the plan says of models that a run cannot train, or trains otherwise than one may think; and models that are traced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from architectures import DECODERS, config_of
from plans import NEW_CPU
from typer.testing import CliRunner

from launcher.cli import app
from launcher.cli.planning import MetaTracer
from launcher.cluster import Cluster
from launcher.errors import ModelError, RecipeError
from launcher.plan.decoder import CLOSED_FORMS
from launcher.plan.inventory_others import PAIRS
from launcher.plan.plan import Plan, make_plan
from launcher.plan.shape import ModelShape, shape_of_config
from launcher.plan.trainable import OTHERS, REFUSED, find_obstacle
from launcher.recipe import Recipe
from launcher.units import GIB

ROOT = Path(__file__).parent.parent
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 160,
         "max_position_embeddings": 4096, "pad_token_id": 0}  # fmt: skip


def write_config(folder: Path, kind: str, **facts: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **SIZES, **facts}))
    (folder / "model.safetensors").touch()
    return str(folder)


def recipe_of(name: str, **sections: Any) -> Recipe:
    base: dict[str, Any] = {"name": "p", "model": {"name_or_path": name}, "data": {"train": "t.jsonl", "seq_len": 64},
                            "batch": {"global_batch_size": 2, "micro_batch_size": 2}}  # fmt: skip
    return Recipe.model_validate_json(json.dumps(base | sections))


def plan_of(name: str, *, tracer: MetaTracer | None = None, trace: bool = False, **sections: Any) -> Plan:
    cluster = Cluster(
        accelerator="cuda", device_name="NVIDIA H100", cpus_per_node=32, device_memory=80 * GIB, host_memory=512 * GIB, bf16=True
    )
    return make_plan(recipe_of(name, **sections), cluster, base_dir=".", run_dir="/runs/p", tracer=tracer, trace=trace)


def notes_of(plan: Plan) -> str:
    return "\n".join((*plan.notes, *plan.memory.notes))


@pytest.mark.parametrize(
    ("model", "expected"),
    [("openai/whisper-tiny", "a model of speech"),
     ("google/vit-base-patch16-224", "a model of images"), ("openai/clip-vit-base-patch32", "a model of images and texts"),
     ("Qwen/Qwen2-VL-2B-Instruct", "a model of images and texts"), ("sentence-transformers/all-MiniLM-L6-v2", "no head for words")],
)  # fmt: skip
def test_a_model_that_cannot_be_trained_here_is_planned_and_said_so(model: str, expected: str) -> None:
    plan = plan_of(model)
    assert expected in notes_of(plan) and "a run would not start" in notes_of(plan)


def test_a_run_of_such_a_model_is_refused_before_it_starts() -> None:
    from launcher.cli.planning import check_fits

    with pytest.raises(ModelError, match="the run cannot start: a whisper is a model of speech"):
        check_fits(plan_of("openai/whisper-tiny"), sys.stderr)


def test_what_a_user_may_not_expect_is_said() -> None:
    assert "sees the words it is to predict" in notes_of(plan_of("google-bert/bert-base-uncased"))
    gpt_oss = notes_of(plan_of("openai/gpt-oss-20b", method={"kind": "lora", "target_modules": ["q_proj"]}))
    assert (
        "packing: off, because transformers 5.23 gives a gpt_oss no positions" in gpt_oss
        and "the files are mxfp4; counted in bf16" in gpt_oss
    )
    assert "no positions" not in notes_of(plan_of("openai/gpt-oss-20b", data={"train": "t.jsonl", "seq_len": 64, "packing": False}))
    assert plan_of("HuggingFaceTB/SmolLM2-135M").recipe.data.packing is True
    assert "quantised already (mxfp4)" in notes_of(plan_of("openai/gpt-oss-20b", method={"kind": "qlora"}))
    assert "Llama 4's router" in notes_of(plan_of("meta-llama/Llama-4-Scout-17B-16E-Instruct", method={"kind": "lora"}))


@pytest.mark.parametrize(
    ("model", "remedy"), [("openai/gpt-oss-20b", "false$"), ("google-bert/bert-base-uncased", "or use flash_attention_2$")]
)
def test_packs_that_would_leak_are_refused(model: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.packing"):
        plan_of(model, data={"train": "t.jsonl", "seq_len": 64, "packing": True})


def test_peft_cannot_wrap_the_router_of_llama_4() -> None:
    """Fails where it can: then the plan need not say so."""
    import torch
    from architectures import build_decoder, config_of
    from peft import LoraConfig, get_peft_model

    from launcher.train.trace import Trace, watching

    with torch.device("meta"):
        model = get_peft_model(build_decoder(config_of("llama4_text")), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    with pytest.raises(AttributeError, match="tuple"), watching(Trace(), device="cuda"):
        model(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta"), use_cache=False)


@pytest.mark.parametrize("kind", sorted(CLOSED_FORMS | PAIRS))
def test_the_attention_that_transformers_refuses(kind: str) -> None:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    names = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if kind in PAIRS else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name = names[kind]
    made = getattr(transformers, name if isinstance(name, str) else name[0])
    refused = {
        name for name, supported in (("sdpa", made._supports_sdpa), ("flash_attention_2", made._supports_flash_attn)) if not supported
    }
    if made._compatible_flash_implementations is not None:  # kernels of its own, from the hub
        refused.add("flash_attention_2")
    assert refused == REFUSED.get(kind, set())


def test_auto_takes_no_attention_that_is_refused() -> None:
    plan = plan_of("google/gemma-2-2b")
    assert plan.layout.attn_implementation == "eager" and "refuses sdpa for a gemma2" in notes_of(plan)
    with pytest.raises(RecipeError, match="refuses sdpa for a gemma2"):
        plan_of("", model={"name_or_path": "google/gemma-2-2b", "attn_implementation": "sdpa"})


# ------------------------------------------------------------------------------------------------- tracing


def test_an_unknown_architecture_is_built_and_traced(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, OlmoConfig

    model = write_config(tmp_path / "olmo", "olmo", num_key_value_heads=2)
    plan = plan_of(model, tracer=MetaTracer())
    assert "traced on the meta device, because olmo has no exact arithmetic here" in notes_of(plan)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(OlmoConfig(**SIZES, num_key_value_heads=2))
    assert plan.num_params == sum(p.numel() for p in built.parameters()) == plan.trainable_params
    assert plan_of(model, tracer=MetaTracer(), method={"kind": "lora", "r": 4}).trainable_params == 6 * 4 * (2 * 128 + 2 * 96 + 3 * 160)
    guessed = plan_of(model)
    assert "counted as those of a Llama" in notes_of(guessed)
    assert guessed.memory.device("allocated").p50 == pytest.approx(plan.memory.device("allocated").p50, rel=0.25), (
        "a Llama of the same sizes is near"
    )


def test_an_architecture_that_nothing_can_build_is_a_guess_and_says_so(tmp_path: Path) -> None:
    plan = plan_of(write_config(tmp_path / "wombat", "wombat"), tracer=MetaTracer())
    assert "weights and activations: counted as those of a Llama of the same sizes, ±20%, because wombat" in notes_of(plan)
    assert "no model type 'wombat'" in notes_of(plan)
    held = [part for phase in plan.memory.phases for part in phase.components if part.counts_in == "allocated"]
    assert all(part.provenance == "assumed" and part.error >= 0.2 for part in held)


@pytest.mark.parametrize("model", ["openai/whisper-tiny", "Qwen/Qwen2.5-VL-3B-Instruct"])
def test_what_is_no_decoder_is_half_as_sure_without_torch(model: str) -> None:
    plan = plan_of(model)
    assert "activations: counted as those of a Llama of the same sizes, ±50%" in notes_of(plan)
    assert "with torch, transformers and peft installed it is traced" in notes_of(plan)


def test_dora_trains_a_magnitude_for_each_output(tmp_path: Path) -> None:
    model = write_config(tmp_path, "llama")
    lora, dora = (plan_of(model, method={"kind": "lora", "r": 4, "dora": dora}).trainable_params for dora in (False, True))
    assert dora - lora == 6 * (4 * 64 + 2 * 96 + 64)


def test_an_architecture_that_transformers_does_not_have(tmp_path: Path) -> None:
    plan = plan_of(write_config(tmp_path, "nonesuch"), tracer=MetaTracer())
    assert "not traced: this transformers has no model type 'nonesuch'" in notes_of(plan)
    with pytest.raises(ModelError, match="nonesuch cannot be traced on the meta device"):
        plan_of(write_config(tmp_path, "nonesuch"), tracer=MetaTracer(asked=True), trace=True)


@pytest.mark.parametrize(
    ("kind", "facts"),
    [("llama", {}), ("deepseek_v3", {"first_k_dense_replace": 3, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 2,
      "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "num_key_value_heads": 4, "num_hidden_layers": 9, "n_shared_experts": 1}),
     ("gemma3_text", {"num_hidden_layers": 18, "sliding_window": 16, "head_dim": 16})],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_two_depths_tell_what_the_whole_model_needs(kind: str, facts: dict[str, Any]) -> None:
    """Also where the first layers are others, and where layers come in a pattern."""
    from dataclasses import replace

    from launcher.plan.memory import make_workload
    from launcher.plan.profile import profile_step
    from launcher.train.profiling import find_depths, profile

    shape = shape_of_config({"model_type": kind, **SIZES, **facts}, Path("config.json"))
    few, more = find_depths(shape)
    assert few < more <= shape.num_layers
    plan = plan_of("HuggingFaceTB/SmolLM2-135M")
    work = replace(make_workload(plan.recipe, shape, plan.layout, plan.batch), kernel_workspace=False)
    traced, told = profile(work, keep_gradients=True), profile_step(work, keep_gradients=True)
    assert not isinstance(traced, str), traced
    assert sum(traced.backward.values()) == pytest.approx(max(sum(told.backward.values()), sum(told.loss.values())), rel=0.01)


@pytest.mark.parametrize("kind", sorted(OTHERS.keys() - {"qwen2_vl_text", "qwen2_5_vl_text"}))
def test_what_cannot_be_trained_is_traced_all_the_same(kind: str) -> None:
    from launcher.plan.known import load_known

    smallest = min((m for m in load_known().values() if m.config["model_type"] == kind), key=lambda m: m.params)
    hub_id = next(name for name, model in load_known().items() if model.name == smallest.name)
    assert "traced on the meta device" in notes_of(plan_of(hub_id, tracer=MetaTracer()))


def test_trace_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "r.yaml").write_text(
        f"name: p\nmodel: {{name_or_path: {write_config(tmp_path / 'model', 'llama')}}}\ndata: {{train: t.jsonl, seq_len: 64}}\n"
        "batch: {global_batch_size: 2, micro_batch_size: 1}\n"
    )
    command = [str(tmp_path / "r.yaml"), "--gpu", "h100-80gb", "--json", "--workers", "1"]
    runs = [CliRunner().invoke(app, [*command, flag]) for flag in ("--dry-run", "--trace")]
    assert [run.exit_code for run in runs] == [0, 0], runs[1].output
    told, traced = (json.loads(run.stdout) for run in runs)
    assert any("traced on the meta device" in note for note in traced["notes"]) and not any("traced" in note for note in told["notes"])
    assert traced["device"]["allocated_bytes"]["p50"] == pytest.approx(told["device"]["allocated_bytes"]["p50"], rel=0.01)


BLOCKED = """import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Blocked())
from launcher.cli import main
main()
"""


def test_without_torch_an_unknown_architecture_is_an_error_and_a_known_one_a_note(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "one two three"}\n')

    def run(model: str, *more: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "r.yaml").write_text(
            f"name: p\nmodel: {{name_or_path: {model}}}\ndata: {{train: t.jsonl, seq_len: 64}}\nbatch: {{global_batch_size: 1}}\n"
        )
        command = [sys.executable, "-c", BLOCKED, str(tmp_path / "r.yaml"), "--gpu", "h100-80gb", "--dry-run", *more]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)

    unknown = run(write_config(tmp_path / "olmo", "olmo"))
    assert (
        unknown.returncode == ModelError.exit_code
        and "olmo can be planned by a trace on torch's meta device only, and torch is not installed" in unknown.stderr
    )
    told = run("google-t5/t5-small")
    assert told.returncode == 0 and "traced" not in told.stdout, told.stderr
    known = run("openai/whisper-tiny")
    assert known.returncode == 0 and "not traced: torch is not installed" in known.stdout, known.stderr
    asked = run(write_config(tmp_path / "llama", "llama"), "--trace")
    assert asked.returncode == ModelError.exit_code and "torch is not installed" in asked.stderr


def test_an_obstacle_is_found_in_a_shape_alone() -> None:
    def shape(kind: str, **facts: Any) -> ModelShape:
        return shape_of_config({"model_type": kind, **SIZES, **facts}, Path("config.json"))

    recipe = recipe_of("x", method={"kind": "qlora"})
    assert find_obstacle(shape("llama"), recipe) is None
    assert find_obstacle(shape("llama", quantization_config={"quant_method": "gptq"}), recipe) is not None
    assert find_obstacle(shape("llama", quantization_config={"quant_method": "bitsandbytes"}), recipe) is None
    assert find_obstacle(shape("bert", architectures=["BertForMaskedLM"]), recipe) is None


@pytest.mark.parametrize("kind", ["deepseek_v3", "mixtral"])
@pytest.mark.parametrize("wanted", [{"dropout": 0.1}, {"dora": True}])
def test_what_peft_cannot_lay_on_fused_experts_is_told_before_the_run(kind: str, wanted: dict[str, Any]) -> None:
    shape = shape_of_config(config_of(kind).to_dict(), Path("config.json"))
    obstacle = find_obstacle(shape, recipe_of("x", method={"kind": "lora", **wanted}))
    assert obstacle is not None and f"method.{next(iter(wanted))}" in obstacle
    attention = {"target_modules": ["q_proj" if kind != "deepseek_v3" else "q_b_proj", "o_proj"]}
    assert find_obstacle(shape, recipe_of("x", method={"kind": "lora", **wanted, **attention})) is None
    assert find_obstacle(shape, recipe_of("x", method={"kind": "lora"})) is None


@pytest.mark.parametrize("kind", DECODERS)
def test_every_architecture_is_planned_for_a_cpu(kind: str, tmp_path: Path) -> None:
    """Its compiled products too: phi's head has a bias, which is none of them."""
    (tmp_path / "config.json").write_text(json.dumps(config_of(kind).to_dict(), default=str))
    (tmp_path / "model.safetensors").touch()
    model = {"name_or_path": str(tmp_path), "dtype": "bf16"}
    plan = make_plan(
        recipe_of(str(tmp_path), model=model, method={"kind": "lora"}, batch={"global_batch_size": 2, "micro_batch_size": 1}),
        NEW_CPU,
        base_dir=str(tmp_path),
        run_dir=str(tmp_path),
    )
    (workspace,) = [c for p in plan.memory.phases if p.name == "backward" for c in p.components if c.name == "library workspace"]
    assert workspace.bytes > 48 * (512 << 10)
