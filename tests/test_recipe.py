"""Recipes that are wrong: each fault with its line, its value and what to do; and what overrides and extends mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import Fault, RecipeError
from launcher.recipe import Freeze, Full, Lora, QLora, Recipe, Source
from launcher.recipe_file import load_recipe

GOOD = """\
name: good
model: {name_or_path: some/model}
data:
  train: train.jsonl
"""
"""Four lines; what a test adds begins at line 5."""
SECTIONS = "batch, data, evaluate, memory, method, model, name, optim, output_dir, parallel, save, schedule, seed, track"
OPTIM_KEYS = "betas, eps, lr, max_grad_norm, momentum, name, weight_decay"
LORA_KEYS = "alpha, dora, dropout, init, kind, quantization, r, rslora, target_modules"
SCALE = "Peak learning rate."


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a message names r.yaml and not a long path."""
    monkeypatch.chdir(tmp_path)


def read(text: str, *overrides: str, name: str = "r.yaml") -> Recipe:
    Path(name).write_text(text, encoding="utf-8")
    return load_recipe(Path(name), overrides)


def faults_of(text: str, *overrides: str) -> list[Fault]:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return list(caught.value.faults)


def fault(where: str, key: str, problem: str, remedy: str = "") -> Fault:
    return Fault(where, key, problem, remedy)


def test_the_least_recipe_has_the_defaults_of_the_sections() -> None:
    recipe = read(GOOD)
    assert recipe == Recipe(name="good", model={"name_or_path": "some/model"}, data={"train": (Source(path="train.jsonl"),)})  # type: ignore[arg-type]
    assert (recipe.method, recipe.optim.lr, recipe.batch.micro_batch_size, recipe.seed) == (Full(), 1e-4, "auto", 42)


# ------------------------------------------------------------------------------------------------- not a recipe at all

START = "start from: lepton-launch recipes show quickstart"
YAML_HINT = "check indentation, colons and quotes"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", fault("r.yaml:1", "", "the file is empty", START)),
        ("# a comment\n", fault("r.yaml:1", "", "the file is empty", START)),
        ("{}\n", fault("r.yaml:1", "", "the file is empty", START)),
        ("- a\n- b\n", fault("r.yaml:1", "", "the file is a list, not a mapping of sections", START)),
        ("just words\n", fault("r.yaml:1", "", "the file is text, not a mapping of sections", START)),
        ("7\n", fault("r.yaml:1", "", "the file is a number, not a mapping of sections", START)),
        ("name: [a, b\nmodel: c\n", fault("r.yaml:2", "", "not YAML: expected ',' or ']', but got ':'", YAML_HINT)),
        ("name: x\n\tmodel: y\n", fault("r.yaml:2", "", "not YAML: found character '\\t' that cannot start any token", YAML_HINT)),
        ("name: x\n---\nname: y\n", fault("r.yaml:2", "", "not YAML: but found another document", YAML_HINT)),
        (
            GOOD + "name: twice\n",
            fault(
                "r.yaml:5", "", 'not YAML: found duplicate key "name" with value "twice" (original value: "good")', "keep one of the two"
            ),
        ),
        (
            GOOD + "optim:\n  lr: 1\n  lr: 2\n",
            fault("r.yaml:7", "", 'not YAML: found duplicate key "lr" with value "2" (original value: "1")', "keep one of the two"),
        ),
    ],
    ids=str,
)
def test_what_is_no_recipe(text: str, expected: Fault) -> None:
    assert faults_of(text) == [expected]


