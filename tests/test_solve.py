"""What the plan chooses where a recipe says auto, and what it advises where nothing fits."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import Cluster
from launcher.errors import RecipeError
from launcher.plan import Plan, make_plan
from launcher.plan.advise import suggest_nodes
from launcher.plan.budget import VERDICTS
from launcher.plan.devices import find_device, make_cluster
from launcher.plan.dry_run import estimate_plan, make_document, make_dry_run
from launcher.plan.memory import count_trainable
from launcher.plan.plan import make_choice, make_predictor, make_suggestions
from launcher.plan.solve import Candidate, apply_changes, make_candidates
from launcher.plan.sweep import is_axis, make_sweep, read_axis
from launcher.recipe import Lora, QLora, Recipe
from launcher.recipe_file import load_recipe
from launcher.units import GIB
from launcher.view_plan import format_changes

LLAMA_8B, LLAMA_1B = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
ALL_AUTO: dict[str, Any] = {
    "method": {"kind": "lora", "quantization": "auto"},
    "parallel": {"zero_stage": "auto", "offload": "auto"},
    "memory": {"gradient_checkpointing": "auto"},
    "batch": {"global_batch_size": 64},
}


def recipe_of(name: str = LLAMA_8B, **sections: Any) -> Recipe:
    base: dict[str, Any] = {"name": "p", "model": {"name_or_path": name}, "data": {"train": "hub://x/y", "seq_len": 2048}}
    return Recipe.model_validate_json(json.dumps(base | sections))


def on(gpu: str, nodes: int = 1, each: int = 1) -> Cluster:
    return make_cluster(find_device(gpu), nodes=nodes, gpus_per_node=each)


def plan_of(recipe: Recipe, cluster: Cluster) -> Plan:
    return make_plan(recipe, cluster, base_dir="/r", run_dir="/runs/p")


def settings(plan: Plan) -> dict[str, Any]:
    layout = plan.layout
    bits = plan.recipe.method.bits if isinstance(plan.recipe.method, QLora) else None
    return {"stage": layout.zero_stage, "offload": (layout.offload_optimizer, layout.offload_param), "checkpointing": layout.gradient_checkpointing,
            "bits": bits, "micro": plan.batch.micro_batch_size}  # fmt: skip


def test_with_room_nothing_is_given_up() -> None:
    chosen = settings(plan_of(recipe_of(LLAMA_1B, **ALL_AUTO), on("h200", each=8)))
    assert chosen["offload"] == (False, False) and chosen["bits"] is None and not chosen["checkpointing"]


def test_the_tighter_the_budget_the_more_is_given_up_and_it_still_fits() -> None:
    slower, before = [], 0.0
    for budget in ("120GiB", "40GiB", "20GiB", "12GiB"):
        recipe = apply_changes(recipe_of(**ALL_AUTO), {"memory.budget": budget})
        plan = plan_of(recipe, on("h200"))
        assert plan.memory.budget == recipe.memory.budget_bytes and plan.memory.verdict != "DOES NOT FIT", budget
        taken = make_choice(recipe, plan.shape, plan.cluster).taken
        assert taken.step_s >= before
        before = taken.step_s
        slower.append(settings(plan))
    assert slower[0] != slower[-1] and slower[-1]["bits"] == 4 and slower[-1]["checkpointing"]


def test_the_choice_is_the_fastest_that_fits_of_all() -> None:
    """Looking at every candidate, not only at those before the first that fits."""
    recipe, cluster = recipe_of(**ALL_AUTO, optim={"name": "adamw"}), on("a100-40gb")
    plan = plan_of(recipe, cluster)
    choice = make_choice(recipe, plan.shape, cluster)
    assert choice.taken.verdict == "FITS" and choice.taken is choice.considered[-1]
    all_of_them = make_candidates(recipe, plan.shape, cluster, find_device("a100-40gb"), plan.trainable_params)
    assert len(all_of_them) == choice.total > 100
    for candidate in all_of_them:
        fixed = apply_changes(candidate.recipe, {"batch.micro_batch_size": candidate.batch.micro_batch_size})
        if candidate.step_s < choice.taken.step_s:
            assert plan_of(fixed, cluster).memory.verdict != "FITS"


def test_every_choice_is_in_the_notes_with_its_reason() -> None:
    plan = plan_of(recipe_of(**ALL_AUTO), on("a100-40gb"))
    notes = "\n".join(plan.notes)
    for key in (
        "parallel.zero_stage",
        "parallel.offload",
        "memory.gradient_checkpointing",
        "method.quantization",
        "batch.micro_batch_size",
    ):
        assert f"{key}: " in notes
    assert "would need" in notes and "the fastest that fits" in notes


def test_the_global_batch_stays_what_the_recipe_says() -> None:
    for gpu, each in (("rtx-4090", 1), ("a100-40gb", 4), ("h200", 8)):
        batch = plan_of(recipe_of(**ALL_AUTO), on(gpu, each=each)).batch
        assert batch.global_batch_size == 64 == batch.micro_batch_size * batch.gradient_accumulation_steps * each


def test_a_plan_leaves_nothing_auto_but_is_read_back_as_it_was(tmp_path: Path) -> None:
    from launcher.plan import load_plan

    plan = plan_of(recipe_of(**ALL_AUTO), on("a100-40gb"))
    assert plan.recipe.parallel.zero_stage == plan.layout.zero_stage and plan.recipe.parallel.offload is None
    assert plan.recipe.memory.gradient_checkpointing == plan.layout.gradient_checkpointing
    assert isinstance(plan.recipe.method, QLora) or plan.recipe.method.quantization is None  # type: ignore[union-attr]
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_quantised_adapters_keep_what_the_recipe_said_of_them() -> None:
    recipe = recipe_of(method={"kind": "lora", "quantization": "auto", "r": 5, "alpha": 7.0, "rslora": True, "target_modules": ["q_proj"]})
    method = plan_of(recipe, on("t4")).recipe.method
    assert isinstance(method, QLora)
    assert (method.r, method.alpha, method.rslora, method.target_modules) == (5, 7.0, True, ("q_proj",))


def test_where_nothing_fits_the_least_is_planned_and_said_so() -> None:
    plan = plan_of(recipe_of("meta-llama/Llama-3.1-405B-Instruct", **ALL_AUTO), on("t4"))
    assert plan.memory.verdict == "DOES NOT FIT" and plan.batch.micro_batch_size == 1
    assert any("does not fit" in note for note in plan.notes)


# ------------------------------------------------------------------------------------------------- advice


def test_each_suggestion_does_fit_and_is_minimal(tmp_path: Path) -> None:
    """Typed after the recipe's name, as it is printed; and without any one of its keys it no longer fits."""
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: r\nmodel: {{name_or_path: {LLAMA_8B}}}\ndata: {{train: t.jsonl, seq_len: 4096}}\nbatch: {{micro_batch_size: 2}}\n"
    )
    plan = plan_of(load_recipe(path), on("a100-40gb", each=4))
    suggestions = make_suggestions(plan)
    assert plan.memory.verdict == "DOES NOT FIT" and len(suggestions) >= 2
    for suggestion in suggestions:
        changed = load_recipe(path, tuple(word.strip("'") for word in format_changes(suggestion.changes)))
        assert plan_of(changed, plan.cluster).memory.verdict != "DOES NOT FIT"
        for key in suggestion.changes:
            less = {other: value for other, value in suggestion.changes.items() if other != key}
            assert plan_of(apply_changes(load_recipe(path), less), plan.cluster).memory.verdict != "FITS" or key == "parallel.zero_stage"
    assert [bool(item.effect) for item in suggestions] == sorted(bool(item.effect) for item in suggestions), (
        "what keeps the result comes first"
    )


