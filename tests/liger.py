"""liger-kernel where there is no GPU: its own Python code, around Triton kernels that do nothing.

A Triton kernel allocates nothing: it writes over tensors that Python gave it. So a trace on the meta device sees all that Liger's functions
take, once `triton` is a stand-in and tensors on the meta device pass for CUDA's, an H100's.

The library lies in a folder of its own (`make dev`), where neither a plan nor a run takes it for installed.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from launcher.plan.fused import PROGRAMS
from launcher.plan.workload import Workload

FOLDER = Path(sys.prefix) / "share" / "liger"


class _Anything(ModuleType):
    """A module or kernel in which every name is found, and whose calls do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None

    def __getitem__(self, grid: Any) -> Any:
        return self


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports triton and all in it as a stand-in."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "triton" else None

    def create_module(self, spec: Any) -> ModuleType:
        module: Any = _Anything(spec.name)
        module.__version__ = "3.6.0"
        if spec.name == "triton.language":
            module.constexpr = _Constant
        if spec.name == "triton":
            module.jit = module.heuristics = module.autotune = _decorate
            module.cdiv = lambda a, b: -(-a // b)
            module.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Constant:
    def __init__(self, value: Any) -> None:
        self.value = value


def _decorate(function: Any = None, *args: Any, **options: Any) -> Any:
    """A kernel that does nothing; or, called with options alone, what makes one."""
    return _Anything(function.__name__) if callable(function) else _decorate


class _OnMeta(importlib.machinery.SourceFileLoader):
    """A file of Liger's, which takes the meta device for CUDA."""

    def get_data(self, path: str) -> bytes:
        code = super().get_data(path)
        return re.sub(rb'(device\.type [!=]=) "cuda"', rb'\1 "meta"', code) if path.endswith(".py") else code

    def path_stats(self, path: str) -> Any:
        raise OSError("compiled anew, as what is cached is not what is run")


class _LigersFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "liger_kernel":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path or [str(FOLDER)], target)
        if spec is not None and spec.origin is not None:
            spec.loader = _OnMeta(name, spec.origin)
        return spec


class _H100:
    multi_processor_count = PROGRAMS


def put_in_place() -> None:
    """For good in this process. The library's source is read as it is but for the device it asks about."""
    assert (FOLDER / "liger_kernel").is_dir(), f"liger-kernel is not in {FOLDER}; make dev puts it there"
    import torch
    import transformers  # noqa: F401  asks whether there is a triton

    sys.meta_path[:0] = [_LigersFinder(), _Finder()]  # type: ignore[list-item]
    torch.cuda.get_device_properties = lambda *args: _H100()
    torch.equal = lambda a, b: False  # of values, which meta tensors have not


def trace(work: Workload, *, keep: bool = True, stand_in: bool = False, trains: bool = True) -> dict[str, int]:
    """The peaks of a micro-step of two layers, with Liger's own loss and layers where the workload has them; or the launcher's stand-in's loss."""
    import torch

    from launcher.train import profiling
    from launcher.train.methods import lay_liger_kernels

    before: dict[str, Any] = {}

    def lay(model: Any, work: Workload) -> Any:
        trained = laid(model, work)
        if work.fused:  # some of it is for the whole of transformers' module
            before.update(vars(sys.modules[type(model).__module__]))
            lay_liger_kernels(model)
        return trained

    torch.set_num_threads(1)
    torch.cuda.get_device_capability = lambda *args: (9, 0) if work.sums_in_place else (7, 5)
    laid, fused = profiling._lay_method, profiling.fused_loss
    profiling._lay_method, profiling.fused_loss = lay, fused if stand_in else None
    try:
        return profiling.trace_layers(work, 2, keep_gradients=keep, trains=trains).peaks
    finally:
        profiling._lay_method, profiling.fused_loss = laid, fused
        if before:
            vars(sys.modules[before["__name__"]]).update(before)


@contextlib.contextmanager
def tracing() -> Iterator[ProcessPoolExecutor]:
    """A process in which Liger is in place."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=put_in_place) as process:
        yield process
