"""The memory plan of a run: states, activations and buffers put together, phase by phase, for the rank that needs most.

docs/plan.md tells the arithmetic in words. The parts: what is held (states.py), what a micro-step holds (tape.py, decoder.py,
step.py), what ZeRO-3 gathers (gathering.py), what torch's allocator makes of it (allocator.py), the host and the disk (host.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from launcher.cluster import Cluster
from launcher.plan.batch import BatchPlan
from launcher.plan.budget import COMPONENTS, MARGIN, Component, MemoryPlan, Phase, Provenance
from launcher.plan.decoder import CLOSED_FORMS
from launcher.plan.evaluating import Evaluation, profile_evaluating
from launcher.plan.fused import FUSED
from launcher.plan.gathering import Gathered, find_peaks, gather, gathering_step, gathers, largest_at_once
from launcher.plan.heap import choose_threshold, keep_beside
from launcher.plan.host import make_disk, make_host_phases, make_network, make_staging, save_beside
from launcher.plan.layout import Layout
from launcher.plan.merging import make_merge_phases
from launcher.plan.products import predict_objects, predict_products
from launcher.plan.profile import Peak, StepProfile, bound_step, profile_step
from launcher.plan.shape import ModelShape, as_llama
from launcher.plan.slack import Held, add_bytes, bound_slack, make_heap_slack, make_slack, part
from launcher.plan.speed import find_target_len
from launcher.plan.states import Counts, Sharding, States, count_states, make_states, optimizer_of
from launcher.plan.timeline import flushes_in_backward, list_streams, tell_step
from launcher.plan.trainable import OTHERS, as_trained
from launcher.plan.workload import MethodFacts, Workload
from launcher.recipe import Freeze, Full, Lora, QLora, Recipe
from launcher.units import DTYPE_BYTES, GIB, MIB


class Tracer(Protocol):
    """Runs a model on the meta device."""

    def profile(self, work: Workload, *, keep_gradients: bool) -> StepProfile | str:
        """The profile of a micro-step, or why there is none."""
        ...

    def count(self, shape: ModelShape) -> ModelShape:
        """The shape of a model of an unknown architecture, with every parameter it has; the same shape where it cannot be built."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What does not follow from the model: constants of a machine, each with its relative error. `lepton-launch calibrate` measures them."""

    library_workspace: int = 2 * 8 * MIB + MIB // 4
    """cuBLAS keeps 8.125 MiB a handle, 32 MiB from Hopper on (at::cuda::getChosenWorkspaceSize); forward's and autograd's thread have one each."""
    library_error: float = 1.0
    context: int = 500 * MIB
    """The driver's part of a device: CUDA context and loaded kernels."""
    context_error: float = 0.4
    nccl: int = 400 * MIB
    """Buffers of the communicators, where there is more than one rank."""
    nccl_error: float = 1.0
    libraries: int = 900 * MIB
    """Resident memory of a worker with torch, transformers, DeepSpeed and peft imported, on this project's CPU machine."""
    libraries_error: float = 0.25


DEFAULT_OVERHEADS = Overheads()
FROM_HOPPER_ON = ("H100", "H200", "H800", "B100", "B200", "B300")
"""In a device's name."""


def choose_overheads(device_name: str | None) -> Overheads:
    """The constants of a device that was not measured."""
    recent = any(name in (device_name or "") for name in FROM_HOPPER_ON)
    return replace(DEFAULT_OVERHEADS, library_workspace=2 * 32 * MIB) if recent else DEFAULT_OVERHEADS


def method_facts(recipe: Recipe) -> MethodFacts:
    """The recipe's method as the arithmetic takes it."""
    method = recipe.method
    if isinstance(method, Full):
        return MethodFacts(trains="all")
    if isinstance(method, Freeze):
        return MethodFacts(trains="some", last_layers=method.last_layers, patterns=method.patterns)
    facts = MethodFacts(trains="adapters", r=method.r, target_modules=method.target_modules, dropout=method.dropout, dora=method.dora)
    if isinstance(method, QLora):
        return replace(facts, bits=method.bits, double_quant=method.double_quant)
    return replace(facts, pissa=method.init == "pissa")


def count_trainable(recipe: Recipe, shape: ModelShape) -> int:
    """Parameters that receive gradients."""
    method = recipe.method
    if isinstance(method, Lora | QLora):
        return shape.lora_params(method.r, method.target_modules, dora=method.dora)
    if isinstance(method, Freeze):
        return shape.frozen_but(method.last_layers, method.patterns)
    return shape.num_params


