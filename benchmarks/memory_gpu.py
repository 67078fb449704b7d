"""Predicted against measured memory of real training on this machine's GPU, under torchrun and without Ray.

    python benchmarks/memory_gpu.py [--only NAME ...] [--out FILE]

Models of random weights from 0.1B to 8B, and 70B in 4 bits (of that the matrices are zeros in a sparse file: the bytes are the same). Each
case gives torch's max_memory_allocated and max_memory_reserved and the driver's figure for the device beside the plan's. Before them it
measures what shared/MEMORY.md §4.4 leaves open: the context, cuBLAS' workspace, NCCL, pinned memory's rounding, LLM.int8()'s first copies.
benchmarks/results/memory-gpu.json has the last run. This was written where there is no GPU: its matrix code is memory_cpu.py's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory_matrix import RESULTS, Case, case_facts, describe, measure_run, save_results

FULL, LORA, QLORA, QLORA_8 = {"kind": "full"}, {"kind": "lora", "r": 16}, {"kind": "qlora", "r": 16}, {"kind": "qlora", "r": 16, "bits": 8}
CASES = [
    *(Case(model="0.1b", method=method, stage=stage, checkpointing=checkpointing, seq_len=1024)
      for method in (FULL, LORA, QLORA) for stage in (0, 1, 2, 3) for checkpointing in (True, False)),
    *(Case(model="0.1b", seq_len=seq_len, micro_batch_size=rows) for seq_len, rows in ((512, 8), (2048, 1), (8192, 1))),
    *(Case(model="0.1b", sections={"model": {"liger_kernel": liger}}, seq_len=2048) for liger in (True, False)),
    *(Case(model="1.1b", method=method, stage=stage, seq_len=2048) for method in (FULL, LORA, QLORA, QLORA_8) for stage in (2, 3)),
    *(Case(model="3b", method=method, stage=stage, seq_len=2048) for method in (FULL, LORA, QLORA) for stage in (2, 3)),
    *(Case(model="8b", method=method, stage=stage, seq_len=seq_len)
      for method in (LORA, QLORA) for stage in (2, 3) for seq_len in (2048, 8192)),
    Case(model="8b", stage=3, seq_len=2048, sections={"parallel": {"offload_optimizer": True}}),
    Case(model="70b", method=QLORA, stage=2, seq_len=2048), Case(model="70b", method=QLORA, stage=3, seq_len=2048),
]  # fmt: skip


def measure_constants() -> dict[str, Any]:
    """The open questions, each in a process of its own."""
    calibrated = subprocess.run([sys.executable, "-m", "launcher.train.calibrate", "cuda"], capture_output=True, text=True, check=True)
    return {**json.loads(calibrated.stdout.splitlines()[-1]), **{name: _ask(code) for name, code in QUESTIONS.items()}}


def _ask(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 and done.stdout else done.stderr[-500:]


QUESTIONS = {
    "pinned memory of 3 times 100 MiB (rounded to 128 MiB each?)": """
import json, torch
from launcher.train.budget import read_resident
torch.zeros(1, device="cuda")
before = read_resident()
held = [torch.ones(100 << 20, dtype=torch.uint8, pin_memory=True) for _ in range(3)]
stats = {name: size for name, size in torch.cuda.host_memory_stats().items() if name.endswith("bytes.current")}
print(json.dumps({"resident": read_resident() - before, **stats}))
""",
    "LLM.int8() linear of 4096 x 4096, 1024 tokens: bytes before, after, at most": """
import json, torch, bitsandbytes as bnb
layer = bnb.nn.Linear8bitLt(4096, 4096, bias=False, has_fp16_weights=False).cuda()
rows = torch.randn(1024, 4096, dtype=torch.float16, device="cuda", requires_grad=True)
before = torch.cuda.memory_allocated()
layer(rows).sum().backward()
print(json.dumps([before, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()]))
""",
}


def run_cases(cases: list[Case], folder: Path, out: Path, accelerator: str = "cuda", **facts: Any) -> list[dict[str, Any]]:
    """Each case's row, written as it comes. What fails (out of memory, a package that is not there) is a row that says so."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        try:
            rows.append(measure_run(case, folder, accelerator)[1])
            print(describe(rows[-1]), flush=True)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            rows.append({**case_facts(case), "failed": str(error)[:1500]})
            print(f"{case.name}: failed: {str(error)[:300]}", flush=True)
        save_results(out, rows, benchmark=f"memory on {accelerator}", **facts)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name has one of these in it")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory-gpu.json")
    args = parser.parse_args()
    cases = [case for case in CASES if not args.only or any(word in case.name for word in args.only)]
    with tempfile.TemporaryDirectory() as folder:
        run_cases(cases, Path(folder), args.out, constants=measure_constants())


if __name__ == "__main__":
    main()
