"""Jobs for ranks: what a real training step holds, counted tensor by tensor on the CPU, with DeepSpeed over gloo."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

LET_GO_S = 30
COLLECTIVES = ("allreduce", "reduce", "broadcast", "allgather", "all_gather_single", "reduce_scatter", "reduce_scatter_single")


def measure_training(me: Any, plan: Any, steps: int = 3) -> dict[str, Any]:
    """Job: build the engine and take steps as a run does; live bytes after each part, peaks within it, and what is live at the end."""
    import torch

    from launcher.train.loop import set_lr, take_step
    from launcher.train.loss import sum_token_loss
    from launcher.train.methods import apply_method
    from launcher.train.model import load_base, prepare_weights
    from launcher.train.trace import Trace, watching
    from launcher.train.worker import build_engine

    prepare_weights(plan)
    trace, after = Trace(), {}
    torch.manual_seed(me.rank)
    batch = _make_batch(plan)
    with tensors_let_go(), watching(trace, device="cpu", kernels=False, round_to=1) as watch:
        watch.ignore(batch.values())
        watch.phase = "load"
        model = apply_method(load_base(plan, "cpu"), plan)
        after["load"] = trace.live
        watch.phase = "engine start"
        engine = build_engine(plan, model, me)
        del model
        after["engine start"] = trace.live
        for step in range(1, steps + 1):
            set_lr(engine, 1e-4)
            for _ in range(plan.batch.gradient_accumulation_steps):
                watch.phase = f"forward {step}"
                loss = sum_token_loss(engine, batch)
                watch.phase = f"backward {step}"
                engine.backward(loss)
                del loss
                after[f"backward {step}"] = trace.live
                watch.phase = f"step {step}"
                take_step(engine, _nothing)
                after[f"step {step}"] = trace.live
    sizes = Counter({key: size for key, size in watch.known.items() if size})
    engine.destroy()
    return {"after": after, "peaks": trace.peaks, "storages": sorted(sizes.values(), reverse=True)}


def _make_batch(plan: Any) -> dict[str, Any]:
    import torch

    rows, columns = plan.batch.micro_batch_size, plan.recipe.data.seq_len
    ids = torch.randint(5, plan.shape.vocab_size - 5, (rows, columns))
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(columns).expand(rows, columns).contiguous()}


def _nothing() -> None:
    return None


@contextmanager
def tensors_let_go() -> Iterator[None]:
    """Inside, `wait` on a collective returns once gloo has let go of its tensors.

    gloo's thread holds them a moment longer than the caller waits (ProcessGroupGloo::runLoop drops its work after it marked it
    done): one call in five, measured. A bucket that the engine has freed would be counted, or not, by chance.
    """
    from torch.distributed import ProcessGroup

    plain = {name: ProcessGroup.__dict__[name] for name in COLLECTIVES}
    for name, call in plain.items():
        setattr(ProcessGroup, name, _followed(call))
    try:
        yield
    finally:
        for name, call in plain.items():
            setattr(ProcessGroup, name, call)


def _followed(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def followed(group: Any, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils._pytree import tree_map

        lent: list[Any] = []

        def lend(leaf: Any) -> Any:
            """The same memory as another tensor, which nobody but the collective will hold."""
            if not isinstance(leaf, torch.Tensor):
                return leaf
            alias = leaf.detach()
            lent.append(alias)
            return alias

        return _Followed(call(group, *tree_map(lend, args), **tree_map(lend, kwargs)), lent)

    return followed


class _Followed:
    """A collective under way, and the tensors it holds."""

    def __init__(self, work: Any, lent: list[Any]) -> None:
        self.work, self.lent = work, lent

    def wait(self, *args: Any) -> bool:
        done: bool = self.work.wait(*args)
        self.work = None
        deadline = time.monotonic() + LET_GO_S
        while any(_is_held(self.lent, index) for index in range(len(self.lent))):
            if time.monotonic() > deadline:
                raise TimeoutError(f"gloo held a tensor for {LET_GO_S} s after its collective was done")
            time.sleep(0)
        self.lent = []
        return done


def _is_held(tensors: list[Any], index: int) -> bool:
    # The list and the argument are two references; whoever holds it in C++ gives Python's object a third.
    return tensors[index]._use_count() > 1 or sys.getrefcount(tensors[index]) > 2