def make_workload(recipe: Recipe, shape: ModelShape, layout: Layout, batch: BatchPlan) -> Workload:
    """What one rank computes in a micro-step."""
    flat, shape = layout.packs_flat, as_trained(shape)
    target_len = find_target_len(recipe, shape)
    return Workload(
        shape=shape,
        method=method_facts(recipe),
        width=DTYPE_BYTES[layout.dtype],
        device=layout.accelerator,
        attention=layout.attn_implementation,
        loss=layout.loss,
        checkpointing="offload" if layout.checkpoints_on_host else "on" if layout.gradient_checkpointing else "off",
        micro_batch_size=batch.micro_batch_size,
        seq_len=batch.seq_len,
        # The last position predicts nothing. Which others carry no loss is in the data, so all are counted.
        loss_columns=target_len or (batch.micro_batch_size * batch.seq_len if flat else batch.seq_len) - 1,
        target_len=target_len,
        # Padding is a sequence of its own (train/data.py), and needs the mask that packs do.
        packed=bool(recipe.data.packing) or batch.micro_batch_size > 1,
        fused=layout.liger_kernel and shape.model_type in FUSED,
        sums_in_place=layout.dtype != "fp16",  # what GPUs below Ampere train in; newer ones seldom do, and need less
    )


def begins_forward(recipe: Recipe) -> bool:
    """Whether a run evaluates, or checks that a model keeps packed examples apart (train/data.py), before it trains."""
    return bool(recipe.data.packing or recipe.data.eval or recipe.data.eval_fraction)


def make_sharding(layout: Layout, deepspeed: Mapping[str, Any], *, forward_first: bool = False) -> Sharding:
    """The buffers and thresholds of a DeepSpeed configuration."""
    zero = deepspeed["zero_optimization"]
    return Sharding(
        ranks=layout.world_size, stage=layout.zero_stage, bucket=zero["reduce_bucket_size"], overlap=bool(zero["overlap_comm"]),
        offload_optimizer=layout.offload_optimizer, offload_param=layout.offload_param,
        prefetch=zero.get("stage3_prefetch_bucket_size", 0), persistence=zero.get("stage3_param_persistence_threshold", 0),
        max_reuse=zero.get("stage3_max_reuse_distance", 0), sub_group=zero.get("sub_group_size", 1_000_000_000), zero_init=layout.zero_init,
        leaf_modules=layout.leaf_modules, nvme=layout.nvme_path is not None, efficient_linear=zero.get("memory_efficient_linear", True),
        forward_first=forward_first,
    )  # fmt: skip