@pytest.mark.parametrize(("method", "stage", "gpus", "seq_len"), [("full", 3, 1, 2048), ("lora", 3, 1, 4096), ("full", 2, 8, 65536)])
def test_a_suggestion_tells_what_the_plan_will_be_with_it(method: str, stage: int, gpus: int, seq_len: int) -> None:
    """The micro-batch that the plan then chooses included; no key that the recipe has so already; nothing that gives up more and is no faster."""
    name = "meta-llama/Llama-3.3-70B-Instruct" if method == "lora" else LLAMA_8B
    data = {"train": "hub://x/y", "seq_len": seq_len}
    recipe = recipe_of(name, method={"kind": method}, parallel={"zero_stage": stage}, data=data)
    plan = plan_of(recipe, on("h100", each=gpus))
    suggestions = make_suggestions(plan)
    assert plan.memory.verdict == "DOES NOT FIT" and len(suggestions) >= 2
    for suggestion in suggestions:
        there = plan_of(apply_changes(recipe, suggestion.changes), plan.cluster)
        speed = estimate_plan(there)
        assert there.memory.verdict == "FITS" and there.memory.device("total").p95 == suggestion.need
        assert speed is not None and speed.step_s == pytest.approx(suggestion.step_s)
        assert suggestion.changes.get("parallel.zero_stage") != stage
    lossless = min(item.slowdown for item in suggestions if not item.effect)
    assert all(item.slowdown < lossless for item in suggestions if item.effect)