def test_a_file_that_is_not_there_or_no_text() -> None:
    Path("binary.yaml").write_bytes(b"name: \xff\xfe\n")
    for name, problem in (
        ("none.yaml", "no such file"),
        ("binary.yaml", "not a YAML text file (UnicodeDecodeError)"),
        (".", "not a YAML text file (IsADirectoryError)"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path(name))
        assert [(f.where, f.problem) for f in caught.value.faults] == [(name, problem)]


# ------------------------------------------------------------------------------------------------- one key is wrong

UNKNOWN = "unknown key"
NOT_THERE = "is needed and is not there"


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        # types
        ("optim:\n  lr: fast\n", fault("r.yaml:6", "optim.lr", "'fast' should be a valid number", SCALE)),
        ("optim:\n  lr: -1\n", fault("r.yaml:6", "optim.lr", "-1 should be greater than 0", SCALE)),
        ("optim:\n  lr: .inf\n", fault("r.yaml:6", "optim.lr", "inf should be a finite number", SCALE)),
        ("optim:\n  lr:\n", fault("r.yaml:6", "optim.lr", "null should be a valid number", SCALE)),
        ('seed: "3"\n', fault("r.yaml:5", "seed", "'3' should be a valid integer", "Seeds the adapters, dropout and the order of the data.")),
        (
            "seed: 99999999999999999999\n",
            fault("r.yaml:5", "seed", "99999999999999999999 should be less than 4294967296",
                  "Seeds the adapters, dropout and the order of the data."),
        ),
        ("seed: true\n", fault("r.yaml:5", "seed", "true should be a valid integer", "Seeds the adapters, dropout and the order of the data.")),
        (
            "memory: {gradient_checkpointing: yes}\n",
            fault("r.yaml:5", "memory.gradient_checkpointing", "'yes' should be a valid boolean or should be 'auto' or 'offload'",
                  "Recompute activations in the backward pass (non-reentrant) instead of keeping them; offload also moves what is kept to host"
                  " memory; auto does as little of it as it can."),
        ),
        ("optim:\n", fault("r.yaml:5", "optim", "null should be a mapping of keys", "The optimizer.")),
        (
            "optim: {betas: [0.9]}\n",
            fault("r.yaml:5", "optim.betas", "has too few values", "Decay of the first and second moment (adamw, lion)."),
        ),
        (
            "optim: {betas: [0.9, 0.9, 0.9]}\n",
            fault("r.yaml:5", "optim.betas", "a list should have at most 2 values", "Decay of the first and second moment (adamw, lion)."),
        ),
        ("track: {to: wandb}\n", fault("r.yaml:5", "track.to", "'wandb' should be a list", "Trackers; wandb and mlflow must be installed and logged in.")),
        (
            "batch: {micro_batch_size: many}\n",
            fault("r.yaml:5", "batch.micro_batch_size", "'many' should be a valid integer or should be 'auto'",
                  "Samples one rank takes through the model at a time."),
        ),
        # choices
        ("parallel: {zero_stage: 4}\n", fault("r.yaml:5", "parallel.zero_stage", "4 should be 0, 1, 2, 3 or 'auto'",
                                              "0 replicates; 1 shards optimizer states; 2 also gradients; 3 also weights; auto is the fastest that fits.")),
        ("track: {to: [wandbb]}\n", fault("r.yaml:5", "track.to.0", "'wandbb' should be 'tensorboard', 'wandb' or 'mlflow'", "did you mean wandb?")),
        ("method:\n  kind: qlor\n", fault("r.yaml:6", "method.kind", "'qlor' is not one of full, freeze, lora, qlora", "did you mean qlora?")),
        ("method:\n  kind: prefix\n", fault("r.yaml:6", "method.kind", "'prefix' is not one of full, freeze, lora, qlora")),
        ("method: {r: 8}\n", fault("r.yaml:5", "method.kind", NOT_THERE, "one of: full, freeze, lora, qlora")),
        ("method: lora\n", fault("r.yaml:5", "method", "'lora' should be a mapping of keys", "write method: {kind: lora}")),
        # unknown keys
        ("optim:\n  beta: [0.9, 0.99]\n", fault("r.yaml:6", "optim.beta", UNKNOWN, "did you mean betas?")),
        ("optim:\n  seq_len: 9\n", fault("r.yaml:6", "optim.seq_len", UNKNOWN, "did you mean data.seq_len?")),
        ("optim:\n  zzz: 9\n", fault("r.yaml:6", "optim.zzz", UNKNOWN, f"keys here: {OPTIM_KEYS}")),
        ("optimiser: {}\n", fault("r.yaml:5", "optimiser", UNKNOWN, "did you mean optim?")),
        ("zzz: 1\n", fault("r.yaml:5", "zzz", UNKNOWN, f"keys here: {SECTIONS}")),
        ("evaluate: {early_stopping: {patiense: 3}}\n", fault("r.yaml:5", "evaluate.early_stopping.patiense", UNKNOWN, "did you mean patience?")),
        # keys of another method
        ("method:\n  kind: full\n  r: 8\n", fault("r.yaml:7", "method.r", UNKNOWN, "it is a key of lora and qlora; keys of this kind: kind")),
        ("method:\n  kind: full\n  bits: 4\n", fault("r.yaml:7", "method.bits", UNKNOWN, "it is a key of qlora; keys of this kind: kind")),
        ("method:\n  kind: lora\n  bits: 4\n", fault("r.yaml:7", "method.bits", UNKNOWN, f"it is a key of qlora; keys of this kind: {LORA_KEYS}")),
        ("method:\n  kind: lora\n  alfa: 4\n", fault("r.yaml:7", "method.alfa", UNKNOWN, "did you mean alpha?")),
    ],
    ids=str,
)  # fmt: skip
def test_one_wrong_key(added: str, expected: Fault) -> None:
    assert faults_of(GOOD + added) == [expected]