def predict_memory(
    recipe: Recipe,
    shape: ModelShape,
    layout: Layout,
    batch: BatchPlan,
    cluster: Cluster,
    *,
    deepspeed: Mapping[str, Any],
    budget: int | None = None,
    replay: bool = True,
    only_fits: bool = False,
    overheads: Overheads | None = None,
    expandable_segments: bool = False,
    tracer: Tracer | None = None,
    work: Workload | None = None,
    states: States | None = None,
) -> MemoryPlan:
    """What the run needs, phase by phase. `deepspeed` is its configuration; `budget` is the device's memory unless told.

    With `replay` the allocator is simulated and every layer computed; without, its slack is a share and a deep model's layers are
    extrapolated: for a search over thousands of candidates. `tracer` is asked for the micro-step, where there is one.
    `only_fits`: whether it fits is all that is asked. Without a replay, slack is then what every replay finds; a replay ends where there is
    no room left.
    `work` is what a rank computes, and `states` what it holds, where they are not this launcher's loop's and DeepSpeed's.
    """
    overheads = overheads or choose_overheads(cluster.device_name)
    sharding = make_sharding(layout, deepspeed, forward_first=begins_forward(recipe))
    work = work or make_workload(recipe, shape, layout, batch)
    counts = count_states(work)
    states = states or make_states(counts, sharding, width=work.width, optimizer=optimizer_of(recipe),
                                   micro_steps=batch.gradient_accumulation_steps, on_cpu=work.device == "cpu")  # fmt: skip
    there = budget if budget is not None else cluster.device_memory
    limit = there - overheads.context - (overheads.nccl if sharding.ranks > 1 else 0)
    states = _flatten_where_there_is_room(states, limit, on_device=work.device == "cuda" and sharding.stage in (1, 2))
    profile, acting, notes = _choose_profile(work, sharding.stage < 2, tracer)
    parts = Parts(work, acting, sharding, counts, states, batch.gradient_accumulation_steps)
    known = profile is not None or acting is work
    profile = profile or profile_step(acting, keep_gradients=parts.keeps, gradients_exist=parts.gradients_exist, exact=replay)
    evaluating = _profile_evaluating(recipe, shape, layout, batch, acting, profile)
    exact = gathers(sharding) and replay and not profile.is_traced
    phases = _make_phases(parts, profile, evaluating, _gather_beside(parts, profile, exact=exact), known=known)
    story = tell_step(parts.acting, states, sharding, parts.keeps, batch.gradient_accumulation_steps) if replay else None
    if story is not None and layout.accelerator == "cpu":
        threshold = choose_threshold(work)
        beside = keep_beside(largest_at_once(parts.acting, sharding), states.reduce_copy, sharding.ranks, threshold)
        slack = make_heap_slack(phases, story, threshold, beside)
    elif story is None and only_fits:
        streams = list_streams(parts.acting, sharding) if layout.accelerator == "cuda" else ()
        slack = bound_slack(phases, streams, expandable_segments)
    else:
        slack = make_slack(
            phases, story, expandable_segments, limit, alike=not profile.is_traced, until=int((1 - MARGIN) * there) if only_fits else None
        )
    finished = tuple(
        Phase(name=name, components=_finish(components, slack[name], work, overheads, sharding, name))
        for name, components in phases.items()
    )
    notes += _find_notes(parts)
    disk = make_disk(recipe, shape, counts, work.width, nvme=states.nvme * layout.workers_per_node)
    staging = make_staging(layout, disk.checkpoint_bytes)
    if layout.accelerator == "cpu":
        finished = save_beside(finished, staging)
    host = make_host_phases(recipe, shape, layout, states, counts, finished, overheads.libraries, overheads.libraries_error,
                             profile.host_checkpoints, staging, cluster.ray.spare_workers)  # fmt: skip
    merging = make_merge_phases(work, counts, libraries=overheads.libraries, libraries_error=overheads.libraries_error,
                                context=overheads.context, context_error=overheads.context_error)  # fmt: skip
    return MemoryPlan(
        phases=finished + merging.device,
        host_phases=host + merging.host,
        disk=disk,
        network_bytes=make_network(counts, sharding, work.width, batch.gradient_accumulation_steps),
        budget=there,
        host_budget=cluster.host_memory if cluster.host_memory > 1 else None,
        notes=tuple(notes),
    )


def _flatten_where_there_is_room(states: States, limit: int, *, on_device: bool) -> States:
    """DeepSpeed flattens a group of parameters on the device if the copy fits beside them, else in host memory (stage_1_and_2.py)."""
    fits = states.weights + states.quant_state + states.adapters + states.start_peak <= limit
    return states if fits or not on_device else replace(states, start_peak=states.start_least)


def has_closed_form(shape: ModelShape) -> bool:
    """Whether the micro-step of this model is told exactly."""
    return shape.is_known and (shape.model_type in CLOSED_FORMS or shape.is_pair)


def _choose_profile(work: Workload, keep_gradients: bool, tracer: Tracer | None) -> tuple[StepProfile | None, Workload, list[str]]:
    """A trace where there is a tracer; otherwise the workload that the tape is asked for, a Llama's where the model's own is not known."""
    known, kind = has_closed_form(work.shape), work.shape.config.get("model_type")
    acting = work if known else replace(work, shape=as_llama(work.shape))
    found = tracer.profile(work, keep_gradients=keep_gradients) if tracer is not None else ""
    if isinstance(found, StepProfile):
        why = "" if known else f", because {kind} has no exact arithmetic here"
        dense = "; a quantised base is traced dense, and its products keep less" if work.method.bits != 16 else ""
        layers = "; without Liger's layer kernels, and so with more" if work.fused else ""
        return found, acting, [f"activations: traced on the meta device{why}{dense}{layers}"]
    if known:
        return None, work, []
    counted = "activations" if work.shape.is_known or work.shape.is_counted else "weights and activations"
    reason = f" (not traced: {found})" if found else "; with torch, transformers and peft installed it is traced"
    return None, acting, [
        f"{counted}: counted as those of a Llama of the same sizes, ±{50 if kind in OTHERS else 20}%, because {kind} has no exact arithmetic"
        f" here{reason}"
    ]  # fmt: skip