def test_where_evaluating_decides_its_micro_batch_is_told_to_shrink() -> None:
    recipe = recipe_of(method={"kind": "lora"}, batch={"micro_batch_size": 1}, evaluate={"micro_batch_size": 64},
                       data={"train": "hub://x/y", "eval_fraction": 0.1, "seq_len": 4096})  # fmt: skip
    plan = plan_of(recipe, on("h100"))
    assert plan.memory.decisive_phase == "evaluation"
    assert make_suggestions(plan)[0].changes == {"evaluate.micro_batch_size": "auto"}


def test_the_reason_of_a_choice_differs_in_that_key_alone() -> None:
    """What another stage would need is told at the same micro-batch and checkpointing, or not at all."""
    recipe = recipe_of(**ALL_AUTO)
    cluster = on("l4", each=2)
    taken = settings(plan := plan_of(recipe, cluster))
    (note,) = [note for note in plan.notes if note.startswith("parallel.offload: all")]
    assert taken["offload"] == (True, True) and "none would need " in note
    told = float(note.partition("none would need ")[2].split()[0])
    alike = apply_changes(
        plan.recipe, {"parallel.offload_optimizer": False, "parallel.offload_param": False, "batch.micro_batch_size": taken["micro"]}
    )
    assert plan_of(alike, cluster).memory.device("total").p95 / GIB == pytest.approx(told, abs=0.06)


def test_more_machines_are_suggested_where_they_help() -> None:
    recipe = recipe_of(batch={"global_batch_size": 64, "micro_batch_size": 1}, parallel={"zero_stage": 3})
    cluster = on("rtx-4090", each=4)
    assert plan_of(recipe, cluster).memory.verdict == "DOES NOT FIT"
    dry = make_dry_run(plan_of(recipe, cluster))
    assert dry.nodes_that_fit in (2, 4, 8, 16)
    assert plan_of(recipe, cluster.model_copy(update={"nodes": dry.nodes_that_fit})).memory.verdict == "FITS"
    assert suggest_nodes(cluster, lambda wider: False) is None


