"""Predicted against measured memory of real training on this machine's GPU, under torchrun and without Ray.

    python benchmarks/memory_gpu.py [--only NAME ...] [--seconds N] [--out FILE] [--again]

Models of random weights from 0.1B to 8B, and 70B in 4 bits (of 3B on the matrices are zeros in a sparse file: the bytes are the same). Each
case gives torch's max_memory_allocated and max_memory_reserved and the driver's figure for the device beside the plan's, after three steps.
Before them it asks what shared/MEMORY.md §4.4 leaves open (gpu_questions.py). Every answer and every row is written as it comes to
benchmarks/results/memory-gpu.json, and what stands there is not done again: call it as often as it takes. The cases that tell most come
first, and with --seconds none is begun that may not end in time. docs/gpu-check.md says how to run it on a machine that has torch and no network.
`--accelerator cpu` rehearses all of it on tiny models. This was written where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_questions import QUESTIONS, Question, ask
from benchmarks.memory_matrix import RESULTS, Case, case_facts, describe, measure_run, save_results

FULL, LORA, QLORA, QLORA_8 = {"kind": "full"}, {"kind": "lora", "r": 16}, {"kind": "qlora", "r": 16}, {"kind": "qlora", "r": 16, "bits": 8}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
OFFLOAD = {"parallel": {"offload_optimizer": True}}
FIRST = [
    Case(model="0.1b", seq_len=1024),
    Case(model="8b", method=LORA, seq_len=2048),
    Case(model="8b", method=QLORA, stage=3, seq_len=2048),
    Case(model="1.1b", stage=3, seq_len=2048),
    Case(model="8b", method=QLORA, seq_len=8192),
    Case(model="1.1b", seq_len=2048),
    Case(model="1.1b", seq_len=2048, env=EXPANDABLE),
    Case(model="1.1b", method=QLORA_8, seq_len=2048),
    Case(model="1.1b", stage=0, seq_len=2048),
    Case(model="8b", method=LORA, stage=3, seq_len=8192),
    Case(model="8b", method=LORA, seq_len=8192, env=EXPANDABLE),
    Case(model="1.1b", stage=3, seq_len=2048, sections=OFFLOAD),
    Case(model="0.1b", seq_len=8192, checkpointing=False),
    Case(model="3b", stage=3, seq_len=2048),
    *(Case(model="0.1b", sections={"model": {"liger_kernel": liger}}, seq_len=2048) for liger in (True, False)),
    Case(model="1.1b", seq_len=2048, sections={"model": {"loss": "chunked"}}),
]
"""What tells most: each term of the plan in a case where it is large."""
ALL = [
    *FIRST,
    *(Case(model="0.1b", method=method, stage=stage, checkpointing=checkpointing, seq_len=1024)
      for method in (FULL, LORA, QLORA) for stage in (0, 1, 2, 3) for checkpointing in (True, False)),
    *(Case(model="0.1b", seq_len=seq_len, micro_batch_size=rows) for seq_len, rows in ((512, 8), (2048, 1), (8192, 1))),
    *(Case(model="1.1b", method=method, stage=stage, seq_len=2048) for method in (FULL, LORA, QLORA, QLORA_8) for stage in (2, 3)),
    *(Case(model="3b", method=method, stage=stage, seq_len=2048) for method in (FULL, LORA, QLORA) for stage in (2, 3)),
    *(Case(model="8b", method=method, stage=stage, seq_len=seq_len)
      for method in (LORA, QLORA) for stage in (2, 3) for seq_len in (2048, 8192)),
    Case(model="70b", method=QLORA, stage=3, seq_len=2048), Case(model="70b", method=QLORA, stage=2, seq_len=2048),
]  # fmt: skip
CASES = list({case.name: case for case in ALL}.values())
REHEARSED = [
    Case(model="tiny"),
    Case(model="tiny", sections={"memory": {"budget": "300MiB"}}),
    Case(model="tiny", method=QLORA, stage=3),
    Case(model="tiny", env=EXPANDABLE),
]
"""On a CPU. The second passes its budget when it has imported torch: it must be a row like the others."""
LIMIT_S = {"70b": 420.0}
USUAL_LIMIT_S = 150.0
"""Seconds that a case may take; its process is ended then."""


def read_results(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answers and rows of an earlier call; none where there was none."""
    if not path.exists():
        return [], []
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.get("answers", []), found.get("rows", [])


def run_all(
    cases: list[Case],
    folder: Path,
    out: Path,
    *,
    accelerator: str = "cuda",
    seconds: float | None = None,
    questions: Iterable[Question] = QUESTIONS,
) -> list[dict[str, Any]]:
    """The rows of the cases, each written as it comes. What fails (out of memory, a package that is not there) is a row that says so."""
    began = time.monotonic()
    answers, rows = read_results(out)

    def left(limit: float) -> bool:
        return seconds is None or time.monotonic() - began + limit <= seconds

    def save() -> None:
        save_results(out, rows, benchmark=f"memory on {accelerator}", device=_name_device(), answers=answers)

    for question in questions:
        if question.name not in {answer["question"] for answer in answers} and left(30):
            answers.append(ask(question))
            print(json.dumps(answers[-1]), flush=True)
            save()
    done = {row["name"] for row in rows}
    for case in cases:
        limit = LIMIT_S.get(case.model, USUAL_LIMIT_S)
        if case.name in done or not left(limit / 2):
            continue
        started = time.monotonic()
        row = _try_case(case, folder, accelerator, limit if seconds is None else min(limit, seconds - (started - began)))
        rows.append({**row, "seconds": round(time.monotonic() - started, 1)})
        print(describe(row) if "figures" in row else f"{case.name}: failed: {row['failed'][:300]}", flush=True)
        save()
        shutil.rmtree(folder / case.name, ignore_errors=True)
    missing = [case.name for case in cases if case.name not in {row["name"] for row in rows}]
    print(f"{len(cases) - len(missing)} of {len(cases)} cases are done" + (f"; the next is {missing[0]}" if missing else ""), flush=True)
    return rows


def _try_case(case: Case, folder: Path, accelerator: str, limit: float) -> dict[str, Any]:
    from launcher.errors import LauncherError

    try:
        return measure_run(case, folder, accelerator, timeout=limit, stop_early=True)[1]
    except (RuntimeError, LauncherError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        return {**case_facts(case), "failed": f"{type(error).__name__}: {error}"[:1500]}


def _name_device() -> str:
    from launcher.cluster import find_gpus

    return next((name for name, *_ in find_gpus()), "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name has one of these in it")
    parser.add_argument("--seconds", type=float, help="end within so many seconds; call it again for the rest")
    parser.add_argument("--again", action="store_true", help="forget what the file has of these cases")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory-gpu.json")
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses on tiny models")
    args = parser.parse_args()
    cases = [
        case for case in (CASES if args.accelerator == "cuda" else REHEARSED) if not args.only or any(w in case.name for w in args.only)
    ]
    if args.again and args.out.exists():
        found = json.loads(args.out.read_text(encoding="utf-8"))
        found["rows"] = [row for row in found["rows"] if row["name"] not in {case.name for case in cases}]
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        run_all(cases, Path(folder), args.out, accelerator=args.accelerator, seconds=args.seconds)


if __name__ == "__main__":
    main()
