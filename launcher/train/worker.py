"""One rank of a run, from plan.json to the exported model. Under torchrun:

torchrun --nproc-per-node 2 -m launcher.train.worker RUN/plan.json
"""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from launcher.checkpoint.lease import OWNER, Lease
from launcher.checkpoint.storage import Storage, open_storage
from launcher.errors import CheckpointError, DataError
from launcher.plan import Plan, load_plan
from launcher.plan.allocator_settings import read_settings
from launcher.recipe import Lora
from launcher.run import Event, RunFolder, cache_dir
from launcher.train import best
from launcher.train.budget import Watch, bound_compiled_products, bound_heap
from launcher.train.data import Samples, check_packing, load_samples, open_eval_batches, open_steps
from launcher.train.evaluate import answer_prompts, measure_loss
from launcher.train.export import export_model
from launcher.train.foreign import naming_foreign_errors
from launcher.train.group import prove_group
from launcher.train.loop import train
from launcher.train.methods import apply_method
from launcher.train.metrics import open_report
from launcher.train.model import find_start_id, load_base, load_tokenizer, prepare_weights
from launcher.train.optim import build_optimizer, make_lr_schedule, make_param_groups
from launcher.train.randomness import seed_rank
from launcher.train.report import write_model_card, write_report
from launcher.train.resume import make_run_identity, resume
from launcher.train.saving import Saver
from launcher.train.state import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GROUP_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another: tokenising or loading a large model may take rank 0 that long."""

Show = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Which worker this is. `store` is where the group meets; without one, torchrun's environment says. `hosts`: of each rank."""

    rank: int
    local_rank: int
    world_size: int
    store: Any = None  # torch.distributed.Store
    hosts: tuple[str, ...] = ()


def run_rank(plan: Plan, me: Rank, *, show: Show, stop_asked: Callable[[], bool]) -> None:
    """Do a rank's whole part of the run. Raises LauncherError for all that can go wrong.

    `show` is given each event on rank 0; `stop_asked` is read once a step on every rank.
    """
    with naming_foreign_errors(me.rank), _process_group(plan, me):
        folder = RunFolder(Path(plan.run_dir))
        report, close_report = open_report(plan, folder, me.rank, show)
        try:
            with _owned_storage(plan, me.rank) as (storage, lease):
                fine_tune(plan, me, folder, report, stop_asked, storage, lease)
        finally:
            close_report()
        if me.rank == 0:
            write_report(folder, plan)
            write_model_card(folder, plan)
        dist.barrier()


def fine_tune(
    plan: Plan, me: Rank, folder: RunFolder, report: Show, stop_asked: Callable[[], bool], storage: Storage, lease: Lease | None
) -> None:
    """A rank's part from data to exported model, from wherever the checkpoints on `storage` say it is."""
    recipe, batch = plan.recipe, plan.batch
    began = time.perf_counter()
    with _first_on_node(me):
        prepare_weights(plan)
        tokenizer = load_tokenizer(plan)
        report({"event": "phase", "name": "reading data"})
        train_set, eval_set = _load_data(plan, tokenizer)
    total_samples = math.ceil(recipe.schedule.epochs * len(train_set))
    total_steps = math.ceil(total_samples / batch.global_batch_size)
    if recipe.schedule.max_steps and recipe.schedule.max_steps < total_steps:
        total_steps = recipe.schedule.max_steps
        total_samples = total_steps * batch.global_batch_size
    for split, samples in (("train", train_set), ("eval", eval_set)):
        if samples is not None:
            report({"event": "data", "split": split, **samples.stats(), "source_hashes": samples.source_hashes})
    watch = Watch(plan, me.rank, report)
    watch.start()
    report({"event": "phase", "name": "loading model"})
    model = apply_method(load_base(plan, device_of(plan)), plan)
    start = copy_start(model, plan)
    engine = build_engine(plan, model, me)
    if recipe.data.packing:
        check_packing(engine.module)
    watch.built(engine.module)
    held = _Held(plan, engine, tokenizer, eval_set, report)
    identity = make_run_identity(plan, [samples.content_hash for samples in (train_set, eval_set) if samples is not None])
    resumed = resume(plan, engine, storage, identity, report)
    state, held.best_weights = resumed.state, resumed.best_weights
    report({"event": "start", "step": state.step, "from": resumed.source, "total_steps": total_steps, "world_size": me.world_size,
            "num_params": plan.num_params, "trainable_params": plan.trainable_params, "setup_s": time.perf_counter() - began})  # fmt: skip
    if state.step == 0:
        held.measure(0, "before")
        held.sample("before")

    saver = Saver(plan, engine, storage, lease=lease, identity=identity, total_steps=total_steps,
                  best_weights=lambda: held.best_weights, report=report)  # fmt: skip
    saver.resume_at(state)
    steps = open_steps(train_set, global_batch_size=batch.global_batch_size, micro_batch_size=batch.micro_batch_size, rank=me.rank,
                       world_size=me.world_size, seed=recipe.seed, total_samples=total_samples, start=state.samples_seen,
                       flat=plan.layout.packs_flat)  # fmt: skip
    state = train(
        engine,
        () if held.is_over(state) else steps,
        state,
        total_steps=total_steps,
        samples_per_epoch=len(train_set),
        lr_at=make_lr_schedule(recipe.schedule, recipe.optim.lr, total_steps),
        evaluate=lambda state: held.after_step(watch.after_step(state, total_steps)),
        is_over=held.is_over,
        saver=saver,
        report=report,
        stop_asked=stop_asked,
    )
    train_s = saver.train_s
    held.restore_best(state)
    held.measure(state.step, "after")
    held.sample("after")
    report({"event": "phase", "name": "saving"})
    export_model(engine, plan, tokenizer, folder.model, start)
    report({"event": "saved", "path": str(folder.model)})
    engine.destroy()
    report({"event": "end", "steps": state.step, "train_s": train_s, "wall_s": time.perf_counter() - began})