@pytest.mark.parametrize("budget", ["9.3GiB", "23GiB"])
@pytest.mark.parametrize("offload", [False, True])
def test_what_is_asked_only_whether_it_fits_agrees_with_the_exact_prediction(budget: str, offload: bool) -> None:
    """Without a replay it is never above it, and a replay that ends early is one of what does not fit."""
    parallel = {"zero_stage": 3, "offload_param": offload, "offload_optimizer": offload}
    recipe = recipe_of(
        LLAMA_1B, parallel=parallel, memory={"budget": budget, "gradient_checkpointing": True}, batch={"global_batch_size": 16}
    )
    cluster = on("rtx-4090", each=2)
    shape = plan_of(recipe, cluster).shape
    quick, ending, exact = (
        make_predictor(shape, cluster, replay=replay, only_fits=only_fits)
        for replay, only_fits in ((False, True), (True, True), (True, False))
    )
    for candidate in make_candidates(recipe, shape, cluster, find_device("rtx-4090"), count_trainable(recipe, shape)):
        of = candidate.recipe, candidate.layout, candidate.batch
        told, needs = quick(*of), exact(*of)
        assert told.without_slack.device("total").p95 < told.device("total").p95 <= needs.device("total").p95
        assert ending(*of) == needs if needs.verdict == "FITS" else ending(*of).verdict != "FITS"


def test_the_document_of_a_dry_run_has_what_is_promised() -> None:
    recipe = recipe_of(**ALL_AUTO)
    plan = plan_of(recipe, on("a100-40gb"))
    document = json.loads(json.dumps(make_document(make_dry_run(plan, make_choice(recipe, plan.shape, plan.cluster)))))
    assert document["schema_version"] == 1 and document["verdict"] in ("FITS", "TIGHT", "DOES NOT FIT")
    assert {f"{figure}_bytes" for figure in ("allocated", "reserved", "total")} == set(document["device"])
    assert all(set(figure) == {"p50", "p95"} and figure["p50"] <= figure["p95"] for figure in document["device"].values())
    assert document["decisive_phase"] in [phase["name"] for phase in document["phases"]]
    for phase in document["phases"]:
        assert sum(part["bytes"] for part in phase["components"]) == phase["total_bytes"]["p50"]
        assert all(part["provenance"] in ("exact", "source", "fitted", "assumed") for part in phase["components"])
    assert document["host"]["total_bytes"] > 0 and document["disk"]["checkpoint_bytes"] > 0
    assert document["speed"]["estimate"] is True and document["speed"]["step_s"] > 0
    assert set(plan.notes) <= set(document["notes"]) and document["plan"] == json.loads(json.dumps(plan.to_dict()))
    assert [c["taken"] for c in document["candidates"]].count(True) == 1


# ------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("seq_len=2k,8k,32k", "data.seq_len", ("2048", "8192", "32768")),
        ("nodes=1..4", "nodes", ("1", "2", "3", "4")),
        ("parallel.zero_stage=2,3", "parallel.zero_stage", ("2", "3")),
        ("gpu=t4,h100", "gpu", ("t4", "h100")),
        ("micro_batch_size=1,2..4", "batch.micro_batch_size", ("1", "2", "3", "4")),
    ],
)
def test_axes(text: str, key: str, values: tuple[str, ...]) -> None:
    axis = read_axis(text)
    assert (axis.key, axis.values) == (key, values)


@pytest.mark.parametrize("text", ["seq_len", "seq_len=", "lenght=1,2", "nodes=8..1", "nodes=1,,2"])
def test_what_is_no_axis(text: str) -> None:
    with pytest.raises(RecipeError, match="--sweep"):
        read_axis(text)


def test_an_override_is_told_from_an_axis() -> None:
    assert is_axis("nodes=1..8") and is_axis("seq_len=1k") and not is_axis("optim.lr=1") and not is_axis("seed=3")


def test_a_sweep_has_a_cell_each_combination_and_says_what_cannot_be() -> None:
    def plan_at(values: dict[str, str]) -> tuple[Plan, None]:
        recipe = apply_changes(recipe_of(LLAMA_1B, method={"kind": "lora"}), {"data.seq_len": int(values["data.seq_len"])})
        return plan_of(recipe, on("rtx-4090", nodes=int(values["nodes"]))), None

    cells = make_sweep([read_axis("seq_len=1k,2k,200k"), read_axis("nodes=1..3")], plan_at)
    assert len(cells) == 9 and [cell.values for cell in cells][:2] == [("1024", "1"), ("1024", "2")]
    problems = {cell.values: cell.problem for cell in cells if cell.plan is None}
    assert "not divisible by 3 ranks" in problems[("1024", "3")] and "longer than the model's" in problems[("204800", "1")]
    needs = [cell.plan.memory.device("total").p50 for cell in cells if cell.plan and cell.values[1] == "1"]
    assert needs == sorted(needs)
    with pytest.raises(RecipeError, match="a table holds"):
        make_sweep([read_axis("nodes=1..999")], plan_at)


