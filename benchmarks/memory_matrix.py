"""Cases whose memory is predicted and then measured by real runs under torchrun, without Ray: the part that CPU and GPU share.

A case is a model of random weights in a known geometry, a method, and how it is sharded. It is planned as any recipe is, and run by
launcher.train.worker; memory_cpu.py and memory_gpu.py say which cases there are and what is read.
"""

from __future__ import annotations

import json
import math
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
STEPS = 4
"""The first makes the optimizer's states; ZeRO-3 prefetches from the third on (deepspeed 0.19.8)."""
RANDOM_UP_TO = 4 << 30
"""Bytes of weights. In a larger model matrices are zeros: holes in a sparse file, which a disk of any size takes."""

GEOMETRIES: dict[str, str | dict[str, Any]] = {
    "tiny": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 2048},
    "0.1b": "HuggingFaceTB/SmolLM2-135M",
    "0.4b": "HuggingFaceTB/SmolLM2-360M",
    "1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "3b": "meta-llama/Llama-3.2-3B",
    "8b": "meta-llama/Llama-3.1-8B",
    "70b": "meta-llama/Llama-3.1-70B",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run. `sections` are further sections of its recipe, `env` of its environment."""

    model: str
    method: dict[str, Any] = field(default_factory=lambda: {"kind": "full"})
    dtype: str = "bf16"
    checkpointing: bool = True
    stage: int = 2
    ranks: int = 1
    seq_len: int = 128
    micro_batch_size: int = 1
    micro_steps: int = 1
    sections: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kind = self.method["kind"] + ("-8" if self.method.get("bits") == 8 else "")
        parts = [self.model, kind, self.dtype, f"zero{self.stage}", f"{self.ranks}r", f"{self.micro_batch_size}x{self.seq_len}"]
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [f"accumulate{self.micro_steps}"] if self.micro_steps > 1 else []
        parts += [f"{section}.{key}={value}" for section, keys in self.sections.items() for key, value in keys.items()]
        parts += [value.replace(":", "=") for value in self.env.values()]
        return "-".join(parts)


def config_of(model: str) -> dict[str, Any]:
    from launcher.plan.known import find_known

    geometry = GEOMETRIES[model]
    if isinstance(geometry, dict):
        return geometry
    known = find_known(geometry)
    assert known is not None, geometry
    return {"architectures": ["LlamaForCausalLM"], **known.config}


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder of this geometry, with weights of a tenth of a standard deviation in bf16 and a tokenizer of 1,000 words."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from launcher.plan.shape import shape_of_config

    folder.mkdir(parents=True, exist_ok=True)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    shape = shape_of_config(config, folder / "config.json")
    tensors = {name: weight.shape for block in shape.inventory for name, weight in block.names()}
    sparse = 2 * shape.num_params > RANDOM_UP_TO
    torch.manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        places, end = {}, 0
        for name, sizes in tensors.items():
            places[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [end, end := end + 2 * math.prod(sizes)]}
        header = json.dumps({"__metadata__": {"format": "pt"}, **places}).encode()
        header += b" " * (-len(header) % 8)
        file.write(struct.pack("<Q", len(header)) + header)
        for name, sizes in tensors.items():
            if sparse and len(sizes) > 1 and "embed" not in name:
                file.seek(2 * math.prod(sizes), os.SEEK_CUR)
                continue
            values = torch.ones(sizes) if len(sizes) == 1 else torch.empty(sizes, dtype=torch.bfloat16).normal_(0, 0.02)
            file.write(values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(header) + end)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=1))
    return folder


def write_rows(path: Path, seq_len: int, count: int = 64) -> Path:
    """Pairs of rows that fill a pack of `seq_len` tokens to its end: packed rows need the mask that the plan counts, one long row does not."""
    import random

    rng = random.Random(0)
    longer = seq_len * 5 // 8
    with path.open("w", encoding="utf-8") as file:
        for tokens in (longer, seq_len - longer) * (count // 2):  # the last token of each ends it
            file.write(json.dumps({"text": " ".join(f"w{rng.randrange(3, 1000)}" for _ in range(tokens - 1))}) + "\n")
    return path


def make_plan_of(case: Case, folder: Path, accelerator: Any) -> Any:
    """The case's plan on this machine; its model and data are made in `folder`, its run folder too."""
    from launcher.cluster import find_local_cluster
    from launcher.plan import make_plan
    from launcher.recipe import Recipe

    run_dir = folder / case.name
    (run_dir / "logs").mkdir(parents=True)
    model = write_model(folder / "models" / case.model, config_of(case.model))
    rows = write_rows(run_dir / "rows.jsonl", case.seq_len)
    sections: dict[str, Any] = {
        "name": "memory", "model": {"name_or_path": str(model), "dtype": case.dtype}, "method": case.method,
        "data": {"train": str(rows), "seq_len": case.seq_len},
        "batch": {"global_batch_size": case.micro_batch_size * case.micro_steps * case.ranks, "micro_batch_size": case.micro_batch_size},
        "optim": {"lr": 1e-5}, "schedule": {"kind": "constant", "warmup_ratio": 0.0, "max_steps": STEPS},
        "parallel": {"zero_stage": case.stage}, "memory": {"gradient_checkpointing": case.checkpointing}, "track": {"to": []},
    }  # fmt: skip
    for section, keys in case.sections.items():
        sections[section] = {**sections.get(section, {}), **keys}
    recipe = Recipe.model_validate_json(json.dumps(sections))
    cluster = find_local_cluster(case.ranks, accelerator)
    if accelerator == "cpu":  # a thread a rank, whatever else the machine does
        cluster = cluster.model_copy(update={"cpus_per_node": case.ranks})
    with patch.dict(os.environ, case.env):  # the plan is of the allocator's settings in this environment
        plan = make_plan(recipe, cluster, base_dir=str(folder), run_dir=str(run_dir))
    plan.save(run_dir / "plan.json")
    return plan


