"""What shared/MEMORY.md §4.4 leaves open and one GPU can answer: each question is a process of its own, so that none takes another's answer along.

The answers are the list `answers` of benchmarks/results/memory-gpu.json. Three more are answered by rows of the same file: ZeRO-3 with 4 bits at
run time (rows of qlora and zero3: `built`), what expandable segments change (rows with PYTORCH_CUDA_ALLOC_CONF), and what lies outside of the
allocator in a run (`device total` less `reserved`). One GPU cannot tell what NCCL takes between two. What needs no GPU (the tables of papers) is no
question here, and neither is what the launcher has not: tensor, pipeline and expert parallelism, torch.compile, CUDA graphs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

LIMIT_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`code` prints its answer as the last line, in JSON. `expected` is what the plan has for it."""

    name: str
    expected: str
    code: str
    sees_gpu: bool = True


USED = """
import json, torch
def used():
    free, total = torch.cuda.mem_get_info()
    return total - free
"""

QUESTIONS = (
    Question(
        name="CUDA context: bytes of the device beside torch's, after a first kernel and after a product",
        expected="500 MiB ± 40 % (plan/memory.py, Overheads.context)",
        code=USED
        + """
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
first = used() - torch.cuda.memory_reserved()
left = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
left @ left
torch.cuda.synchronize()
print(json.dumps({"kernel": first, "product": used() - torch.cuda.memory_reserved()}))
""",
    ),
    Question(
        name="cuBLAS workspace: bytes allocated by a first product, and by a first product in the backward pass",
        expected="32 MiB each on an H100, 8.125 MiB before Hopper (plan/memory.py, Overheads.library_workspace)",
        code=USED
        + """
left = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
held = torch.cuda.memory_allocated()
product = left @ left.detach()
forward = torch.cuda.memory_allocated() - held - product.nbytes
product.sum().backward()
torch.cuda.synchronize()
print(json.dumps({"forward": forward, "both": torch.cuda.memory_allocated() - held - product.nbytes - left.grad.nbytes - 512}))
""",
    ),
    Question(
        name="NCCL: bytes of a communicator over this machine's GPUs (beside the context and cuBLAS as lepton-launch calibrate has them)",
        expected="400 MiB ± 100 % (plan/memory.py, Overheads.nccl)",
        code="""
import json
from launcher.train.calibrate import measure_cuda
print(json.dumps(measure_cuda()["bytes"]))
""",
    ),
    Question(
        name="pinned memory: resident bytes of three blocks of 100 MiB",
        expected="128 MiB each: rounded up to a power of two (plan/host.py)",
        code="""
import json, torch
from launcher.train.budget import read_resident
torch.zeros(1, device="cuda")
before = read_resident()
held = [torch.ones(100 << 20, dtype=torch.uint8).pin_memory() for _ in range(3)]
stats = {name: size for name, size in torch.cuda.host_memory_stats().items() if name.endswith("bytes.current")}
print(json.dumps({"resident": read_resident() - before, **stats}))
""",
    ),
    Question(
        name="LLM.int8() of 4096 × 4096: bytes allocated before a first step, after it, at most, and at most in a second (1,024 tokens)",
        expected="weights of 16 MiB once; 6 bytes an input's element and 8 an output's for a moment (plan/linears.py)",
        code="""
import json, torch, bitsandbytes as bnb
layer = bnb.nn.Linear8bitLt(4096, 4096, bias=False, has_fp16_weights=False).cuda()
rows = torch.randn(1024, 4096, dtype=torch.float16, device="cuda", requires_grad=True)
told = [torch.cuda.memory_allocated()]
for step in range(2):
    torch.cuda.reset_peak_memory_stats()
    layer(rows).sum().backward()
    told += [torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()]
print(json.dumps(dict(zip(("before", "after", "peak", "after the second", "peak of the second"), told))))
""",
    ),
    Question(
        name="fake CUDA tensors of a CUDA build that sees no GPU: a differentiable operator",
        expected="a CPU build aborts the process (MEMORY.md §1.3); the launcher traces on the meta device and relies on neither",
        sees_gpu=False,
        code="""
import json, torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    weight = torch.empty(8, 8, device="cuda", requires_grad=True)
    (weight @ weight).sum().backward()
    print(json.dumps({"works": str(weight.grad.device)}))
""",
    ),
)


def ask(question: Question) -> dict[str, Any]:
    """The answer, or what came in its place."""
    asked = {"question": question.name, "expected": question.expected}
    around = os.environ | ({} if question.sees_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    words = [sys.executable, "-c", question.code]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=around)
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            return {**asked, "answer": json.loads(lines[-1])}
    except (subprocess.TimeoutExpired, ValueError) as error:
        return {**asked, "failed": str(error)[:500]}
    return {**asked, "failed": f"exit {done.returncode}: {done.stderr.strip()[-500:]}"}
