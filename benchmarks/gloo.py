"""What is measured of several ranks, without what gloo's own threads add to it by chance."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import count
from typing import Any

LET_GO_S = 30
CALL, GONE = "collective called ", "collective gone "
COLLECTIVES = ("allreduce", "reduce", "broadcast", "allgather", "all_gather_single", "reduce_scatter", "reduce_scatter_single")


@contextmanager
def tensors_let_go() -> Iterator[None]:
    """Inside, `wait` on a collective returns once gloo has let go of its tensors.

    gloo's thread holds them a moment longer than the caller waits (ProcessGroupGloo::runLoop drops its work after it marked it
    done): one call in five, measured. A bucket that the engine has freed would be counted, or not, by chance. A profiler is told
    when each call began and ended and when its tensors were gone (`CALL` and `GONE`, with the call's number).
    """
    from torch.distributed import ProcessGroup

    plain = {name: ProcessGroup.__dict__[name] for name in COLLECTIVES}
    numbers = count()
    for name, call in plain.items():
        setattr(ProcessGroup, name, _followed(call, numbers))
    try:
        yield
    finally:
        for name, call in plain.items():
            setattr(ProcessGroup, name, call)


def _followed(call: Callable[..., Any], numbers: Iterator[int]) -> Callable[..., Any]:
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

        number = next(numbers)
        with torch.profiler.record_function(f"{CALL}{number}"):
            work = call(group, *tree_map(lend, args), **tree_map(lend, kwargs))
        return _Followed(work, lent, number)

    return followed


class _Followed:
    """A collective under way, and the tensors it holds."""

    def __init__(self, work: Any, lent: list[Any], number: int) -> None:
        self.work, self.lent, self.number = work, lent, number

    def wait(self, *args: Any) -> bool:
        import torch

        done: bool = self.work.wait(*args)
        self.work = None
        deadline = time.monotonic() + LET_GO_S
        while any(_is_held(self.lent, index) for index in range(len(self.lent))):
            if time.monotonic() > deadline:
                raise TimeoutError(f"gloo held a tensor for {LET_GO_S} s after its collective was done")
            time.sleep(0)
        self.lent = []
        with torch.profiler.record_function(f"{GONE}{self.number}"):
            pass
        return done


def _is_held(tensors: list[Any], index: int) -> bool:
    # The list and the argument are two references; whoever holds it in C++ gives Python's object a third.
    return tensors[index]._use_count() > 1 or sys.getrefcount(tensors[index]) > 2
