"""Every recipe that ships: it plans on a CPU and on a GPU, its head says what it needs, and editors accept it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from recipe_heads import with_needs
from ruamel.yaml import YAML

from launcher.cluster import Cluster
from launcher.data.rows import find_files
from launcher.gallery import copy_recipe, find_gallery, list_recipes
from launcher.plan import make_plan
from launcher.plan.describe import describe_plan
from launcher.plan.devices import find_device, make_cluster
from launcher.recipe import (
    Batch,
    Data,
    EarlyStopping,
    Evaluate,
    Freeze,
    Full,
    Lora,
    Memory,
    Model,
    Optim,
    Parallel,
    QLora,
    Recipe,
    Save,
    Schedule,
    Source,
    Track,
    make_json_schema,
)
from launcher.recipe_file import load_recipe
from launcher.schema import Spec

GALLERY = find_gallery()
assert GALLERY is not None
SHIPPED = sorted(GALLERY.glob("*.yaml"))
WANTED = {
    "quickstart", "gsm8k-qlora", "smollm2-135m-full", "smollm2-135m-lora", "llama-3.1-8b-lora", "llama-3.1-8b-qlora", "llama-3.1-8b-full",
    "llama-3.3-70b-qlora", "llama-3.1-405b-qlora", "qwen3-8b-lora", "qwen3-30b-a3b-lora", "mistral-7b-qlora", "gemma-3-12b-qlora", "phi-4-lora",
    "gpt-oss-20b-lora", "tinyllama-1.1b-qlora", "flan-t5-base-full",
}  # fmt: skip
WITHOUT_DATA = {"gsm8k-qlora"}
"""Recipes whose data the user brings; their heads say so."""
CPU = Cluster(name="cpu", workers_per_node=2, cpus_per_node=2, device_name="CPU", device_memory=8 << 30, host_memory=16 << 30)
GPU = Cluster(name="gpu", accelerator="cuda", device_name="a 24 GB GPU", workers_per_node=1, cpus_per_node=16, device_memory=24 << 30,
              host_memory=64 << 30, bf16=True)  # fmt: skip
EIGHT = make_cluster(find_device("h200"), nodes=2, gpus_per_node=8)

each_recipe = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path)


def head_of(path: Path) -> list[str]:
    """The comment a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def test_all_that_ship_are_listed() -> None:
    assert {path.stem for path in SHIPPED} == set(list_recipes()) >= WANTED


@pytest.mark.parametrize("cluster", [CPU, GPU, EIGHT], ids=lambda cluster: cluster.name)
@each_recipe
def test_it_plans(path: Path, cluster: Cluster) -> None:
    recipe = load_recipe(path)
    if recipe.batch.global_batch_size % (cluster.nodes * cluster.workers_per_node):
        recipe = recipe.model_copy(update={"batch": Batch(global_batch_size=cluster.nodes * cluster.workers_per_node)})
    plan = make_plan(recipe, cluster, base_dir=str(path.parent), run_dir="/runs/x")
    assert plan.batch.global_batch_size % plan.layout.world_size == 0
    assert "auto" not in json.dumps(plan.deepspeed)
    assert dict(describe_plan(plan))["model"].startswith(recipe.model.name_or_path)


@each_recipe
def test_its_head_says_what_its_dry_run_says_and_it_fits_somewhere(path: Path) -> None:
    """Where this fails because the arithmetic changed: make recipe-heads."""
    made = with_needs(path)
    assert made == path.read_text(encoding="utf-8")
    assert "more than any" not in made


@each_recipe
def test_its_head_says_what_it_is_what_it_needs_and_how_to_start_it(path: Path) -> None:
    headline, *rest = head_of(path)
    assert len(headline) > 20 and headline.endswith(".")
    assert sum(line.startswith("#   needs  ") for line in rest) == 1
    (start,) = [line for line in rest if line.startswith("#   start  ")]
    assert f"lepton-launch {path.stem}" in start or f"lepton-launch recipes/{path.name}" in start
    assert ("You bring the data" in headline) == (path.stem in WITHOUT_DATA)


@each_recipe
def test_it_is_named_as_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@each_recipe
def test_its_data_is_there_or_its_head_says_where_to_get_it(path: Path) -> None:
    data = load_recipe(path).data
    for source in (*data.train, *data.eval):
        if path.stem in WITHOUT_DATA:
            assert source.path.rpartition("/")[2] in "".join(head_of(path)) and "github.com" in "".join(head_of(path))
        else:
            assert find_files(source, str(path.parent))


@each_recipe
def test_a_copy_of_it_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    copy = copy_recipe(path.stem, tmp_path)[0]
    assert load_recipe(copy) == load_recipe(path)


# ------------------------------------------------------------------------------------------------- the schema for editors


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = make_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


LEAST: dict[str, Any] = {"name": "x", "model": {"name_or_path": "a"}, "data": {"train": "a.jsonl"}}