def hold_at_least(recipe: Recipe, shape: ModelShape, layout: Layout, batch: BatchPlan, *, deepspeed: Mapping[str, Any]) -> int:
    """Bytes of a device that the run needs at least: what it holds, at the step, while it loads, and with activations that cannot be fewer."""
    work, sharding = make_workload(recipe, shape, layout, batch), make_sharding(layout, deepspeed, forward_first=begins_forward(recipe))
    states = make_states(count_states(work), sharding, width=work.width, optimizer=optimizer_of(recipe),
                         micro_steps=batch.gradient_accumulation_steps, on_cpu=work.device == "cpu")  # fmt: skip
    parts = Parts(work, work, sharding, count_states(work), states, batch.gradient_accumulation_steps)
    held = states.weights + states.persistent + states.quant_state + states.adapters + states.master + states.optimizer
    loading = 0 if sharding.stage == 3 and sharding.zero_init else sum(c.bytes for c in _loading(parts, NOTHING_GATHERED))
    two, three = (make_workload(recipe, shape, layout, replace(batch, micro_batch_size=m)) for m in (2, 3))
    step = bound_step(work, two, three, keep_gradients=parts.keeps, gradients_exist=parts.gradients_exist) if has_closed_form(shape) else 0
    return max(held + states.gradients + step, held + states.step_peak, loading)


@dataclass(slots=True)
class Parts:
    """What phases are put together from."""

    work: Workload
    acting: Workload
    """The same, or a Llama of its sizes where the model's own computation is not known."""
    sharding: Sharding
    counts: Counts
    states: States
    micro_steps: int

    @property
    def keeps(self) -> bool:
        """Whether gradients stay in their parameters until the step."""
        return self.sharding.stage < 2

    @property
    def gradients_exist(self) -> bool:
        """Whether a micro-step before has left gradients in the parameters."""
        return self.keeps and self.micro_steps > 1


