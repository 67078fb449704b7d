"""The dry run as it is typed: what it prints, writes and exits with; nothing heavy, no network, nothing from elsewhere in its page."""

from __future__ import annotations

import html.parser
import io
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_cli import HEAVY, invoke

from launcher import view_plan
from launcher.errors import BudgetError
from launcher.gallery import list_recipes
from launcher.html_plan import draw_timeline, make_page
from launcher.plan.budget import COMPONENTS, PHASES, Component, Phase
from launcher.plan.devices import find_device, make_cluster
from launcher.plan.dry_run import DryRun, make_document, make_dry_run
from launcher.plan.plan import make_explained_plan
from launcher.recipe import Recipe
from launcher.units import GIB

ROOT = Path(__file__).parent.parent


def dry_run_of(gpu: str = "a100-40gb", each: int = 4, *, explain: bool = False, **sections: Any) -> DryRun:
    base: dict[str, Any] = {
        "name": "p",
        "model": {"name_or_path": "meta-llama/Llama-3.1-8B-Instruct"},
        "data": {"train": "hub://a/<b>", "seq_len": 4096},
    }
    recipe = Recipe.model_validate_json(json.dumps(base | sections))
    cluster = make_cluster(find_device(gpu), nodes=1, gpus_per_node=each)
    plan, choice = make_explained_plan(recipe, cluster, base_dir="/r", run_dir="/runs/p")
    return make_dry_run(plan, choice if explain else None)


FITS: dict[str, Any] = {"gpu": "h200", "method": {"kind": "lora"}}
TOO_MUCH: dict[str, Any] = {"method": {"kind": "full"}}
OPEN: dict[str, Any] = {"gpu": "rtx-4090", "each": 1, "explain": True, "method": {"kind": "lora", "quantization": "auto"},
                        "parallel": {"zero_stage": "auto", "offload": "auto"}, "memory": {"gradient_checkpointing": "auto"}}  # fmt: skip
CASES = {"fits": FITS, "too much": TOO_MUCH, "open": OPEN}


def printed(dry: DryRun, monkeypatch: pytest.MonkeyPatch, *, width: int, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system="standard" if terminal else None, highlight=False)
    monkeypatch.setattr(view_plan, "make_console", lambda stream: console)
    view_plan.print_dry_run(dry, stream)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("case", CASES)
