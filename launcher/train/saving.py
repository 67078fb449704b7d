"""Saving while training goes on: values are copied to host memory beside the next forward and backward pass, then
written, hashed and committed by a thread.

    after step n   save(): which tensors to keep; random states are copied
    step n + 1     forward and backward; meanwhile the thread copies masters and optimizer states to host memory
                   settle(): waits for that copy, because the update changes them
    later          the thread writes the shard and its manifest; on rank 0 it waits for all manifests, commits, prunes

The thread makes no collective calls. What ranks must agree on (a save is due, a save failed) goes through the loop's
own all-reduce, once a step.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint.commit import Commit, delete_step, prune, step_folder, wait_for_manifests, write_commit
from launcher.checkpoint.lease import Lease
from launcher.checkpoint.shard import Piece, write_shard
from launcher.checkpoint.storage import Storage
from launcher.errors import CheckpointError
from launcher.plan import Plan
from launcher.run import Event
from launcher.train.fragments import SAFETENSORS_DTYPE, Source, count_bytes, list_best, list_sources, read_loss_scale
from launcher.train.randomness import list_random_states
from launcher.train.state import TrainState
from launcher.versions import read_versions

ALIGNMENT = 64
"""Bytes between the starts of tensors in the staging area: what a vector copy likes."""


class Saver:
    """The saves of one rank of a run. Every rank calls every method equally often and in the same order."""

    def __init__(
        self,
        plan: Plan,
        engine: Any,
        storage: Storage,
        *,
        lease: Lease | None,
        identity: dict[str, Any],
        total_steps: int,
        best_weights: Callable[[], dict[str, torch.Tensor]],
        report: Callable[[Event], None],
    ) -> None:
        self._plan, self._engine, self._storage, self._lease = plan, engine, storage, lease
        self._identity, self._total_steps, self._best_weights, self._report = identity, total_steps, best_weights, report
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._session = _agree(secrets.token_hex(6))
        # Once: reading the packages' metadata takes longer than all else that a save does on this thread.
        self._versions, self._plan_digest = read_versions(), plan.digest
        self._began = self._saved_at = time.monotonic()
        self._train_s_before = 0.0
        self._saved_step = self._committed_step = 0
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._staged, self._written, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._stall_s = 0.0
        self._outcome: Event | None = None

    def resume_at(self, state: TrainState) -> None:
        """Count on from a loaded state: its step is saved already."""
        self._saved_step = self._committed_step = state.step
        self._train_s_before = state.train_s
        self._began = self._saved_at = time.monotonic()

    @property
    def train_s(self) -> float:
        """Seconds of training so far, over all sessions of the run."""
        return self._train_s_before + time.monotonic() - self._began

    def votes(self) -> tuple[float, float]:
        """What this rank adds to the step's all-reduce: whether the clock asks for a save, and whether a save failed here."""
        minutes = self._plan.recipe.save.every_minutes
        due = self._rank == 0 and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return float(due), float(self._error is not None)

    def settle(self) -> None:
        """Wait until the last save has its copy of the values that the optimizer is about to change."""
        if self._thread is not None and not self._staged.is_set():
            began = time.perf_counter()
            self._staged.wait()
            self._stall_s += time.perf_counter() - began

    def after_step(self, state: TrainState, *, due: bool, failed: bool, last: bool) -> None:
        """Save if it is time; `due`, `failed` and `last` are the same on every rank. The last save is waited for."""
        if failed:
            self._finish()
        self._tell()
        wanted = self._plan.recipe.save
        if wanted.every_steps is not None and state.step % wanted.every_steps == 0:
            due = True
        if wanted.keep_best and state.best_step == state.step:
            due = True
        if (due or last) and state.step > self._saved_step:
            self._save(state)
        if last:
            self.finish()

    def describe_last(self) -> str:
        """What a stopped run can go on from."""
        if self._committed_step:
            return f"saved at step {self._committed_step}: the same command goes on from there"
        return "nothing could be saved: the same command starts over"

    def _save(self, state: TrainState) -> None:
        self.finish()
        began = time.perf_counter()
        self._saved_step, self._saved_at = state.step, time.monotonic()
        state = replace(state, train_s=self.train_s)
        sources, scalars = list_sources(self._engine)
        sources += list_best(self._engine, self._best_weights()) + list_random_states()
        scalars |= read_loss_scale(self._engine)
        for event in (self._staged, self._written, self._abandoned):
            event.clear()
        commit = self._make_commit(state, scalars)
        self._thread = threading.Thread(target=self._work, args=(sources, commit, _make_stream(sources)), name="checkpoint", daemon=True)
        self._thread.start()
        self._stall_s = time.perf_counter() - began

    def _make_commit(self, state: TrainState, scalars: dict[str, Any]) -> Commit:
        return Commit(
            step=state.step,
            world_size=self._ranks,
            zero_stage=self._plan.layout.zero_stage,
            attempt=f"{self._session}-{state.step}",
            time=time.time(),
            plan_digest=self._plan_digest,
            optimizer=self._plan.recipe.optim.name,
            scalars=scalars,
            state=state.to_dict(),
            identity=self._identity,
            shards=(),
            total_steps=self._total_steps,
            best_step=state.best_step,
            origin=self._plan.run_dir,
            base_model=self._plan.recipe.model.name_or_path,
            versions=self._versions,
        )

    # ------------------------------------------------------------------------------------------- on the thread

    def _work(self, sources: list[Source], commit: Commit, stream: Any) -> None:
        began = time.perf_counter()
        try:
            try:
                pieces = self._stage(sources, stream)
            finally:
                self._staged.set()
            write_shard(self._storage, step_folder(commit.step), self._rank, commit.attempt, pieces)
            self._written.set()
            if self._rank == 0:
                self._commit(commit, began)
        except BaseException as error:  # noqa: BLE001  told to the main thread, which tells the other ranks
            self._error = error
        finally:
            self._written.set()

    def _stage(self, sources: list[Source], stream: Any) -> list[Piece]:
        """Copy into host memory that is kept from save to save; page-locked where the values come from a GPU."""
        starts, end = [], 0
        for source in sources:
            starts.append(end)
            end += -(-count_bytes([source]) // ALIGNMENT) * ALIGNMENT
        if self._arena.numel() < end:
            self._arena = torch.empty(end, dtype=torch.uint8, pin_memory=stream is not None)
        with torch.cuda.stream(stream):  # no stream, no effect
            for source, start in zip(sources, starts, strict=True):
                target = self._arena[start : start + count_bytes([source])].view(source.tensor.dtype)
                target.copy_(source.tensor, non_blocking=stream is not None)
        if stream is not None:
            stream.synchronize()
        held = memoryview(self._arena.numpy())  # type: ignore[arg-type]
        return [
            Piece(name=s.name, kind=s.kind, start=s.start, length=s.tensor.numel(), shape=s.shape, dtype=SAFETENSORS_DTYPE[s.tensor.dtype],
                  block_offset=s.block_offset, data=held[start : start + count_bytes([s])])
            for s, start in zip(sources, starts, strict=True)
        ]  # fmt: skip

    def _commit(self, commit: Commit, began: float) -> None:
        records = wait_for_manifests(self._storage, commit.step, self._ranks, commit.attempt, self._abandoned.is_set)
        if records is None:
            return
        if self._lease is not None:
            self._lease.check()
        whole = replace(commit, shards=records, time=time.time())
        write_commit(self._storage, whole)
        self._outcome = {"event": "checkpoint", "step": commit.step, "bytes": whole.num_bytes, "write_s": time.perf_counter() - began,
                         "path": f"{self._storage.url}/{whole.folder}"}  # fmt: skip
        with suppress(OSError, CheckpointError):  # the next save prunes again
            prune(self._storage, self._plan.recipe.save.keep, commit.best_step if self._plan.recipe.save.keep_best else 0)

    # ----------------------------------------------------------------------------------------- on the main thread

    def finish(self) -> None:
        """Wait for the save in flight on every rank; report it. A failed one is told of and leaves nothing behind."""
        if self._thread is not None:
            self._finish()
            self._tell()

    def _finish(self) -> None:
        if self._thread is None:
            return
        began = time.perf_counter()
        self._written.wait()
        reasons = _gather(_reason(self._error, self._rank))
        if any(reasons):
            self._abandoned.set()
        self._thread.join()
        reasons = [first or second for first, second in zip(reasons, _gather(_reason(self._error, self._rank)), strict=True)]
        self._stall_s += time.perf_counter() - began
        self._thread, self._error = None, None
        if not any(reasons):
            self._committed_step = self._saved_step
            return
        if self._outcome is None and self._rank == 0:
            # Where the storage is gone this fails too; the next save that succeeds removes what is left.
            with suppress(OSError, CheckpointError):
                delete_step(self._storage, self._saved_step)
        self._report({"event": "checkpoint_failed", "step": self._saved_step, "why": "; ".join(filter(None, reasons))})
        dist.barrier()

    def _tell(self) -> None:
        if self._outcome is not None:
            self._report({**self._outcome, "stall_s": self._stall_s})
            self._outcome = None


def _make_stream(sources: list[Source]) -> Any:
    """A CUDA stream that begins where training is now; None where values are in host memory already."""
    if not any(source.tensor.is_cuda for source in sources):
        return None
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def _agree(value: str) -> str:
    """Rank 0's value, on every rank."""
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def _gather(value: str) -> list[str]:
    held: list[Any] = [""] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return held


def _reason(error: BaseException | None, rank: int) -> str:
    if error is None:
        return ""
    text = error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    return f"rank {rank}: {text}"