def _load_data(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> tuple[Samples, Samples | None]:
    data = plan.recipe.data

    def load(split: Literal["train", "eval"]) -> Samples:
        return load_samples(data, split, tokenizer, base_dir=plan.base_dir, seed=plan.recipe.seed, cache_dir=cache_dir(),
                            start_id=find_start_id(plan, tokenizer))  # fmt: skip

    return load("train"), load("eval") if data.eval or data.eval_fraction else None


def device_of(plan: Plan) -> str:
    return f"cuda:{torch.cuda.current_device()}" if plan.layout.accelerator == "cuda" else "cpu"


def copy_start(model: torch.nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The adapters before training, where exporting needs them: PiSSA's, taken before ZeRO-3 shards them."""
    method = plan.recipe.method
    if not (isinstance(method, Lora) and method.init == "pissa"):
        return {}
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


def build_engine(plan: Plan, model: torch.nn.Module, me: Rank) -> Any:
    """The DeepSpeed engine around a model that is on this rank's device."""
    import deepspeed

    seed_rank(plan.recipe.seed, me.rank)
    optimizer = build_optimizer(make_param_groups(model, plan.recipe.optim.weight_decay), plan.recipe.optim)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(plan.deepspeed), dist_init_required=False)
    if plan.layout.zero_stage == 0:
        # In bf16, stage 0 takes a step on empty gradients to allocate its states (deepspeed 0.19.8,
        # runtime/fp16/unfused_optimizer.py); with the learning rate still 0, Adam's counter is all it moved.
        optimizer.state.clear()
    engine.train()
    return engine


class _Held:
    """The held-out set and the sampled prompts of a run, measured when it is time."""

    def __init__(self, plan: Plan, engine: Any, tokenizer: PreTrainedTokenizerFast, samples: Samples | None, report: Show) -> None:
        self.plan, self.engine, self.tokenizer, self.samples, self.report = plan, engine, tokenizer, samples, report
        wanted = plan.recipe.evaluate
        self.stopping = wanted.early_stopping
        self.keep_best = wanted.early_stopping is not None if wanted.keep_best == "auto" else wanted.keep_best
        self.best_weights: dict[str, torch.Tensor] = {}

    def measure(self, step: int, when: str) -> float:
        if self.samples is None:
            return math.nan
        wanted, batch = self.plan.recipe.evaluate.micro_batch_size, self.plan.batch
        batches = open_eval_batches(
            self.samples,
            micro_batch_size=batch.micro_batch_size if wanted == "auto" else wanted,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            flat=self.plan.layout.packs_flat,
        )
        self.report({"event": "phase", "name": "measuring held-out loss"})
        loss, tokens = measure_loss(self.engine, batches)
        self.report({"event": "eval", "step": step, "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "when": when, "tokens": tokens})
        return loss

    def sample(self, when: str) -> None:
        wanted = self.plan.recipe.evaluate
        if not wanted.samples:
            return
        self.report({"event": "phase", "name": "answering sample prompts"})
        answers = answer_prompts(
            self.engine,
            self.tokenizer,
            wanted.samples,
            system_prompt=self.plan.recipe.data.system_prompt,
            max_new_tokens=wanted.max_new_tokens,
            sharded=self.plan.layout.zero_stage == 3,
        )
        pairs = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(wanted.samples, answers, strict=True)]
        self.report({"event": "samples", "when": when, "answers": pairs})

    def after_step(self, state: TrainState) -> TrainState:
        every = self.plan.recipe.evaluate.every_steps
        if every is None or state.step % every:
            return state
        state = state.after_evaluation(self.measure(state.step, "during"), self.stopping.min_delta if self.stopping else 0.0)
        if self.keep_best and state.best_step == state.step:
            self.best_weights = best.copy_trained(self.engine)
        return state

    def is_over(self, state: TrainState) -> bool:
        return self.stopping is not None and state.evaluations_since_best >= self.stopping.patience

    def restore_best(self, state: TrainState) -> None:
        if self.best_weights and state.best_step != state.step:
            best.restore_trained(self.engine, self.best_weights)
            self.report({"event": "note", "text": f"back to the weights of step {state.best_step}, the best evaluation"})


@contextmanager
def _owned_storage(plan: Plan, rank: int) -> Iterator[tuple[Storage, Lease | None]]:
    """The run's checkpoints, with the right to write there, which rank 0 holds for all. Raises CheckpointError where another
    run holds it, or where a rank does not see what rank 0 sees."""
    storage = open_storage(plan.checkpoints)
    lease, problem = None, ""
    if rank == 0:
        lease = Lease(storage)
        try:
            lease.take()
        except (CheckpointError, OSError) as error:
            lease, problem = None, str(error)
    told = [(problem, lease.token if lease else "")]
    dist.broadcast_object_list(told, src=0)
    try:
        if told[0][0]:
            raise CheckpointError(*told[0][0].split("\n  → ", 1))
        if rank != 0:
            _check_shared(storage, told[0][1], rank)
        yield storage, lease
    finally:
        if lease is not None:
            lease.release()


def _check_shared(storage: Storage, token: str, rank: int) -> None:
    """Raises CheckpointError where this rank's host does not see the file that rank 0 wrote."""
    deadline = time.monotonic() + 10  # NFS may remember for some seconds that a file was not there
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if token.encode() in storage.read(OWNER):
                return
        time.sleep(0.5)
    raise CheckpointError(
        f"rank {rank} on {platform.node()} does not see the checkpoints that rank 0 writes to {storage.url}",
        "the hosts share no disk: set save.storage to a folder that all of them see, or to s3:// or gs://",
    )


@contextmanager
def _process_group(plan: Plan, me: Rank) -> Iterator[None]:
    """Inside, the ranks are one group, and DeepSpeed knows of it; outside, it is gone."""
    _quiet_libraries()
    if plan.layout.accelerator == "cuda":
        torch.cuda.set_device(me.local_rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(plan.layout.threads_per_worker)
        bound_compiled_products(plan)
        bound_heap(plan, loading=True)
    if me.store is None:
        dist.init_process_group(plan.layout.backend, timeout=GROUP_TIMEOUT)
    else:
        dist.init_process_group(plan.layout.backend, store=me.store, rank=me.rank, world_size=me.world_size, timeout=GROUP_TIMEOUT)
    import deepspeed

    try:
        prove_group(plan, me.hosts)
        _introduce_deepspeed(plan)
        yield
    finally:
        deepspeed.comm.destroy_process_group()


def _quiet_libraries() -> None:
    """Keep out of the log what nobody can act on: progress bars redrawn a thousand times, deprecations between libraries."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _introduce_deepspeed(plan: Plan) -> None:
    import deepspeed

    # DeepSpeed compiles this CPU op on first use, with a lock that outlives a killed process; only its
    # inference uses it. Its table of ops is meant to be edited (deepspeed 0.19.8, ops/__init__.py).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=plan.layout.backend, auto_mpi_discovery=False, verbose=False)


@contextmanager
def _first_on_node(me: Rank) -> Iterator[None]:
    """Lets local rank 0 go first: what it leaves in the cache, the others find."""
    if me.local_rank != 0:
        dist.barrier()
    yield
    if me.local_rank == 0:
        dist.barrier()


def main() -> None:
    """Entry of `torchrun -m launcher.train.worker PLAN.json`: a run without Ray."""
    from launcher.progress import make_display

    if len(sys.argv) != 2:
        raise SystemExit("usage: torchrun -m launcher.train.worker RUN/plan.json")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    plan = load_plan(Path(sys.argv[1]))
    me = Rank(rank=int(os.environ["RANK"]), local_rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    if me.world_size != plan.layout.world_size:
        raise DataError(
            f"torchrun started {me.world_size} ranks, and the plan is for {plan.layout.world_size}", "make the plan again with --workers"
        )
    display = make_display()
    if plan.layout.accelerator == "cuda" and (here := read_settings(os.environ)) != plan.allocator:
        display.show(
            {
                "event": "note",
                "text": f"PYTORCH_ALLOC_CONF is {here or 'not set'}, and the plan's reserved memory is for {plan.allocator or 'none'}",
            }
        )
    try:
        run_rank(plan, me, show=display.show, stop_asked=lambda: False)
    finally:
        display.close()


if __name__ == "__main__":
    main()