def _profile_evaluating(
    recipe: Recipe, shape: ModelShape, layout: Layout, batch: BatchPlan, acting: Workload, profile: StepProfile
) -> Evaluation | None:
    """Of the recipe's own micro-batch for it; None where nothing is evaluated."""
    if not (recipe.data.eval or recipe.data.eval_fraction or recipe.evaluate.samples):
        return None
    wanted = recipe.evaluate.micro_batch_size
    rows = batch.micro_batch_size if wanted == "auto" else wanted
    if profile.is_traced:  # with what a backward pass would need: too much, by as much as that
        return Evaluation(peak={kind: size * rows // batch.micro_batch_size for kind, size in profile.forward.items()})
    asked = make_workload(recipe, shape, layout, replace(batch, micro_batch_size=rows))
    return profile_evaluating(
        replace(acting, micro_batch_size=rows, loss_columns=asked.loss_columns, packed=asked.packed)
        if rows != acting.micro_batch_size
        else acting,
        recipe,
    )


MicroStepPhase = Literal["forward", "loss", "early backward", "backward"]


def _gather_beside(parts: Parts, profile: StepProfile, *, exact: bool) -> dict[MicroStepPhase, int]:
    """Bytes that ZeRO-3's gathering adds to the peak of each phase: exactly, or no more than that where a search asks for many candidates."""
    gathered = gather(parts.acting, parts.sharding)
    if not exact:
        at_most = profile.is_traced  # its moments are not told
        forward, loss, backward = (gathered.most,) * 3 if at_most else (gathered.forward, gathered.loss, gathered.backward)
        return {"forward": forward, "loss": loss, "early backward": backward, "backward": backward}
    peaks = find_peaks(gathering_step(parts.acting, parts.sharding, keep_gradients=parts.keeps, gradients_exist=parts.gradients_exist))
    loss = max(peaks["loss"], peaks.get("loss backward", 0)) - sum(profile.loss.values())
    backward = peaks.get("backward", 0) - sum(profile.backward.values())
    return {"forward": peaks["forward"] - sum(profile.forward.values()), "loss": loss, "backward": backward,
            "early backward": peaks.get("early backward", 0) - sum(profile.early_backward.values())}  # fmt: skip


def _make_phases(
    parts: Parts, profile: StepProfile, evaluating: Evaluation | None, gathering: Mapping[MicroStepPhase, int], *, known: bool
) -> dict[str, Held]:
    work, states, sharding, counts = parts.work, parts.states, parts.sharding, parts.counts
    several = parts.micro_steps > 1
    gathered = gather(work, sharding)
    weights = [
        part("weights", states.weights + states.persistent),
        part("quantisation state", states.quant_state),
        part("adapters", states.adapters),
    ]
    held = [*weights, part("fp32 master", states.master), part("optimizer states", states.optimizer)]
    gradients = [part("gradients", states.gradients, "source", 0.01)]
    bucket = [part("buckets", states.bucket, "source", 0.01)]
    always = bucket if states.bucket_always else []
    early = bucket if states.bucket_always or (sharding.stage == 1 and several) else []
    # What is no decoder has an encoder, images or another loss: flan-t5-base, whisper, ViT, CLIP traced were 4 to 40 % off a Llama.
    error = 0.01 if known else 0.5 if work.shape.config.get("model_type") in OTHERS else 0.2
    provenance: Provenance = "exact" if known else "assumed"

    def computing(peak: Peak, whole: int) -> Held:
        return [
            *(part(name, size, provenance, error) for name, size in peak.items() if size),
            part("gathered parameters", whole, "source", 0.1),
        ]

    # A second flush of the bucket in backward finds the rank's own part already there.
    flushes = flushes_in_backward(counts, sharding)
    mine, copied = (states.part_bytes, states.reduce_copy) if flushes else (0, 0)
    # Gradients that still lie in their parameters when they are reduced, unless they are counted as held already.
    stays = not several and (sharding.stage == 0 or (sharding.stage == 1 and counts.trained > sharding.bucket))
    left = work.width * counts.trained if stays else 0
    step_gradients = gradients if sharding.stage == 3 or sharding.offload_optimizer else []
    start = max(0, states.start_peak - states.master)
    phases = {
        "load": [*_loading(parts, gathered), part("step workspace", _start_adapters(parts), "source", 0.5)],
        "engine start": [*weights, part("fp32 master", states.master), *always, *(gradients if sharding.stage == 3 else []),
                         part("step workspace", start, "source", 0.05)],
        "forward": [*held, *gradients, *early, *computing(profile.forward, gathering["forward"])],
        "loss": [*held, *gradients, *early, *computing(profile.loss, gathering["loss"])],
        "backward": max([*held, *gradients, *bucket, part("gradients", mine, "source"), part("step workspace", copied, "source", 0.05),
                         *computing(profile.backward, gathering["backward"])],
                        [*held, *gradients, *early, *computing(profile.early_backward, gathering["early backward"])], key=add_bytes),
        "reduce": [*held, *gradients, *bucket, part("gradients", left + mine, "source"), part("step workspace", states.reduce_copy, "source", 0.05)],
        "optimizer step": [*held, *step_gradients, *always, part("step workspace", states.step_peak, "source", 0.05)],
        "evaluation": [*held, *always, *(gradients if sharding.stage == 3 else []),
                       *(computing(evaluating.peak, max(gathered.forward, gathered.loss)) if evaluating else []),
                       part("KV cache", evaluating.cache if evaluating else 0, "source", 0.5)],
        "save": [*held, *always, *(gradients if sharding.stage == 3 else []),
                 part("gathered parameters", _exported_at_once(parts, gathered), "source", 0.1)],
        "resume": [*held, *always, *(gradients if sharding.stage == 3 else [])],
    }  # fmt: skip
    if evaluating is None:
        del phases["evaluation"]
    return phases


def _start_adapters(parts: Parts) -> int:
    """What peft takes to start an adapter from a weight, the largest one: PiSSA's decomposition in fp32 (the weight, its two factors, a working
    copy; lora/layer.py, pissa_init), DoRA's norm (the adapters' product, that times its scale, the sum; lora/dora.py)."""
    method, largest = parts.work.method, parts.counts.largest_adapted
    return 16 * largest if method.pissa else 3 * parts.work.width * largest if method.dora else 0


EXPORT_ELEMENTS = 1 << 28
"""launcher/train/export.py gathers so many at a time."""


def _exported_at_once(parts: Parts, gathered: Gathered) -> int:
    if parts.sharding.stage != 3:
        return 0
    wanted = parts.counts.trained if parts.work.method.r else parts.work.shape.num_params
    return 2 * max(gathered.largest, parts.work.width * min(EXPORT_ELEMENTS, wanted))


NOTHING_GATHERED = Gathered(forward=0, loss=0, backward=0, most=0, largest=0, largest_layer=0)


def _loading(parts: Parts, gathered: Gathered) -> Held:
    """Weights as they come: whole on every rank, unless the model starts sharded."""
    work, counts, sharding, states = parts.work, parts.counts, parts.sharding, parts.states
    if sharding.stage == 3 and sharding.zero_init:
        # A layer is quantised before it is sharded (train/shard.py), its largest weight beside it in the model's dtype.
        layer = gathered.largest_layer + work.width * counts.largest_quantised if work.method.bits != 16 else 0
        return [part("weights", states.weights + states.persistent), part("adapters", states.adapters),
                part("quantisation state", counts.quant_state_bytes),
                part("gathered parameters", max(2 * gathered.largest, layer), "source", 0.5)]  # fmt: skip
    base = work.width * (sum(counts.frozen) + counts.trained - counts.adapters)
    # A quantised weight comes in the model's dtype and is turned one at a time.
    turning = 2 * work.width * counts.largest_quantised
    return [part("weights", base + counts.packed_bytes), part("quantisation state", counts.quant_state_bytes),
            part("adapters", work.width * counts.adapters), part("dequantisation workspace", turning, "source", 0.5)]  # fmt: skip


def _finish(
    components: Held, slack: Component, work: Workload, overheads: Overheads, sharding: Sharding, phase: str
) -> tuple[Component, ...]:
    """Components of one name made one, in the order of tables, with what lies outside of tensors."""
    if work.device == "cpu":
        compiled = 0 if phase in ("load", "engine start") else predict_products(work)
        outside = [
            part("library workspace", compiled + predict_objects(work), "fitted", 0.5, "reserved"),
            slack,
            part("libraries", overheads.libraries, "fitted", overheads.libraries_error, "total"),
        ]
    else:
        outside = [part("library workspace", overheads.library_workspace, "source", overheads.library_error), slack,
                   part("CUDA context", overheads.context, "assumed", overheads.context_error, "total")]  # fmt: skip
        if sharding.ranks > 1:
            outside.append(part("NCCL", overheads.nccl, "assumed", overheads.nccl_error, "total"))
    merged: dict[str, Component] = {}
    for component in [*components, *outside]:
        before = merged.get(component.name)
        merged[component.name] = component if before is None else _merge(before, component)
    told = tuple(merged[name] for name in COMPONENTS if name in merged and merged[name].bytes > 0)
    if work.shape.is_known or work.shape.is_counted:
        return told
    return tuple(_guess(component) if component.counts_in == "allocated" else component for component in told)


def _guess(component: Component) -> Component:
    """A component of a model whose very parameters are taken to be a Llama's."""
    return replace(component, provenance="assumed", error=max(component.error, 0.2))


TRUST: tuple[Provenance, ...] = ("exact", "source", "fitted", "assumed")


def _merge(a: Component, b: Component) -> Component:
    size = a.bytes + b.bytes
    spread = ((a.bytes * a.error) ** 2 + (b.bytes * b.error) ** 2) ** 0.5
    weaker: Provenance = max((c.provenance for c in (a, b) if c.bytes), key=TRUST.index, default="exact")
    return replace(a, bytes=size, error=spread / size if size else 0.0, provenance=weaker)


def _find_notes(parts: Parts) -> list[str]:
    """What a reader should know of the numbers, or change."""
    work, counts, notes = parts.work, parts.counts, []
    method, shape = work.method, work.shape
    if method.bits != 16:
        packed = sum(w.count * b.repeats for b in shape.inventory for w in b.weights if w.matrix)
        if packed < 0.5 * shape.num_params:
            notes.append(
                f"quantisation: bitsandbytes takes linear layers only, {packed / shape.num_params:.0%} of this model; its experts stay in 16 bits"
            )
    logits = 12 * work.loss_columns * shape.vocab_size * (1 if work.attention == "flash_attention_2" else work.micro_batch_size)
    if logits > 4 * GIB and work.loss == "plain":
        notes.append(f"logits: up to {logits / GIB:.1f} GiB for the loss of {work.tokens} tokens over {shape.vocab_size} words;"
                     " model.loss: chunked makes a few rows of them at a time")  # fmt: skip
    if counts.trained > shape.num_params // 10 and method.r:
        notes.append(
            f"adapters: {counts.trained:,} parameters are trained, because target_modules reaches fused experts; name the attention's layers"
        )
    return notes
