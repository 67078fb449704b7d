"""Published readings of GPU memory against what the plan's arithmetic says (benchmarks/readings.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import litgpt, published, readings
from launcher.plan.reductions import sum_of_rows_workspace
from launcher.units import MIB

READINGS = Path(__file__).parent.parent.parent / "shared" / "data" / "measured_peaks.jsonl"
WORST, MEDIAN = {"allocated": 0.05, "reserved": 0.12, "nvidia-smi": 0.12}, {"allocated": 0.02, "reserved": 0.05, "nvidia-smi": 0.05}
"""What issue 3 asks for."""
SCORED = 108
needs_readings = pytest.mark.skipif(
    not READINGS.exists(), reason=f"{READINGS} is not on this machine: readings are no part of the repository"
)


@needs_readings
def test_every_scored_reading_is_as_near_as_the_issue_asks(capsys: pytest.CaptureFixture[str]) -> None:
    """Grade A and B alike; prints the table."""
    scores, left_out = readings.score(READINGS)
    with capsys.disabled():
        print("\n" + readings.describe(scores, left_out))
    assert len(scores) >= SCORED and len(scores) + left_out.total() == 161
    assert not [(s.id, s.error) for s in scores if abs(s.error) > WORST[s.figure]]
    for row in readings.sum_up(scores):
        assert row["median"] <= MEDIAN[row["figure"]] or row["grade"] == "B", row


@needs_readings
def test_what_is_not_scored_has_its_reason() -> None:
    text = readings.describe_unscored(READINGS)
    assert "FSDP" in text and sum(not line.startswith("    ") for line in text.splitlines()) >= 5
    assert sum(line.startswith("    ") for line in text.splitlines()) == 161 - SCORED


HUB = [
    ("google/gemma-2b", 2, 8, True, 16, 12.62),
    ("google/gemma-2b", 2, 8, True, 4, 11.58),
    ("stabilityai/stablelm-base-alpha-3b", 1, 32, False, 16, 8.58),
    ("stabilityai/stablelm-base-alpha-3b", 1, 32, False, 4, 5.24),
]
"""Rows of LitGPT's table (config_hub/finetune/README.md; gigabytes) that are not in the file; nothing was changed for them."""


@pytest.mark.parametrize(("model", "rows", "r", "everywhere", "bits", "peak"), HUB)
def test_readings_that_were_not_in_the_file(model: str, rows: int, r: int, everywhere: bool, bits: int, peak: float) -> None:
    run = litgpt.Training(
        model=litgpt.MODELS[model], rows=rows, columns=512, r=r, bits=bits, double_quant=False, everywhere=everywhere, repeated=True
    )
    assert litgpt.predict(run) / 1e9 == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(("columns", "mib"), [(1024, 16), (2048, 32), (4096, 64), (8192, 108), (16384, 112), (32768, 112)])
def test_the_buffer_of_a_sum_over_rows(columns: int, mib: int) -> None:
    """Of 2,048 rows on an A100's 108 multiprocessors: what Liger's RMSNorm readings have beyond their tensors."""
    assert sum_of_rows_workspace(2048, columns, 108) == mib * MIB


@pytest.mark.parametrize(("rows", "columns"), [(256, 4096), (2048, 4095), (1, 4096)])
def test_few_rows_are_summed_without_a_buffer(rows: int, columns: int) -> None:
    assert sum_of_rows_workspace(rows, columns, 108) == 0


def reading(**fields: Any) -> dict[str, Any]:
    """A QLoRA reading by Hugging Face's Trainer, with some fields of its own."""
    row: dict[str, Any] = {
        "id": "x", "source": "x", "model": "meta-llama/Llama-2-7b-hf", "gpu": "A100-40GB", "n_gpus": 1, "method": "qlora4", "framework": "HF Trainer",
        "weight_dtype": "bf16", "quant": "bnb NF4 (double quant default)", "lora": {"r": 8, "targets": "all"}, "optimizer": "AdamW", "micro_batch": 1,
        "seq_len": 8192, "seq_semantics": "packed", "grad_accum": 4, "grad_ckpt": True, "attn": "flash_attention_2", "sharding": None, "offload": None,
        "loss_kernel": "HF", "compile": None, "peak_metric": "nvidia-smi", "stack": None, "notes": None, "grade": "A", "peak": 12, "peak_unit": "GB",
    }  # fmt: skip
    return row | fields


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"peak_metric": "unknown (rounded to 1 GB)"}, "1"),
        ({"optimizer": None}, "2"),
        ({"sharding": "FSDP2", "n_gpus": 8}, "3"),
        ({"compile": True}, "4"),
        ({"method": "full", "weight_dtype": "fp16 AMP"}, "4"),
        ({"model": "nobody/knows-this"}, "5"),
        ({"model": "component:nothing"}, "3"),
    ],
    ids=str,
)
def test_rules_look_at_the_configuration_alone(fields: dict[str, Any], reason: str | None) -> None:
    told = readings.why_not(reading(**fields))
    assert told is None if reason is None else told is not None and told.startswith(reason)


@pytest.mark.parametrize(("seq_len", "gigabytes"), [(1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19)])
def test_a_plain_trainer_is_near_llama_factorys_table(seq_len: int, gigabytes: int) -> None:
    """Its wiki rounds to a gigabyte and names no metric, so that these are no readings to score; nvidia-smi's is what fits them."""
    assert published.predict(reading(seq_len=seq_len), "nvidia-smi") / 1e9 == pytest.approx(gigabytes, abs=0.55)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("bnb PagedAdamW8bit", "paged_adamw_8bit"),
        ("paged_adamw_32bit", "paged_adamw"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("adamw_hf", "adamw"),
        (None, None),
    ],
)
def test_optimizers_by_their_names_elsewhere(words: str | None, name: str | None) -> None:
    assert published.optimizer_of(reading(optimizer=words)) == name


def test_a_files_rows_are_scored(tmp_path: Path) -> None:
    """The file may be another; a reading whose model is not shipped is left out, and does not stop the rest."""
    nowhere = {"r": 8, "targets": ["q", "v"]}  # Phi makes both with one product
    rows = [reading(id="a"), reading(id="b", model="nobody/knows-this"), reading(id="c", model="microsoft/phi-4", lora=nowhere)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    scores, left_out = readings.score(tmp_path / "rows.jsonl")
    assert [s.id for s in scores] == ["a"] and sorted(reason[0] for reason in left_out) == ["5", "6"]