TRAIN = "The sources of the training set; one path or one source may be written without the list."
PATH = "A file or glob (jsonl, json, csv, tsv, parquet, arrow), relative to the recipe; or hub://OWNER/NAME."


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("[]", [fault("r.yaml:4", "data.train", "an empty list should have at least 1 value", TRAIN)]),
        ("3", [fault("r.yaml:4", "data.train", "3 should be a mapping of keys", TRAIN)]),
        ("[a.jsonl, 3]", [fault("r.yaml:4", "data.train.1", "3 should be a mapping of keys")]),
        ("{path: a, columns: {text: 0}}", [fault("r.yaml:4", "data.train.columns.text", "0 should be a valid string")]),
        (
            "{pth: a}",
            [fault("r.yaml:4", "data.train.path", NOT_THERE, PATH), fault("r.yaml:4", "data.train.pth", UNKNOWN, "did you mean path?")],
        ),
        (
            "\n    - {path: a, weight: 0}\n    - {pth: b}",
            [
                fault("r.yaml:5", "data.train.0.weight", "0 should be greater than 0",
                      "How often this source is seen in an epoch: 2 is twice, 0.5 every other row."),
                fault("r.yaml:6", "data.train.1.path", NOT_THERE, PATH),
                fault("r.yaml:6", "data.train.1.pth", UNKNOWN, "did you mean path?"),
            ],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_sources(train: str, expected: list[Fault]) -> None:
    assert faults_of(GOOD.replace("train.jsonl", train)) == expected


def test_a_name_that_is_no_folder_name() -> None:
    (found,) = faults_of(GOOD.replace("good", "a/b"))
    assert (found.where, found.key) == ("r.yaml:1", "name") and found.problem.startswith("'a/b' should match pattern")


def test_missing_sections_and_keys() -> None:
    assert faults_of("name: x\n") == [
        fault("r.yaml:1", "model", NOT_THERE, "The model that is fine-tuned."),
        fault("r.yaml:1", "data", NOT_THERE, "What it is trained on."),
    ]
    assert faults_of("name: x\nmodel:\n  revision: main\ndata: {seq_len: 8}\n") == [
        fault("r.yaml:2", "model.name_or_path", NOT_THERE,
              "A local folder, a hub id, or pkg://PACKAGE/FILE.gguf for a file inside an installed package."),
        fault("r.yaml:4", "data.train", NOT_THERE, TRAIN),
    ]  # fmt: skip


def test_every_fault_is_told_at_once_in_the_order_of_the_file() -> None:
    found = faults_of(
        GOOD
        + "optim: {lr: -1, betas: [0.9]}\nmethod: {kind: full, r: 3}\nzzz: 1\nparallel: {zero_stage: 2, offload_param: true}\n"
        + "batch: {global_batch_size: 6, micro_batch_size: 4}\n"
    )
    assert [(f.where, f.key) for f in found] == [
        ("r.yaml:5", "optim.lr"),
        ("r.yaml:5", "optim.betas"),
        ("r.yaml:6", "method.r"),
        ("r.yaml:7", "zzz"),
        ("r.yaml:8", "parallel.offload_param"),
        ("r.yaml:9", "batch.micro_batch_size"),
    ]


def test_the_message_counts_its_faults_and_shows_each() -> None:
    with pytest.raises(RecipeError) as caught:
        read(GOOD + "optim: {lr: fast}\nzzz: 1\n")
    assert str(caught.value) == (
        "2 faults\n"
        "  r.yaml:5  optim.lr: 'fast' should be a valid number\n    → Peak learning rate.\n"
        f"  r.yaml:6  zzz: unknown key\n    → keys here: {SECTIONS}"
    )


# ------------------------------------------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("added", "where", "key", "problem", "remedy"),
    [
        ("method: {kind: freeze}\n", 5, "method", "freeze trains nothing", "set method.last_layers or method.patterns"),
        ("method: {kind: qlora, bits: 8, quant_type: fp4}\n", 5, "method.quant_type", "is a 4-bit code, and method.bits is 8",
         "drop method.quant_type or set method.bits to 4"),
        ("method: {kind: lora, dora: true, init: pissa}\n", 5, "method.init",
         "pissa changes the base, and method.dora measures it: no plain adapter says the two", "drop one of the two"),
        ("parallel:\n  offload_param: true\n", 6, "parallel.offload_param", "needs ZeRO stage 3, and parallel.zero_stage is 2",
         "set parallel.zero_stage to 3"),
        ("parallel:\n  zero_stage: 0\n  offload_optimizer: true\n", 7, "parallel.offload_optimizer",
         "needs ZeRO stage 1, 2 or 3, and parallel.zero_stage is 0", "set parallel.zero_stage to 2"),
        ("parallel:\n  leaf_modules: true\n", 6, "parallel.leaf_modules", "needs ZeRO stage 3, and parallel.zero_stage is 2",
         "drop it, or set parallel.zero_stage to 3"),
        ("method: {kind: qlora, bits: 8}\nparallel: {zero_stage: 3, offload_param: true}\n", 6, "parallel.offload_param",
         "LLM.int8() weights cannot live in host memory between uses (their scales are bound to the device)",
         "set method.bits to 4, or parallel.offload_param to false"),
        ("batch:\n  global_batch_size: 6\n  micro_batch_size: 4\n", 7, "batch.micro_batch_size", "4 does not divide batch.global_batch_size 6",
         "global_batch_size = micro_batch_size × gradient_accumulation_steps × ranks"),
        ("schedule: {max_steps: 3, warmup_steps: 3}\n", 5, "schedule.warmup_steps", "3 warm-up steps, and the run has 3", "make it smaller"),
        ("evaluate: {every_steps: 3, early_stopping: {}}\n", 5, "evaluate.early_stopping", "needs a held-out set",
         "set data.eval or data.eval_fraction"),
        ("evaluate: {every_steps: 3}\n", 5, "evaluate.every_steps", "needs a held-out set", "set data.eval or data.eval_fraction"),
        ("evaluate: {keep_best: true, every_steps: 2}\n", 5, "evaluate.keep_best", "needs a held-out set", "set data.eval or data.eval_fraction"),
        ("  eval: e.jsonl\nevaluate: {keep_best: true}\n", 6, "evaluate.keep_best", "needs evaluations during the run",
         "set evaluate.every_steps"),
        ("  eval: e.jsonl\n  eval_fraction: 0.1\n", 6, "data.eval_fraction", "a held-out set is named by data.eval already", "drop one of the two"),
        ("  eval: e.jsonl\nevaluate:\n  early_stopping: {patience: 2}\n", 7, "evaluate.early_stopping", "needs evaluations during the run",
         "set evaluate.every_steps"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_combinations(added: str, where: int, key: str, problem: str, remedy: str) -> None:
    assert faults_of(GOOD + added) == [fault(f"r.yaml:{where}", key, problem, remedy)]


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit"])
def test_optimizers_of_the_gpu_are_not_offloaded(name: str) -> None:
    (found,) = faults_of(GOOD + f"optim: {{name: {name}}}\nparallel: {{offload_optimizer: true}}\n")
    assert (found.where, found.key) == ("r.yaml:5", "optim.name") and found.problem.startswith(f"{name} is") and "use adamw" in found.remedy


def test_a_conflict_shows_beside_faults_of_other_sections() -> None:
    found = faults_of(GOOD + "optim: {lr: fast}\nmethod: {kind: freeze}\n")
    assert [(f.where, f.key) for f in found] == [("r.yaml:5", "optim.lr"), ("r.yaml:6", "method")]


# ------------------------------------------------------------------------------------------------- values as YAML 1.2 reads them


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1e4", 1e4), ("2.0e-3", 2e-3), ("1", 1.0), ("0.5", 0.5), ("+3e-1", 0.3)])
def test_numbers_with_an_exponent_are_numbers(text: str, value: float) -> None:
    assert read(GOOD + f"optim: {{lr: {text}}}\n").optim.lr == value
    assert read(GOOD, f"optim.lr={text}").optim.lr == value


def test_sources_may_be_written_short() -> None:
    assert read(GOOD).data.train == (Source(path="train.jsonl"),)
    assert read(GOOD.replace("train.jsonl", "{path: a.csv, weight: 2}")).data.train == (Source(path="a.csv", weight=2.0),)
    assert read(GOOD.replace("train.jsonl", "[a.csv, {path: b.csv, limit: 3}]")).data.train == (
        Source(path="a.csv"),
        Source(path="b.csv", limit=3),
    )


def test_anchors_and_merges_are_read() -> None:
    text = "schedule: &short {epochs: 2.0, kind: linear}\n" + GOOD
    merged = read(text.replace("kind: linear}", "kind: linear}\nevaluate: {samples: [&q 'Who?', *q]}"))
    assert merged.evaluate.samples == ("Who?", "Who?") and merged.schedule.kind == "linear"
    (found,) = faults_of(GOOD + "optim: &o {lr: 1.0}\nschedule:\n  <<: *o\n  epochs: 2\n")
    assert (found.key, found.problem, found.remedy) == ("schedule.lr", UNKNOWN, "did you mean optim.lr?")


# ------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_laid_over_in_order() -> None:
    recipe = read(GOOD + "optim: {lr: 1}\n", "optim.lr=2", "optim.name=sgd", "optim.lr=3", "schedule.max_steps=7", "seed=9")
    assert (recipe.optim.lr, recipe.optim.name, recipe.schedule.max_steps, recipe.seed) == (3.0, "sgd", 7, 9)


def test_an_override_may_be_any_yaml() -> None:
    recipe = read(
        GOOD + "method: {kind: qlora, bits: 8, r: 4}\nschedule: {max_steps: 5}\n",
        "method={kind: lora, dora: true}",
        "evaluate.samples=[Who?, 'a: b']",
        "schedule.max_steps=null",
        "model.revision='123'",
        "data.system_prompt=a = b",
    )
    assert recipe.method == Lora(kind="lora", dora=True)
    assert recipe.evaluate.samples == ("Who?", "a: b") and recipe.schedule.max_steps is None
    assert (recipe.model.revision, recipe.data.system_prompt) == ("123", "a = b")


def test_an_override_reaches_into_a_list() -> None:
    text = GOOD.replace("train.jsonl", "[{path: a.jsonl, weight: 2}, b.jsonl]")
    recipe = read(text, "data.train.0.path=z.jsonl", "data.train.1=c.jsonl")
    assert recipe.data.train == (Source(path="z.jsonl", weight=2.0), Source(path="c.jsonl"))


@pytest.mark.parametrize(
    ("override", "key", "problem", "remedy"),
    [
        ("optim.lr", "optim.lr", "not an override", "write section.key=value, such as optim.lr=1e-4"),
        ("=3", "=3", "not an override", "write section.key=value, such as optim.lr=1e-4"),
        ("optim..lr=3", "optim..lr=3", "not an override", "write section.key=value, such as optim.lr=1e-4"),
        ("optim.lr=[1", "optim.lr", "'[1' is not YAML: expected ',' or ']', but got '<stream end>'", "quote it twice: 'key=\"value\"'"),
        ("optim.lr=fast", "optim.lr", "'fast' should be a valid number", SCALE),
        ("optim.lr=", "optim.lr", "null should be a valid number", SCALE),
        ("optim.beta=1", "optim.beta", UNKNOWN, "did you mean betas?"),
        ("optim={lr: 3, zzz: 1}", "optim.zzz", UNKNOWN, f"keys here: {OPTIM_KEYS}"),
        ("method.kind=qlor", "method.kind", "'qlor' is not one of full, freeze, lora, qlora", "did you mean qlora?"),
        ("parallel.offload_param=true", "parallel.offload_param", "needs ZeRO stage 3, and parallel.zero_stage is 2", "set parallel.zero_stage to 3"),
        ("data.train.0.path=b", "data.train.0.path", "data.train is 'train.jsonl', which has no keys", "data.train=VALUE replaces it"),
        ("name.x=b", "name.x", "name is 'good', which has no keys", "name=VALUE replaces it"),
        ("extends=b.yaml", "extends", UNKNOWN, f"keys here: {SECTIONS}"),
    ],
)  # fmt: skip
def test_faults_of_overrides_say_command_line(override: str, key: str, problem: str, remedy: str) -> None:
    assert faults_of(GOOD, override) == [fault("command line", key, problem, remedy)]


def test_an_override_beyond_the_end_of_a_list() -> None:
    found = faults_of(GOOD.replace("train.jsonl", "[a.jsonl, b.jsonl]"), "data.train.2.path=c.jsonl")
    remedy = "its items are data.train.0 to data.train.1; data.train=[...] replaces it"
    assert found == [fault("command line", "data.train.2.path", "data.train is a list of 2, and 2 is none of its items", remedy)]


def test_a_kind_that_is_overridden_leaves_its_other_keys_to_be_named() -> None:
    found = faults_of(GOOD + "method: {kind: qlora, bits: 4, r: 8}\n", "method.kind=lora")
    assert found == [fault("r.yaml:5", "method.bits", UNKNOWN, f"it is a key of qlora; keys of this kind: {LORA_KEYS}")]


# ------------------------------------------------------------------------------------------------- extends


def lay_over(base: str, over: str) -> Recipe:
    Path("base.yaml").write_text(base)
    return read("extends: base.yaml\n" + over)


def test_mappings_merge_and_the_rest_is_replaced() -> None:
    recipe = lay_over(
        GOOD + "optim: {lr: 1, name: sgd}\nevaluate: {samples: [a, b], max_new_tokens: 5}\nschedule: {epochs: 3, max_steps: 9}\n",
        "name: over\noptim: {lr: 2}\nevaluate: {samples: [c]}\ndata: {seq_len: 9}\nschedule: {max_steps: null}\n",
    )
    assert (recipe.name, recipe.model.name_or_path, recipe.data.train[0].path, recipe.data.seq_len) == (
        "over",
        "some/model",
        "train.jsonl",
        9,
    )
    assert (recipe.optim.lr, recipe.optim.name) == (2.0, "sgd")
    assert (recipe.evaluate.samples, recipe.evaluate.max_new_tokens) == (("c",), 5)
    assert (recipe.schedule.epochs, recipe.schedule.max_steps) == (3.0, None)


@pytest.mark.parametrize(
    ("over", "method"),
    [
        ("method: {r: 4}", QLora(kind="qlora", bits=8, r=4)),
        ("method: {kind: qlora, r: 4}", QLora(kind="qlora", bits=8, r=4)),
        ("method: {kind: lora, alpha: 4}", Lora(kind="lora", alpha=4.0)),
        ("method: {kind: freeze, last_layers: 1}", Freeze(kind="freeze", last_layers=1)),
        ("method: {kind: full}", Full()),
    ],
)
def test_a_method_of_another_kind_replaces_the_method(over: str, method: Any) -> None:
    assert lay_over(GOOD + "method: {kind: qlora, bits: 8, r: 32}\n", over).method == method


def test_a_schedule_of_another_kind_keeps_its_length() -> None:
    """schedule.kind is a key as any other: only a method's keys depend on its kind."""
    schedule = lay_over(GOOD + "schedule: {epochs: 3, max_steps: 9}\n", "schedule: {kind: linear}").schedule
    assert (schedule.kind, schedule.epochs, schedule.max_steps) == ("linear", 3.0, 9)


def test_a_fault_is_told_in_the_file_it_stands_in() -> None:
    Path("base.yaml").write_text(GOOD + "optim: {lr: 1}\nmethod: {kind: qlora, bits: 5}\n")
    assert [(f.where, f.key) for f in faults_of("extends: base.yaml\noptim:\n  lr: fast\n  name: sgd\nzzz: 1\n")] == [
        ("base.yaml:6", "method.bits"),
        ("r.yaml:3", "optim.lr"),
        ("r.yaml:5", "zzz"),
    ]
    Path("base.yaml").write_text(GOOD + "method:\n  kind: qlora\n  bits: 5\n")
    assert faults_of("extends: base.yaml\nmethod: {kind: freeze}\n")[0].where == "r.yaml:2"


def test_a_chain_is_followed_and_its_files_are_beside_each_other() -> None:
    Path("deep").mkdir()
    Path("deep/base.yaml").write_text(GOOD + "seed: 1\n")
    Path("deep/middle.yaml").write_text("extends: base.yaml\nseed: 2\noutput_dir: out\n")
    recipe = read("extends: deep/middle.yaml\nseed: 3\n")
    assert (recipe.name, recipe.seed, recipe.output_dir) == ("good", 3, "out")


def test_a_circle_a_missing_base_and_a_base_that_is_no_path() -> None:
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("a.yaml"))
    (found,) = caught.value.faults
    circle = " → ".join(str(Path(name).resolve()) for name in ("a.yaml", "b.yaml", "a.yaml"))
    assert found == fault("a.yaml:1", "extends", f"a file extends itself: {circle}", "break the circle")
    assert faults_of("name: x\nextends: none.yaml\n") == [
        fault("r.yaml:2", "extends", "no file none.yaml", "the path is relative to this recipe")
    ]
    assert faults_of("extends: [a.yaml, b.yaml]\n") == [
        fault("r.yaml:1", "extends", "['a.yaml', 'b.yaml'] is not a path", "name one YAML file")
    ]


def test_a_base_that_cannot_be_read_is_named() -> None:
    Path("base.yaml").write_text("name: [\n")
    assert faults_of("extends: base.yaml\n")[0].where == "base.yaml:2"
