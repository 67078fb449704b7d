"""The command line: what each verb prints, and which exit code each mistake gets.

`run_job` is replaced where a run would start; tests/test_job.py and the quickstart run the real one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_progress import RUN
from typer.testing import CliRunner, Result

from launcher import cluster, errors
from launcher.cli import VERBS, app
from launcher.errors import Fault, LauncherError, RecipeError
from launcher.plan import Plan, load_plan
from launcher.run import RunFolder, write_status

HEAVY = ("torch", "ray", "transformers", "deepspeed", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib", "numpy")


def invoke(*args: object, told: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="lepton-launch", input=told)


def command(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a shell runs it."""
    line = [sys.executable, "-m", "launcher.cli", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe on the tiny model, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"# A tiny run.\nname: tiny\nmodel: {{name_or_path: {tiny / 'model'}}}\nmethod: {{kind: lora, r: 4}}\n"
        f"data: {{train: {tiny / 'train.jsonl'}, eval: {tiny / 'eval.jsonl'}, seq_len: 64}}\ntrack: {{to: []}}\n"
    )
    return path


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that would have been run; each leaves what a run leaves."""
    ran: list[Plan] = []

    def run_job(plan: Plan, show: Callable[[Any], None]) -> None:
        folder = RunFolder(Path(plan.run_dir))
        with folder.metrics.open("w", encoding="utf-8") as file:
            for event in RUN:
                file.write(json.dumps(event) + "\n")
                show(event)
        folder.model.mkdir()
        write_status(folder, "finished")
        ran.append(plan)

    monkeypatch.setattr("launcher.job.local.run_job", run_job)
    return ran


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_job(plan: Plan, show: Callable[[Any], None]) -> None:
        raise error

    monkeypatch.setattr("launcher.job.local.run_job", run_job)


# ------------------------------------------------------------------------------------------------- light to load


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = f"import sys, launcher.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["recipes"], ["recipes", "schema"], ["doctor"], ["no-such-recipe"]])
def test_the_light_verbs_load_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys, atexit
atexit.register(lambda: print("LOADED", [name for name in {HEAVY!r} if name in sys.modules]))
sys.argv[1:] = {args!r}
import launcher.cli
launcher.cli.main()
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.stdout.splitlines()[-1] == "LOADED []"


def test_a_dry_run_of_a_local_model_loads_neither_torch_nor_ray(recipe: Path) -> None:
    code = f"""
import sys, atexit
atexit.register(lambda: print("LOADED", [name for name in {HEAVY!r} if name in sys.modules]))
sys.argv[1:] = [{str(recipe)!r}, "--dry-run"]
import launcher.cli
launcher.cli.main()
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "LOADED []"


# ------------------------------------------------------------------------------------------------- verbs and help


def test_help_names_every_verb() -> None:
    from typer.main import get_command

    told = invoke("--help").output
    assert all(verb in told for verb in VERBS) and set(VERBS) == set(get_command(app).commands)  # type: ignore[attr-defined]
    assert "section.key=value" in told


def test_version() -> None:
    assert invoke("--version").output.startswith("lepton-launch ")


def test_a_wrong_option_is_exit_2() -> None:
    assert command("doctor", "--jsn").returncode == 2


@pytest.mark.parametrize("args", [["{}", "--dry-run"], ["run", "{}", "--dry-run"], ["--dry-run", "{}"]])
def test_the_word_run_may_be_left_out(args: list[str], recipe: Path) -> None:
    result = invoke(*(arg.format(recipe) for arg in args))
    assert result.exit_code == 0, result.output
    assert result.output.startswith("plan       tiny\n")


# ------------------------------------------------------------------------------------------------- run


def test_a_dry_run_prints_the_plan_and_makes_nothing(recipe: Path, jobs: list[Plan]) -> None:
    before = sorted(recipe.parent.iterdir())
    result = invoke(recipe, "optim.lr=3e-4", "--dry-run", "--workers", 2)
    assert "LoRA (r 4, alpha 32, all-linear)" in result.output and "from 0.0003" in result.output
    assert "batch      16 samples a step = micro-batch 8 × accumulation 1 × ranks 2" in result.output
    assert f"run folder {recipe.parent / 'runs' / 'tiny'}" in result.output
    assert sorted(recipe.parent.iterdir()) == before and jobs == []


