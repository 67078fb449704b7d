"""The harness of `make gpu-check`, as far as it goes without a GPU: what fails costs nothing else, and what is done is not done again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.gpu_questions import Question, ask
from benchmarks.memory_gpu import CASES, FIRST, run_all
from benchmarks.memory_matrix import Case, config_of, end_all
from launcher.plan.known import find_known


def test_a_question_that_fails_is_an_answer_and_none_is_asked_twice(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    questions = [Question(name="sum", expected="2", code="print(1 + 1)"), Question(name="abort", expected="", code="import os; os.abort()")]
    assert run_all([], tmp_path, out, questions=questions) == []
    answers = json.loads(out.read_text())["answers"]
    assert answers[0]["answer"] == 2 and answers[1]["failed"].startswith("exit -6")
    run_all([], tmp_path, out, questions=[Question(name="sum", expected="3", code="print(3)")])
    assert json.loads(out.read_text())["answers"] == answers
    assert "failed" in ask(Question(name="no json", expected="", code="print('what')"))


def test_a_case_that_fails_is_a_row_and_the_next_call_goes_on_after_it(tmp_path: Path) -> None:
    out, model = tmp_path / "out.json", tmp_path / "models/tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(config_of("tiny")))  # so that none is made
    cases = [Case(model="tiny", dtype="fp16", seq_len=length) for length in (64, 128)]  # no CPU trains in fp16
    rows = run_all(cases[:1], tmp_path, out, accelerator="cpu", questions=())
    assert [row["name"] for row in rows] == [cases[0].name] and rows[0]["failed"].startswith("RecipeError")
    rows = run_all(cases, tmp_path, out, accelerator="cpu", questions=(), seconds=0)
    assert len(rows) == 1, "no time is left for the second"
    rows = run_all(cases, tmp_path, out, accelerator="cpu", questions=())
    assert [row["name"] for row in rows] == [case.name for case in cases] and json.loads(out.read_text())["rows"] == rows


def test_ranks_are_ended_with_torchrun_though_their_sessions_are_their_own() -> None:
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True).wait()"
    process = subprocess.Popen([sys.executable, "-c", child])
    whole = psutil.Process(process.pid)
    for _ in range(200):
        if children := whole.children(recursive=True):
            break
        time.sleep(0.05)
    end_all(process)
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert gone and not alive


def test_the_cases_are_told_apart_and_their_models_are_shipped() -> None:
    assert CASES[: len(FIRST)] == FIRST and len({case.name for case in CASES}) == len(CASES) > 40
    assert find_known("meta-llama/Llama-3.1-70B") is not None