def test_it_keeps_to_the_width_but_for_the_verdict_and_what_is_copied(
    case: str, width: int, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = dry_run_of(**CASES[case])
    lines = printed(dry, monkeypatch, width=width, terminal=terminal).splitlines()
    verdict, *rest = lines
    assert verdict.startswith(dry.plan.memory.verdict)
    copied = [line for line in rest if "=" in line and line.startswith("  ") and not line.startswith("      ")]
    assert [line for line in rest if len(line.rstrip()) > width and line not in copied] == []
    assert not any(line.rstrip().endswith("…") for line in rest)


def test_every_phase_with_its_figures_and_components(monkeypatch: pytest.MonkeyPatch) -> None:
    dry = dry_run_of(**FITS)
    told = printed(dry, monkeypatch, width=140, terminal=False)
    for phase in dry.plan.memory.phases:
        (line, *_) = [line for line in told.splitlines() if line[2:17].strip() == phase.name]
        assert view_plan.format_bytes(phase.figure("total").p95) in line and line.startswith("▸") == (phase is dry.plan.memory.decisive)
        decides = phase is dry.plan.memory.decisive
        for part in phase.components:
            if decides or part.bytes >= phase.total_bytes / 100:
                assert part.name in told and view_plan.format_bytes(part.bytes) in told
    assert "estimated, not measured" in told and "host memory of a node (4 ranks)" in told and "for the run folder" in told


def test_a_bar_is_as_long_as_its_bytes_and_marks_the_budget() -> None:
    parts = (Component(name="weights", bytes=10 * GIB, provenance="exact"), Component(name="activations", bytes=20 * GIB, provenance="exact"),
             Component(name="CUDA context", bytes=10 * GIB, provenance="assumed", counts_in="total"))  # fmt: skip
    phase = Phase(name="backward", components=parts)
    assert view_plan._draw_bar(phase, 80 * GIB, 80 * GIB, 40, colours=False).plain == "█" * 5 + "▒" * 10 + "░" * 5 + "·" * 20
    assert view_plan._draw_bar(phase, 40 * GIB, 20 * GIB, 40, colours=False).plain == "█" * 10 + "▒" * 10 + "│" + "▒" * 9 + "░" * 10
    assert {name for _, _, names in view_plan.GROUPS.values() for name in names} < set(COMPONENTS)


def test_a_host_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    plan = dry_run_of(**FITS).plan
    small = replace(plan, memory=replace(plan.memory, host_budget=GIB))
    assert small.memory.verdict == "DOES NOT FIT" and "a node needs" in view_plan.describe_verdict(small)
    assert "a node needs" not in view_plan.describe_verdict(plan)


# ------------------------------------------------------------------------------------------------- the page


class Reader(html.parser.HTMLParser):
    """Tags that are open, those that were closed out of turn, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "rect", "line", "path") or f"<{tag}" in ("<rect",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole_and_takes_nothing_from_elsewhere(case: str) -> None:
    dry = dry_run_of(**CASES[case])
    page = make_page(dry)
    reader = Reader(page)
    assert reader.open == []
    assert not [item for item in reader.attributes if item[1] in ("src", "href", "srcset", "action", "data") or "url(" in item[2]]
    assert "<script" not in page and "@import" not in page and "http" not in page.replace("https://", "http")
    for phase in dry.plan.memory.phases:
        assert phase.name.split()[0] in reader.text
    assert dry.plan.memory.verdict in reader.text and "hub://a/<b>" in reader.text, "what a recipe says is text, not markup"
    for note in dry.plan.notes:
        assert note in reader.text
    assert ("What would fit" in reader.text) == (case == "too much")


def test_the_picture_has_every_component_at_its_height() -> None:
    memory = dry_run_of(**FITS).plan.memory
    picture = draw_timeline(memory.phases, memory.budget)
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([0-9.]+)"', picture)]
    sizes = [part.bytes for phase in memory.phases for part in view_plan._in_order(phase)]
    assert len(heights) == len(sizes)
    scale = sum(heights) / sum(sizes)
    assert all(height == pytest.approx(size * scale, abs=0.02) for height, size in zip(heights, sizes, strict=True))
    assert f"budget {view_plan.format_bytes(memory.budget)}" in picture


# ------------------------------------------------------------------------------------------------- the command


def test_the_document_is_the_documented_one() -> None:
    """Every key of --json is in docs/plan.md's table and every key there is in it, phases down to their components."""
    dry = dry_run_of(explain=True, method={"kind": "qlora"}, data={"train": "hub://a/b", "seq_len": 4096, "eval_fraction": 0.1})
    document = make_document(dry)
    table = (ROOT / "docs/plan.md").read_text().split("## The document")[1].split("\n## ")[0]
    documented: set[str] = set()
    for line in table.splitlines():
        if line.startswith("| `"):
            parent = ""
            for key in re.findall(r"`([\w.]+)`", line.split("|")[1]):
                parent = key.partition(".")[0] if not key.startswith(".") else parent
                documented.add(parent + key if key.startswith(".") else key)
    found = {f"{key}.{inner}" if key in ("device", "host", "disk", "network") else key
             for key, value in document.items() for inner in (value if isinstance(value, dict) else ("",))}  # fmt: skip
    assert found == documented
    assert [phase["name"] for phase in document["phases"]] == list(PHASES), "on a GPU with adapters on a quantised base all of them"
    for phase in (*document["phases"], *document["host"]["phases"]):
        assert set(phase) == {"name", "allocated_bytes", "reserved_bytes", "total_bytes", "components"}
        assert all(set(part) == {"name", "bytes", "provenance", "error", "counts_in"} for part in phase["components"])
        assert {part["name"] for part in phase["components"]} <= set(COMPONENTS)


def test_exit_codes_and_the_document_of_each_verdict() -> None:
    for args, code, verdict in (
        (["llama-3.1-8b-qlora", "--gpu", "rtx-4090"], 0, "FITS"),
        (["llama-3.1-8b-full", "--gpu", "t4"], 3, "DOES NOT FIT"),
    ):
        result = invoke(*args, "--dry-run", "--json")
        document = json.loads(result.stdout)
        assert (result.exit_code, document["verdict"]) == (code, verdict)
        assert document["plan"]["cluster"]["accelerator"] == "cuda" and (document["suggestions"] is None) == (code == 0)
        plain = invoke(*args, "--dry-run")
        assert plain.exit_code == code and verdict in plain.stdout and (("what would fit" in plain.stdout) == (code == 3))


def test_a_tight_fit_is_exit_0_with_a_warning() -> None:
    need = json.loads(invoke("llama-3.1-8b-qlora", "batch.micro_batch_size=1", "--gpu", "h100", "--dry-run", "--json").stdout)["device"][
        "total_bytes"
    ]["p95"]
    args = ("llama-3.1-8b-qlora", "batch.micro_batch_size=1", "--gpu", "h100", "--dry-run", "--budget")
    tight = invoke(*args, f"{need + (1 << 20)}B")
    assert tight.exit_code == 0 and tight.stdout.find("TIGHT") >= 0 and "warning: it fits tightly" in tight.stderr
    assert invoke(*args, f"{need - (1 << 20)}B").exit_code == 3
    assert "warning" not in invoke(*args, f"{2 * need}B").stderr


def test_the_ranks_are_those_that_were_asked_for() -> None:
    plan = json.loads(invoke("llama-3.1-8b-full", "--gpu", "h100", "--nodes", 4, "--gpus-per-node", 8, "--dry-run", "--json").stdout)[
        "plan"
    ]
    assert (plan["layout"]["nodes"], plan["layout"]["workers_per_node"], plan["batch"]["data_parallel_size"]) == (4, 8, 32)


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["--gpu", "h100-81gb", "--dry-run"], 5, "did you mean h100-80gb"),
        (["--gpu", "h100-80gb"], 5, "this machine has no GPU"),
        (["--gpu", "h100", "--cluster", "x.yaml", "--dry-run"], 5, "both say what there is"),
        (["--gpus-per-node", 4, "--dry-run"], 5, "--gpu names"),
        (["--budget", 24, "--dry-run"], 2, "'24' is not a size"),
        (["memory.budget=24", "--dry-run"], 2, "such as 24GiB"),
        (["memory.budget=24 bananas", "--dry-run"], 2, "a size with its unit"),
        (["parallel.offload=auto", "parallel.offload_optimizer=true", "--dry-run"], 2, "is chosen by the plan"),
        (["--sweep", "lenght=1,2"], 2, "is no axis"),
        (["--html", "/no/such/folder/p.html"], 2, "cannot be written"),
        (["--gpu", "h100", "--nodes", 3, "--dry-run"], 2, "not divisible by 3 ranks"),
        (["--gpu", "h100", "data.seq_len=9000", "--dry-run"], 2, "longer than the model's 8192 positions"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_said(args: list[object], code: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.cluster.find_gpus", lambda: [])
    result = invoke("smollm2-135m-full", *args)
    assert (result.exit_code, told in result.stderr) == (code, True), result.output


def test_a_sweep_is_a_table_and_a_document() -> None:
    plain = invoke("llama-3.1-8b-lora", "--gpu", "h100", "--sweep", "seq_len=2k,128k", "nodes=1..3", "optim.lr=3e-4")
    assert plain.exit_code == 0 and plain.stdout.count("not divisible") == 2 and "DOES NOT FIT" in plain.stdout
    rows = json.loads(invoke("llama-3.1-8b-lora", "--sweep", "gpu=t4,h200", "zero_stage=2,3", "--json").stdout)["rows"]
    assert [row["at"] for row in rows] == [{"gpu": gpu, "zero_stage": stage} for gpu in ("t4", "h200") for stage in ("2", "3")]
    assert [row["verdict"] for row in rows] == ["DOES NOT FIT"] * 2 + ["FITS"] * 2


def test_html_writes_the_page(tmp_path: Path) -> None:
    result = invoke("qwen3-8b-lora", "--gpu", "l40s", "--html", tmp_path / "p.html")
    assert result.exit_code == 0 and str(tmp_path / "p.html") in result.stdout.replace("\n", "")
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")


def test_a_run_that_cannot_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.cluster.find_gpus", lambda: [("NVIDIA GeForce RTX 4090", 24 << 30, 8.9)])
    result = invoke("llama-3.1-8b-lora", "method={kind: full}", "batch.micro_batch_size=1", "data.seq_len=1024")
    assert result.exit_code == BudgetError.exit_code and "the run does not fit: a GPU needs" in result.stderr
    assert "parallel.offload_param=true" in result.stderr or "method={kind: " in result.stderr
    assert not (tmp_path / "runs").exists()


def test_dry_runs_of_all_shipped_recipes_need_no_network_and_load_nothing_heavy() -> None:
    names = [name for name in list_recipes() if name != "gsm8k-qlora"]  # its data is the user's
    code = f"""
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("a dry run reached for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from typer.testing import CliRunner
from launcher.cli import app
for name in {names!r}:
    answer = CliRunner().invoke(app, [name, "batch.global_batch_size=16", "--gpu", "b200", "--gpus-per-node", "8", "--dry-run"])
    assert answer.exit_code in (0, 3), (name, answer.output)
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == "[]", answer.stderr


def test_a_model_that_is_not_shipped_is_asked_of_the_hub_and_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("llama-3.1-8b-lora", "model.name_or_path=nobody/no-such-model", "--gpu", "h100", "--dry-run")
    assert result.exit_code == 8 and "nobody/no-such-model is neither a folder here nor reachable on the hub" in result.stderr


def test_without_a_network_it_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub would try six times, forty seconds long."""

    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits to try again"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    result = invoke("llama-3.1-8b-lora", "model.name_or_path=nobody/no-such-model", "--gpu", "h100", "--dry-run")
    assert result.exit_code == 8 and "no network here" in result.stderr