def test_a_dry_run_for_a_program_is_the_plan(recipe: Path) -> None:
    document = json.loads(invoke(recipe, "--dry-run", "--json").stdout)
    plan = document["plan"]
    assert (
        document["verdict"] == "FITS"
        and plan["recipe"]["name"] == "tiny"
        and plan["layout"]["workers_per_node"] == min(2, len(os.sched_getaffinity(0)))
    )


def test_a_run_leaves_its_recipe_and_its_plan_and_shows_what_it_came_to(recipe: Path, jobs: list[Plan]) -> None:
    result = invoke(recipe, "optim.lr=3e-4")
    assert result.exit_code == 0, result.output
    folder = RunFolder(recipe.parent / "runs" / "tiny")
    assert load_plan(folder.plan) == jobs[0] and jobs[0].run_dir == str(folder.path)
    assert folder.recipe.read_text().endswith(recipe.read_text()) and "#   optim.lr=3e-4" in folder.recipe.read_text()
    for told in (
        "4.0000",
        "3.0000",
        "↓ 25.0%",
        "20.09",
        "Ottoline.",
        "Nobody.",
        "adapter    runs/tiny/model",
        "report     runs/tiny/report.md",
    ):
        assert told in result.output
    assert "lepton-launch generate runs/tiny --prompt 'Who?'" in result.output and "lepton-launch export runs/tiny --merge" in result.output


def test_the_recipe_in_the_run_folder_reads(recipe: Path, jobs: list[Plan]) -> None:
    from launcher.recipe_file import load_recipe

    invoke(recipe)
    given = load_recipe(Path("runs/tiny/recipe.yaml"))
    assert given.data.packing == "auto", "as it was given; the job has what the plan settled"
    assert given.model_copy(update={"data": given.data.model_copy(update={"packing": True})}) == jobs[0].recipe


def test_a_second_run_has_a_folder_of_its_own(recipe: Path, jobs: list[Plan]) -> None:
    invoke(recipe)
    assert "runs/tiny-2" in invoke(recipe).output
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny", "tiny-2"]


def test_a_run_for_a_program_is_one_document_on_stdout(recipe: Path, jobs: list[Plan]) -> None:
    result = invoke(recipe, "--json")
    facts = json.loads(result.stdout)
    assert (facts["before"]["loss"], facts["after"]["loss"], facts["steps"]) == (4.0, 3.0, 20)
    assert facts["samples"] == [{"prompt": "Who?", "before": "Nobody.", "after": "Ottoline."}]
    assert facts["run_dir"] == jobs[0].run_dir and "step 20/20" in result.stderr


def test_a_whole_model_is_not_called_an_adapter(recipe: Path, jobs: list[Plan]) -> None:
    recipe.write_text(recipe.read_text().replace("{kind: lora, r: 4}", "{kind: full}"))
    output = invoke(recipe).output
    assert "model      runs/tiny/model" in output and "--merge" not in output


def test_workers_nodes_and_cluster_reach_the_plan(recipe: Path) -> None:
    file = recipe.parent / "cluster.yaml"
    file.write_text("name: farm\naddress: 10.0.0.1:6379\nnodes: 2\naccelerator: cuda\ndevice_name: H100\nworkers_per_node: 8\n"
                    "cpus_per_node: 64\ndevice_memory: 80000000000\nhost_memory: 800000000000\nbf16: true\n")  # fmt: skip
    plan = json.loads(
        invoke(recipe, "batch.global_batch_size=32", "--cluster", file, "--nodes", 4, "--workers", 2, "--dry-run", "--json").stdout
    )["plan"]
    assert (plan["layout"]["nodes"], plan["layout"]["workers_per_node"], plan["layout"]["dtype"]) == (4, 2, "bf16")