def test_changes_reach_the_recipe_and_nothing_else() -> None:
    recipe = recipe_of()
    changed = apply_changes(recipe, {"data.seq_len": 64, "method": Lora(kind="lora", r=3), "method.alpha": 4.0, "memory.budget": "9GiB"})
    assert (changed.data.seq_len, changed.method, changed.memory.budget) == (64, Lora(kind="lora", r=3, alpha=4.0), "9GiB")
    assert changed.model == recipe.model and recipe.data.seq_len == 2048


# ------------------------------------------------------------------------------------------------- the search


EVERYTHING_AUTO: dict[str, Any] = {
    "model": {"name_or_path": LLAMA_8B, "loss": "auto"},
    "method": {"kind": "lora", "quantization": "auto"},
    "parallel": {"zero_stage": "auto", "offload": "auto", "reduce_bucket_size": "auto"},
    "memory": {"gradient_checkpointing": "auto"},
}


def test_thousands_of_candidates_are_considered_and_the_document_says_how_many() -> None:
    recipe = recipe_of(**EVERYTHING_AUTO, batch={"global_batch_size": 1440}, data={"train": "hub://x/y", "seq_len": 1024})
    plan = plan_of(recipe, on("rtx-4090", each=8))
    document = make_document(make_dry_run(plan, make_choice(recipe, plan.shape, plan.cluster)))
    assert plan.memory.verdict == "FITS" and document["candidates_total"] >= 2000
    assert document["candidates_considered"] == len(document["candidates"]) <= document["candidates_total"]
    assert all(c["device_total_bytes_p95"] or c["device_bytes_at_least"] > plan.memory.budget for c in document["candidates"])


@pytest.mark.parametrize(
    ("gpu", "each", "seq_len", "expected"), [("rtx-4090", 8, 1024, "FITS"), ("t4", 1, 8192, "FITS"), ("t4", 1, 98304, "DOES NOT FIT")]
)
def test_the_search_finds_what_trying_all_of_them_finds(gpu: str, each: int, seq_len: int, expected: str) -> None:
    """Each candidate predicted exactly, with the allocator's replay, and the best taken; without quantisation, which makes no difference here."""
    sections = copy.deepcopy(EVERYTHING_AUTO) | {"method": {"kind": "lora"}}
    sections["model"]["name_or_path"] = LLAMA_1B
    del sections["parallel"]["reduce_bucket_size"]
    recipe = recipe_of(**sections, batch={"global_batch_size": 2 * each}, data={"train": "hub://x/y", "seq_len": seq_len})
    cluster = on(gpu, each=each)
    shape = plan_of(recipe_of(LLAMA_1B, parallel={"zero_stage": 3}, batch={"global_batch_size": each}), cluster).shape
    choice = make_choice(recipe, shape, cluster)
    everyone = make_candidates(recipe, shape, cluster, find_device(gpu), count_trainable(recipe, shape))
    predict = make_predictor(shape, cluster, replay=True)
    exact = [replace(c, memory=predict(c.recipe, c.layout, c.batch), is_exact=True) for c in everyone]

    def rank(candidate: Candidate) -> tuple[int, float, int]:
        assert candidate.memory is not None and candidate.verdict is not None
        verdict = VERDICTS.index(candidate.verdict)
        bare = candidate.memory.without_slack.device("total").p95
        return verdict, bare if verdict == 2 else candidate.step_s, candidate.batch.micro_batch_size

    best = min(exact, key=rank)
    assert best.verdict == expected == choice.taken.verdict and len(everyone) == choice.total
    assert best.changes == choice.taken.changes and best.memory == choice.taken.memory