@each_recipe
def test_editors_accept_it_and_refuse_an_unknown_key_in_it(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    facts = read_yaml(path)
    assert [error.message for error in validator.iter_errors(facts)] == []
    assert not validator.is_valid(facts | {"optimiser": {}})
    for name, section in facts.items():
        if isinstance(section, dict):
            assert not validator.is_valid(facts | {name: {**section, "no_such_key": 1}}), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": {"train": ["a.jsonl", {"path": "b.csv", "columns": {"text": "body"}}], "eval": {"path": "e.jsonl"}}},
        {"method": {"kind": "freeze", "patterns": ["*norm*"]}},
        {"batch": {"micro_batch_size": "auto"}},
        {"batch": {"micro_batch_size": 4}},
        {"evaluate": {"early_stopping": {"patience": 2}}},
        {"schedule": {"max_steps": None}},
    ],
    ids=str,
)
def test_editors_accept_what_the_launcher_accepts(changes: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    facts = LEAST | changes
    Recipe.model_validate_json(json.dumps(facts))
    assert [error.message for error in validator.iter_errors(facts)] == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimiser": {}}, "'optimiser' was unexpected"),
        ({"optim": {"learning_rate": 1}}, "'learning_rate' was unexpected"),
        ({"optim": {"lr": "fast"}}, "'fast' is not of type 'number'"),
        ({"optim": {"name": "adam"}}, "'adam' is not one of"),
        ({"parallel": {"zero_stage": 4}}, "4 is not one of"),
        ({"data": {"seq_len": 8}}, "'train' is a required property"),
        ({"model": {}}, "'name_or_path' is a required property"),
        ({"method": {"r": 8}}, "'kind' is a required property"),
        ({"method": {"kind": "full", "r": 8}}, "is not valid under any"),
        ({"method": {"kind": "prefix"}}, "is not valid under any"),
    ],
    ids=str,
)
def test_editors_refuse_what_the_launcher_refuses(changes: dict[str, Any], told: str, validator: jsonschema.Draft202012Validator) -> None:
    facts = LEAST | changes
    with pytest.raises(ValueError, match="validation error"):
        Recipe.model_validate_json(json.dumps(facts))
    assert any(told in error.message for error in validator.iter_errors(facts))


def test_what_a_recipe_leaves_out_the_one_it_extends_may_hold(validator: jsonschema.Draft202012Validator) -> None:
    over = {"extends": "base.yaml", "data": {"seq_len": 9}, "method": {"r": 4}, "model": {"revision": "main"}}
    assert validator.is_valid(over) and not validator.is_valid(over | {"zzz": 1})
    assert not validator.is_valid({key: value for key, value in over.items() if key != "extends"})


def test_every_key_says_what_it_does() -> None:
    """In editors, and as the remedy of a fault; a section says it in its docstring."""
    schema = make_json_schema()
    specs = [Recipe]
    for spec in specs:
        for name, info in spec.model_fields.items():
            below = [kind for kind in spec_types(info.annotation) if kind not in specs]
            specs += below
            if name != "kind" and not spec_types(info.annotation):
                assert info.description, f"{spec.__name__}.{name}"
        assert spec.__doc__
    for name in ("train", "eval"):
        assert schema["$defs"]["Data"]["properties"][name]["description"] == Data.model_fields[name].description


def spec_types(annotation: Any) -> list[type[Spec]]:
    from launcher.schema import _members

    return [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, Spec)]


# ------------------------------------------------------------------------------------------------- the page on recipes

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
TABLES: dict[str, type[Spec]] = {
    "The recipe": Recipe,
    "model": Model,
    "method: full": Full,
    "method: freeze": Freeze,
    "method: lora": Lora,
    "method: qlora": QLora,
    "data": Data,
    "data source": Source,
    "batch": Batch,
    "optim": Optim,
    "schedule": Schedule,
    "parallel": Parallel,
    "memory": Memory,
    "evaluate": Evaluate,
    "evaluate.early_stopping": EarlyStopping,
    "save": Save,
    "track": Track,
}


def read_tables() -> dict[str, dict[str, str]]:
    """Of each heading of the page the keys of its table, and the default that the page gives."""
    tables: dict[str, dict[str, str]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith(("## ", "### ")):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            key, default = (cell.strip().strip("`") for cell in line.split("|")[1:3])
            tables.setdefault(heading, {})[key] = default
    return tables


@pytest.mark.parametrize("heading", TABLES)
def test_the_page_has_every_key_with_its_default(heading: str) -> None:
    table, fields = read_tables()[heading], TABLES[heading].model_fields
    assert list(table) == list(fields)
    for name, info in fields.items():
        told = table[name]
        if info.is_required():
            assert told == "needed", name
        elif isinstance(info.default, Spec):
            assert told in ("its defaults", "{kind: full}"), name
        else:
            value = YAML(typ="safe").load(told)
            assert info.default == (tuple(value) if isinstance(value, list) else value), name


def test_the_tables_cover_every_section() -> None:
    reached = [Recipe]
    for spec in reached:
        reached += [kind for info in spec.model_fields.values() for kind in spec_types(info.annotation) if kind not in reached]
    assert set(reached) == set(TABLES.values())