def test_a_machine_with_gpus_can_be_told_to_use_its_cpu(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_gpus", lambda: [("NVIDIA T4", 16 << 30, 7.5)])
    monkeypatch.setattr(cluster, "cpu_has_bf16", lambda: False)
    plan = json.loads(invoke(recipe, "--accelerator", "cpu", "--dry-run", "--json").stdout)["plan"]
    assert (plan["layout"]["backend"], plan["layout"]["dtype"], plan["cluster"]["device_name"]) == ("gloo", "fp32", "CPU")


# ------------------------------------------------------------------------------------------------- what is wrong


def test_each_mistake_has_its_exit_code_and_makes_no_run_folder(recipe: Path, jobs: list[Plan]) -> None:
    broken = recipe.parent / "broken.jsonl"
    broken.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": \n')
    text = recipe.parent / "text.yaml"
    text.write_text("just words\n")
    mistakes: list[tuple[int, list[object], str]] = [
        (2, ["no-such.yaml"], "no such file"),
        (2, ["quikstart"], "did you mean quickstart?"),
        (2, ["exprot", "runs/x"], "did you mean export?"),
        (2, [text], "not a mapping"),
        (2, [recipe, "optim.learning_rate=1"], "unknown key"),
        (2, [recipe, "optim.lr"], "not an override"),
        (2, [recipe, "batch.global_batch_size=3", "--workers", 2], "not divisible by 2 ranks"),
        (2, [recipe, "data.seq_len=100000"], "longer than the model's 256 positions"),
        (2, [recipe, "model.dtype=fp16"], "fp16 needs a GPU"),
        (2, [recipe, f"output_dir={text}"], "no folder can be made"),
        (5, [recipe, "--accelerator", "cuda"], "nvidia-smi"),
        (5, [recipe, "--nodes", 2], "this machine belongs to no Ray cluster"),
        (5, [recipe, "--nodes", "4..2"], "--nodes 4..2"),
        (5, [recipe, "--cluster", "nowhere"], "no such file"),
        (8, [recipe, "data.train=no.jsonl"], "no.jsonl"),
        (8, [recipe, f"data.train={broken}"], "broken.jsonl:2"),
        (8, [recipe, "model.name_or_path=./no-model"], "no file or folder ./no-model"),
    ]
    for code, args, told in mistakes:
        result = invoke(*args)
        assert (result.exit_code, told in result.stderr) == (code, True), f"{args}: {result.exit_code}\n{result.output}"
        assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert not Path("runs").exists() and jobs == []


def test_a_tracker_that_is_not_installed_is_told_before_the_run(recipe: Path, jobs: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else real(name))
    result = invoke(recipe, "track.to=[tensorboard,mlflow]")
    assert result.exit_code == 8 and "mlflow is not installed" in result.stderr and "pip install mlflow" in result.stderr
    assert not jobs and not (recipe.parent / "runs").exists()


def test_a_disk_too_full_for_the_model_is_told_before_the_run(recipe: Path, jobs: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(recipe.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=100))
    result = invoke(recipe)
    assert result.exit_code == 3 and "100 B of disk left" in result.stderr
    assert not Path("runs").exists()


def every_error() -> list[LauncherError]:
    found: list[type[LauncherError]] = [LauncherError]
    for kind in found:
        found += kind.__subclasses__()
    ours = [kind for kind in dict.fromkeys(found) if kind.__module__ == errors.__name__]
    return [
        kind([Fault("r.yaml:3", "optim.lr", "is wrong", "do better")]) if kind is RecipeError else kind("it is wrong", "do better")
        for kind in ours
    ]


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_each_error_reaches_the_shell_as_its_exit_code(error: LauncherError, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(error, monkeypatch)
    plain, for_program = invoke(recipe), invoke(recipe, "--json")
    assert plain.exit_code == for_program.exit_code == error.exit_code
    assert "is wrong" in plain.stderr and "→ do better" in plain.stderr
    facts = json.loads(for_program.stdout)
    assert (facts["error"], facts["exit_code"], facts["remedy"]) == (type(error).__name__, error.exit_code, error.remedy)
    assert "is wrong" in facts["message"]


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_each_error_survives_pickle(error: LauncherError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_the_tree_in_the_docstring_of_errors_is_the_tree() -> None:
    tree = [
        line.translate(str.maketrans("│├└─", "    ")).split() for line in (errors.__doc__ or "").splitlines() if line.startswith("    ")
    ]
    drawn = {words[0]: words[1] for words in tree}
    assert drawn == {type(error).__name__: str(error.exit_code) for error in every_error()}


def test_an_error_nobody_foresaw_is_one_line_and_a_file(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ZeroDivisionError("division by zero"), monkeypatch)
    result = invoke(recipe)
    assert result.exit_code == 1 and result.stderr.startswith("error: ZeroDivisionError: division by zero\n")
    log = Path(result.stderr.split()[-1])
    assert "Traceback" not in result.stderr and "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_a_disk_that_fills_up_here_has_the_code_it_has_there(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(OSError(28, "No space left on device"), monkeypatch)
    assert invoke(recipe).exit_code == 8


def test_ctrl_c_is_130(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert invoke(recipe).exit_code == 130


def test_ctrl_c_at_a_prompt_of_a_real_process_is_130(tmp_path: Path) -> None:
    """While it waits to read the recipe from a pipe that nobody writes to."""
    fifo = tmp_path / "recipe.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen([sys.executable, "-m", "launcher.cli", str(fifo)], stderr=subprocess.PIPE, text=True)
    writer = os.open(fifo, os.O_WRONLY)  # returns once the process reads
    while process.poll() is None:  # one that comes between the opening and the reading is not seen before the reading ends
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    told = process.stderr.read() if process.stderr else ""
    os.close(writer)
    assert process.returncode == 130 and "Traceback" not in told


@pytest.mark.parametrize(("args", "code"), [(["no-such.yaml"], 2), (["generate", "no-such-run"], 8), (["--version"], 0)])
def test_exit_codes_reach_the_shell(args: list[str], code: int, tmp_path: Path) -> None:
    assert command(*args, cwd=tmp_path).returncode == code


def test_a_message_survives_a_terminal_that_knows_only_ascii(tmp_path: Path) -> None:
    answer = command("no-such.yaml", cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert answer.returncode == 2 and "no such file" in answer.stderr and "Traceback" not in answer.stderr


def test_square_brackets_in_a_message_are_kept(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(errors.TrainingError("rank [0]: [bold]x[/bold]"), monkeypatch)
    assert "rank [0]: [bold]x[/bold]" in invoke(recipe).stderr


# ------------------------------------------------------------------------------------------------- the other verbs


def test_data_marks_the_tokens_that_carry_loss(recipe: Path) -> None:
    result = invoke("data", recipe, "--rows", 2)
    assert result.exit_code == 0, result.output
    assert result.output.count("<|im_start|>assistant\n⟦") == result.output.count("<|im_end|>⟧") == 2
    assert "200" in result.output and "lengths in train" in result.output and "lengths in eval" in result.output


def test_data_for_a_program_says_the_same(recipe: Path) -> None:
    facts = json.loads(invoke("data", recipe, "--rows", 3, "--json").stdout)
    assert [split["split"] for split in facts["splits"]] == ["train", "eval"] and len(facts["examples"]) == 3
    for example in facts["examples"]:
        assert [part["loss"] for part in example["parts"]] == [False, True, False]
        question, answer = example["parts"][0]["text"], example["parts"][1]["text"]
        words = question.split("user\n")[1].split("<|im_end|>")[0].split()
        assert answer == " ".join(reversed(words)) + "<|im_end|>"
    for split in facts["splits"]:
        assert sum(bin["count"] for bin in split["histogram"]) == split["stats"]["examples"]
        assert split["histogram"][-1]["longest"] == split["stats"]["max_length"]


def test_data_of_a_bad_recipe_is_told_as_run_tells_it(recipe: Path) -> None:
    assert invoke("data", recipe, "data.train=no.jsonl").exit_code == 8


@pytest.fixture
def finished(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    from test_generate import LORA, finish_run

    monkeypatch.chdir(tmp_path)
    return finish_run(tiny, tmp_path / "runs" / "tiny", LORA)


def test_generate_answers_each_prompt_by_itself(finished: RunFolder) -> None:
    args = ["generate", "tiny", "--prompt", "lamp sea", "--prompt", "lamp sea", "--max-new-tokens", 5]
    facts = json.loads(invoke(*args, "--json").stdout)
    assert [pair["prompt"] for pair in facts] == ["lamp sea", "lamp sea"] and facts[0]["answer"] == facts[1]["answer"]


def test_generate_talks_until_it_is_told_to_stop(finished: RunFolder) -> None:
    result = invoke("generate", "tiny", "--max-new-tokens", 5, told="lamp\n/reset\n\nsea\n/quit\nnever read\n")
    assert result.exit_code == 0 and result.output.count("\n> ") == 5
    assert invoke("generate", "tiny", "--max-new-tokens", 5, told="").exit_code == 0


def test_a_conversation_that_is_too_long_can_go_on_after_a_reset(finished: RunFolder) -> None:
    result = invoke("generate", "tiny", "--max-new-tokens", 5, told="lamp " * 300 + "\n/reset\nlamp\n/quit\n")
    assert result.exit_code == 0 and "start over with /reset" in result.output


def test_generate_needs_a_prompt_for_json(finished: RunFolder) -> None:
    assert invoke("generate", "tiny", "--json").exit_code == 2


def test_a_run_that_failed_is_not_talked_to(finished: RunFolder) -> None:
    write_status(finished, "failed")
    for verb in (["generate", "tiny", "--prompt", "x"], ["export", "tiny"], ["export", "tiny", "--merge"]):
        result = invoke(*verb)
        assert result.exit_code == 8 and "failed" in result.stderr
    assert not (finished.path / "merged").exists()


def test_export_says_where_the_adapter_is_and_merges_it_once(finished: RunFolder) -> None:
    assert "runs/tiny/model" in invoke("export", "tiny").output
    assert json.loads(invoke("export", "tiny", "--merge", "--json").stdout) == {"model": str(finished.path / "merged")}
    assert (finished.path / "merged" / "model.safetensors").is_file()
    again = invoke("export", "tiny", "--merge")
    assert again.exit_code == 8 and "not an empty folder" in again.stderr
    assert invoke("export", "tiny", "--output", "x").exit_code == 2


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("recipes").output == invoke("recipes", "list").output
    assert "quickstart" in json.loads(invoke("recipes", "list", "--json").stdout)
    assert "name: quickstart" in invoke("recipes", "show", "quickstart").output
    assert invoke("recipes", "show", "nope").exit_code == 2
    copied = invoke("recipes", "copy", "quickstart", "mine").output
    assert "mine/quickstart.yaml" in copied and "lepton-launch mine/quickstart.yaml" in copied
    assert (tmp_path / "mine" / "data" / "quickstart" / "train.jsonl").is_file()


def test_the_schema_is_a_schema_and_accepts_the_shipped_recipes() -> None:
    import jsonschema
    from ruamel.yaml import YAML

    from launcher import gallery

    schema = json.loads(invoke("recipes", "schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    for name in gallery.list_recipes():
        jsonschema.validate(YAML(typ="safe").load(gallery.find_recipe(name)), schema)


def test_doctor_is_well_where_the_tests_run() -> None:
    assert invoke("doctor").exit_code == 0
    facts = json.loads(invoke("doctor", "--json").stdout)
    assert facts["ok"] and {finding["health"] for finding in facts["findings"]} <= {"ok", "note", "warning"}


def test_doctor_is_exit_1_where_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher import doctor

    monkeypatch.setattr(doctor, "read_version", lambda name: None)
    result = invoke("doctor")
    assert result.exit_code == 1 and "BROKEN" in result.output and "pip install" in result.output