def run(
    plan: Any, module: Iterable[str], *, timeout: float = 1800, env: Mapping[str, str] = MappingProxyType({}), stop_early: bool = False
) -> None:
    """The plan's ranks under torchrun; with `stop_early` only until they have compared their memory with the plan: what they would save then,
    a large model's states, takes minutes. Raises RuntimeError with the end of what they said, TimeoutExpired."""
    from launcher.plan.heap import heap_environment

    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={plan.layout.world_size}", "--standalone", *module]
    around = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(plan.layout.threads_per_worker),
        "DS_ACCELERATOR": plan.layout.accelerator,
        **heap_environment(plan.layout.accelerator, os.environ),
    }
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said, env=around | dict(env))
        try:
            stopped = _wait(process, plan.run_dir if stop_early else None, time.monotonic() + timeout)
        except BaseException:
            end_all(process)
            raise
        if process.returncode and not stopped:
            # torchrun's own summary comes last and says nothing of what went wrong
            said.seek(0)
            text = said.read()
            told = [line for line in text.splitlines() if "Error" in line or "→" in line]
            raise RuntimeError("\n".join(told[:10]) or text[-1500:])


def _wait(process: subprocess.Popen[bytes], run_dir: str | None, until: float) -> bool:
    """Wait for its end; True where it was ended because the run in `run_dir` has said what it came for. Raises TimeoutExpired."""
    while process.poll() is None:
        if time.monotonic() > until:
            raise subprocess.TimeoutExpired(process.args, timeout=0)
        if run_dir is not None and any(event["event"] == "memory" for event in read_events(run_dir)):
            end_all(process)
            return True
        time.sleep(0.2)
    return False


def end_all(process: subprocess.Popen[bytes]) -> None:
    """torchrun and its ranks, which have sessions of their own (torch's elastic agent), at once: nothing is saved."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def read_events(run_dir: str) -> list[dict[str, Any]]:
    """What a run has said so far: whole lines."""
    path = Path(run_dir) / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_comparison(run_dir: str) -> dict[str, Any]:
    """The event of the run's own comparison with its plan."""
    events = [event for event in read_events(run_dir) if event["event"] == "memory"]
    if not events:
        raise RuntimeError("the run ended before it compared its memory with the plan")
    return events[-1]


def measure_run(
    case: Case, folder: Path, accelerator: Any, *, timeout: float = 1800, stop_early: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Plan the case, run it, and what the run measured beside what was predicted: of each figure bytes and the prediction's error."""
    plan = make_plan_of(case, folder, accelerator)
    worker = ["-m", "launcher.train.worker", str(Path(plan.run_dir) / "plan.json")]
    try:
        run(plan, worker, timeout=timeout, env=case.env, stop_early=stop_early)
    except RuntimeError as error:
        device = plan.memory.device("total")
        raise RuntimeError(
            f"{error}\n(planned: {plan.memory.verdict}, {device.p50} bytes of {plan.memory.budget}, P95 {device.p95})"
        ) from None
    found = read_comparison(plan.run_dir)
    figures = {
        name: {
            "predicted": f["predicted"],
            "predicted_p95": f["predicted_p95"],
            "measured": f["measured"],
            "error": f["predicted"] / f["measured"] - 1,
        }
        for name, f in found["figures"].items()
    }
    # The most that was allocated until the engine stood: whether each rank had the whole model, as the plan has it for loading or not.
    building = [phase.allocated_bytes for phase in plan.memory.phases if phase.name in ("load", "engine start")]
    built = {"predicted": max(building), "measured": found["built_peak_bytes"]} if accelerator == "cuda" else None
    return plan, {**case_facts(case), "verdict": plan.memory.verdict, "figures": figures, "built": built}


def describe(row: dict[str, Any]) -> str:
    told = "  ".join(
        f"{n} {f['predicted'] / 2**20:.1f} of {f['measured'] / 2**20:.1f} MiB {f['error']:+.1%}" for n, f in row["figures"].items()
    )
    return f"{row['name']:62} {told}"


def describe_machine() -> dict[str, Any]:
    from launcher.versions import read_versions

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.machine()
    )
    return {"machine": {"cpu": cpu, "cores": os.cpu_count()}, "versions": read_versions()}


def save_results(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**describe_machine(), **facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def case_facts(case: Case) -> dict[str, Any]:
    return {"name": case.name, **asdict(case)}
