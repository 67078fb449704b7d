"""What DeepSpeed and the optimizers keep, as fragments of named parameters: read for a checkpoint, put back from one.

This is the one file that knows DeepSpeed's private layout (0.19.8), per ZeRO stage:

    0     fp32: the parameters themselves; bf16, fp16: FP16_UnfusedOptimizer.fp32_groups beside fp16_groups
    1, 2  single_partition_of_fp32_groups: a flat slice a group; a parameter's _hp_mapping says where it lies in it
    3     fp32_partitioned_groups_flat: a flat tensor a sub-group, each parameter's own slice after the other

and what the inner optimizer keeps for each of those tensors: states of its shape, factored states of another (Adafactor
under stage 0), 8-bit states with a scale a block of 256 (bitsandbytes), and a step count. Low-precision weights are not
kept: they are the masters, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint.fetch import Wanted, fetch
from launcher.checkpoint.reshard import Reader, Span
from launcher.checkpoint.shard import BLOCK_ELEMENTS, DTYPE_BYTES
from launcher.errors import CheckpointError

KNOWN_DEEPSPEED = "0.19."
MASTER = "master"
BEST = "best"
SAFETENSORS_DTYPE = {
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
TORCH_DTYPE = {name: dtype for dtype, name in SAFETENSORS_DTYPE.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Elements [start, start + length) of parameter `name` lie in `holder`, flattened, from `offset` on."""

    name: str
    start: int
    length: int
    shape: tuple[int, ...]
    holder: torch.Tensor
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A fragment that is still where training uses it: a flat view of it."""

    name: str
    kind: str
    start: int
    shape: tuple[int, ...]
    block_offset: int
    tensor: torch.Tensor


def check_deepspeed() -> None:
    """Raises CheckpointError for a DeepSpeed whose layout this file does not know."""
    import deepspeed

    if not deepspeed.__version__.startswith(KNOWN_DEEPSPEED):
        raise CheckpointError(
            f"checkpoints read the optimizer of DeepSpeed {KNOWN_DEEPSPEED}x, and {deepspeed.__version__} is installed",
            "pip install 'deepspeed>=0.19.8,<0.20'",
        )


def inner_optimizer(engine: Any) -> Any:
    """The optimizer a recipe names, from within DeepSpeed's."""
    outer = engine.optimizer
    return outer if isinstance(outer, torch.optim.Optimizer) else outer.optimizer


def find_segments(engine: Any) -> list[Segment]:
    """Where this rank keeps the fp32 masters of its share of what is trained; under stage 0, of all of it."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    stage, outer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return list(_find_in_stage_3(outer, names))
    if stage in (1, 2):
        return [
            Segment(name=names[id(p)], start=lie.lp_fragment_address.start, length=lie.lp_fragment_address.numel, shape=tuple(p.shape),
                    holder=holder, offset=lie.hp_fragment_address.start)
            for holder, group in zip(outer.single_partition_of_fp32_groups, outer.bit16_groups, strict=True)
            for p in group
            if (lie := p._hp_mapping) is not None
        ]  # fmt: skip
    if isinstance(outer, torch.optim.Optimizer):
        pairs = [(p, p) for group in outer.param_groups for p in group["params"]]
    else:
        pairs = [pair for low, high in zip(outer.fp16_groups, outer.fp32_groups, strict=True) for pair in zip(low, high, strict=True)]
    return [Segment(name=names[id(p)], start=0, length=p.numel(), shape=tuple(p.shape), holder=high, offset=0) for p, high in pairs]


def _find_in_stage_3(outer: Any, names: dict[int, str]) -> Iterator[Segment]:
    rank = dist.get_rank(group=outer.dp_process_group)
    for holder, group in zip(outer.fp32_partitioned_groups_flat, outer.fp16_groups, strict=True):
        offset = 0
        for p in group:
            size = p.partition_numel()
            start = rank * size
            length = min(p.ds_numel - start, size)
            if length > 0:
                yield Segment(name=names[id(p)], start=start, length=length, shape=tuple(p.ds_shape), holder=holder, offset=offset)
            offset += size


def _share(segment: Segment, rank: int, ranks: int) -> Segment:
    """What one rank writes of a parameter that all hold: an equal part, cut between 8-bit blocks."""

    def cut(part: int) -> int:
        return min(-(-segment.length * part // (ranks * BLOCK_ELEMENTS)) * BLOCK_ELEMENTS, segment.length)

    begin = cut(rank)
    return replace(segment, start=begin, offset=begin, length=cut(rank + 1) - begin)


def list_sources(engine: Any) -> tuple[list[Source], dict[str, Any]]:
    """What this rank writes of masters and optimizer states, and the optimizer's plain numbers."""
    segments, states = find_segments(engine), inner_optimizer(engine).state
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sources: list[Source] = []
    scalars: dict[str, Any] = {}
    for index, segment in enumerate(segments):
        state = states.get(segment.holder, {})
        scalars |= _scalars(state)
        if engine.zero_optimization_stage() == 0:
            if index % ranks == rank:
                sources += [
                    Source(
                        name=segment.name, kind=key, start=0, shape=tuple(value.shape), block_offset=0, tensor=value.detach().reshape(-1)
                    )
                    for key, value in _factored(state, segment.holder)
                ]
            segment = _share(segment, rank, ranks)
        if segment.length:
            sources += _slices(segment, state)
    # Sorted: a loaded optimizer keeps its states in another order than one that made them, and files are to be the same.
    return sorted(sources, key=lambda source: (source.name, source.kind)), scalars


def _scalars(state: dict[str, Any]) -> dict[str, Any]:
    return {key: float(value) for key, value in state.items() if key == "step"}


def _factored(state: dict[str, Any], holder: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """States of another shape than their parameter's. Raises CheckpointError for one whose meaning is not known."""
    found = []
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.shape == holder.shape or key == "step" or key.startswith(("qmap", "absmax")):
            continue
        if key not in ("row_var", "col_var"):
            raise CheckpointError(f"optimizer state {key} of shape {tuple(value.shape)} cannot be saved", "use another optim.name")
        found.append((key, value))
    return found


def _slices(segment: Segment, state: dict[str, Any]) -> Iterator[Source]:
    begin, end = segment.offset, segment.offset + segment.length

    def source(kind: str, tensor: torch.Tensor, block_offset: int = 0) -> Source:
        return Source(name=segment.name, kind=kind, start=segment.start, shape=segment.shape, block_offset=block_offset, tensor=tensor)

    yield source(MASTER, segment.holder.detach().reshape(-1)[begin:end])
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.shape != segment.holder.shape or key == "step":
            continue
        if value.dtype != torch.uint8:
            yield source(key, value.detach().reshape(-1)[begin:end])
            continue
        yield source(key, value.detach().reshape(-1)[begin:end], begin % BLOCK_ELEMENTS)
        scales = state[f"absmax{key[-1]}"][begin // BLOCK_ELEMENTS : -(-end // BLOCK_ELEMENTS)]
        yield replace(source(f"absmax{key[-1]}", scales), start=0, shape=tuple(scales.shape))


# ------------------------------------------------------------------------------------------------------ and back


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Values of a checkpoint in host memory, checked, and the tensors they belong into."""

    masters: list[tuple[Segment, torch.Tensor]]
    states: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(slots=True, kw_only=True)
class Blocks:
    """An 8-bit state, flat, as codes and each element's scale; NaN where the checkpoint held plain numbers or nothing."""

    codes: torch.Tensor
    scales: torch.Tensor


class Reads:
    """Reads of a checkpoint into tensors, gathered first and then done all at once."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._wanted: list[Wanted] = []
        self._then: list[Callable[[], object]] = []

    def add(self, span: Span, target: torch.Tensor) -> None:
        """A span into a flat tensor in host memory; one of another dtype is rounded."""
        dtype = TORCH_DTYPE[span.fragment.dtype]
        held = target if target.dtype == dtype else torch.empty(target.numel(), dtype=dtype)
        if held.numel():
            self._wanted.append(self.reader.want(span, memoryview(held.view(torch.uint8).numpy())))  # type: ignore[arg-type]
        if held is not target:
            self.then(lambda: target.copy_(held))

    def add_range(self, name: str, kind: str, start: int, stop: int, target: torch.Tensor) -> None:
        for span in self.reader.find_spans(name, kind, start, stop):
            self.add(span, target[span.start - start : span.stop - start])

    def then(self, work: Callable[[], object]) -> None:
        """What is to be done with the values once they are there, in the order it was said."""
        self._then.append(work)

    def run(self) -> None:
        """Raises DamagedCheckpoint where a byte differs from what was written."""
        fetch(self.reader.storage, self._wanted)
        for work in self._then:
            work()


def load_fragments(engine: Any, reader: Reader) -> Loaded:
    """Read what this rank needs, without touching the engine. Raises DamagedCheckpoint, and CheckpointError for another model's."""
    segments = find_segments(engine)
    _check_names(segments, reader)
    reads = Reads(reader)
    masters = [(segment, torch.empty(segment.length)) for segment in segments]
    for segment, values in masters:
        reads.add_range(segment.name, MASTER, segment.start, segment.start + segment.length, values)
    by_holder: dict[int, list[Segment]] = {}
    for segment in segments:
        by_holder.setdefault(id(segment.holder), []).append(segment)
    states = [(group[0].holder, _read_state(engine, reads, group)) for group in by_holder.values()]
    reads.run()
    return Loaded(masters=masters, states=states)


def _check_names(segments: list[Segment], reader: Reader) -> None:
    for segment in segments:
        if MASTER not in reader.kinds.get(segment.name, ()):
            raise CheckpointError(f"the checkpoint has no weights of {segment.name}", "it was made by another method or model")
        if reader.shape(segment.name, MASTER) != segment.shape:
            raise CheckpointError(
                f"{segment.name} has shape {reader.shape(segment.name, MASTER)} in the checkpoint and {segment.shape} in the model",
                "it was made by another method or model",
            )


def _read_state(engine: Any, reads: Reads, segments: list[Segment]) -> dict[str, torch.Tensor]:
    """The optimizer's states of one holder, by name: fp32 of the holder's size, and 8-bit codes with their scales. They fill as `reads` run."""
    holder, reader = segments[0].holder, reads.reader
    kinds = {kind for kind in reader.kinds[segments[0].name] if kind not in (MASTER, BEST) and not kind.startswith("absmax")}
    loaded: dict[str, torch.Tensor] = {}
    for kind in sorted(kinds):
        shape = reader.shape(segments[0].name, kind)
        if shape != segments[0].shape:  # factored
            if holder.shape != segments[0].shape:
                raise CheckpointError(
                    f"the checkpoint was made under ZeRO stage {reader.commit.zero_stage}, where {reader.commit.optimizer} keeps {kind}, "
                    f"and stage {engine.zero_optimization_stage()} keeps a full state", "set parallel.zero_stage back"
                )  # fmt: skip
            values = torch.empty(_numel(shape))
            reads.add_range(segments[0].name, kind, 0, _numel(shape), values)
            loaded[kind] = values.view(shape)
            continue
        padded = holder.numel() > sum(segment.length for segment in segments)
        values = loaded[kind] = torch.zeros(holder.numel()) if padded else torch.empty(holder.numel())
        spans = [(s, span) for s in segments for span in reader.find_spans(s.name, kind, s.start, s.start + s.length)]
        blocks: Blocks | None = None
        if any(span.fragment.dtype == "U8" for _, span in spans):
            blocks = Blocks(codes=torch.zeros(holder.numel(), dtype=torch.uint8), scales=torch.full((holder.numel(),), torch.nan))
            loaded[f"codes/{kind}"], loaded[f"scales/{kind}"] = blocks.codes, blocks.scales
        for s, span in spans:
            at = slice(s.offset + span.start - s.start, s.offset + span.stop - s.start)
            if blocks is not None and span.fragment.dtype == "U8":
                _read_codes(reads, span, kind, values[at], Blocks(codes=blocks.codes[at], scales=blocks.scales[at]))
            else:
                reads.add(span, values[at])
    return loaded


def _read_codes(reads: Reads, span: Span, kind: str, values: torch.Tensor, blocks: Blocks) -> None:
    """A span's codes, the scale of each of its elements, and what the two stand for."""
    own = reads.reader.find_own(span.rank, span.fragment.name, f"absmax{kind[-1]}")
    if own is None:
        raise CheckpointError(
            f"{reads.reader.commit.folder}: {kind} of {span.fragment.name} has no scales", "resume from an earlier one: --resume PATH"
        )
    scales = torch.empty(own.stop - own.start)
    reads.add(span, blocks.codes)
    reads.add(own, scales)

    def scale() -> None:
        place = torch.arange(span.start, span.stop) - span.fragment.start + span.fragment.block_offset
        blocks.scales.copy_(scales[place // BLOCK_ELEMENTS])
        values.copy_(_code_of(kind)[blocks.codes.long()] * blocks.scales)

    reads.then(scale)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def read_whole(reader: Reader, name: str, kind: str) -> torch.Tensor:
    """A tensor of the checkpoint, whole, flat and in the dtype it was saved in."""
    return _read_plain(reader, name, kind, 0, _numel(reader.shape(name, kind)))


def _read_plain(reader: Reader, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
    dtypes = {span.fragment.dtype for span in reader.find_spans(name, kind, start, stop)}
    values = torch.empty(stop - start, dtype=TORCH_DTYPE[dtypes.pop()])
    reads = Reads(reader)
    reads.add_range(name, kind, start, stop, values)
    reads.run()
    return values


def _code_of(kind: str) -> torch.Tensor:
    """The values that bitsandbytes' codes stand for: signed for the first moment, positive for the second."""
    from bitsandbytes.functional import create_dynamic_map

    code: torch.Tensor = create_dynamic_map(signed=not kind.endswith("2"))
    return code


@torch.no_grad()
def put_fragments(engine: Any, loaded: Loaded, scalars: dict[str, Any]) -> None:
    """Put loaded values into the engine: masters, optimizer states, and the low-precision weights made from the masters."""
    inner = inner_optimizer(engine)
    for segment, values in loaded.masters:
        segment.holder.detach().view(-1)[segment.offset : segment.offset + segment.length].copy_(values)
    for holder, states in loaded.states:
        if not states:
            continue
        if type(inner).__module__.startswith("bitsandbytes"):
            _put_bitsandbytes(engine, inner, holder, states, scalars)
        else:
            device = holder.device if any(group.get("fused") for group in inner.param_groups) else "cpu"
            inner.state[holder] = {"step": torch.tensor(scalars["step"], dtype=torch.float32, device=device)} if "step" in scalars else {}
            for kind, values in states.items():
                shaped = values if values.dim() > 1 else values.view(holder.shape)  # factored states come in their own shape
                inner.state[holder][kind] = shaped.to(device=holder.device)
    _refresh_weights(engine)


def _put_bitsandbytes(engine: Any, inner: Any, holder: torch.Tensor, states: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
    gindex, pindex = _place_of(engine, inner, holder)
    group, held = inner.param_groups[gindex], inner.param_groups[gindex]["params"]
    if engine.zero_optimization_stage() == 3:
        group["params"] = [holder]  # as DeepSpeed does for the time of a step (stage3.py, _optimizer_step)
    inner.state.pop(holder, None)
    inner.init_state(group, holder, gindex, pindex)
    group["params"] = held
    state = inner.state[holder]
    state["step"] = int(scalars["step"])
    for kind in [kind for kind in states if "/" not in kind]:
        target = state[kind]
        if target.dtype == torch.uint8:
            _put_codes(state, kind, states)
        else:
            target.view(-1).copy_(states[kind])


def _place_of(engine: Any, inner: Any, holder: torch.Tensor) -> tuple[int, int]:
    if engine.zero_optimization_stage() == 3:
        outer = engine.optimizer
        sub_group = next(i for i, tensor in enumerate(outer.fp32_partitioned_groups_flat) if tensor is holder)
        return outer.sub_group_to_group_id[sub_group], 0
    return next((g, p) for g, group in enumerate(inner.param_groups) for p, tensor in enumerate(group["params"]) if tensor is holder)


def _put_codes(state: dict[str, Any], kind: str, states: dict[str, torch.Tensor]) -> None:
    """Fill an 8-bit state. Where all elements of a block come from one scale, its codes are kept as they are, so that nothing
    is lost; the other blocks, those that another world size cuts elsewhere, are quantised anew from their values.
    """
    from bitsandbytes.functional import quantize_blockwise

    values, code = states[kind], _code_of(kind)
    codes, quantised = quantize_blockwise(values, code=code, blocksize=BLOCK_ELEMENTS)
    scales = quantised.absmax
    if f"codes/{kind}" in states:
        size, blocks = values.numel(), scales.numel()
        padding = blocks * BLOCK_ELEMENTS - size
        old_codes = states[f"codes/{kind}"]
        each = torch.nn.functional.pad(states[f"scales/{kind}"], (0, padding), value=torch.nan).view(blocks, BLOCK_ELEMENTS)
        known = ~each.isnan()
        zero = torch.nn.functional.pad(values, (0, padding)).view(blocks, BLOCK_ELEMENTS) == 0
        top = each.nan_to_num(nan=-torch.inf).amax(dim=1)
        whole = ((each == top[:, None]) | (~known & zero)).all(dim=1) & known.any(dim=1)
        # What no shard holds is DeepSpeed's padding, and stays zero.
        zero_code = int(code.abs().argmin())
        old_codes = torch.where(states[f"scales/{kind}"].isnan(), torch.full_like(old_codes, zero_code), old_codes)
        keep = whole.repeat_interleave(BLOCK_ELEMENTS)[:size]
        codes = torch.where(keep, old_codes, codes.view(-1))
        scales = torch.where(whole, top, scales)
    state[kind].view(-1).copy_(codes.view(-1))
    state[f"absmax{kind[-1]}"].copy_(scales)


def _refresh_weights(engine: Any) -> None:
    """Round the masters into the weights that the model computes with, as the end of a step does."""
    stage, outer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        outer._partition_all_parameters()
        for sub_group in range(len(outer.fp16_groups)):
            outer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if outer.persistent_parameters:
            outer.persistent_parameters[0].all_gather(outer.persistent_parameters)
    elif stage in (1, 2):
        outer.update_lp_params()
        for group in range(len(outer.bit16_groups)):
            outer._update_model_bit16_weights(group)
    elif not isinstance(outer, torch.optim.Optimizer):
        for low, high in zip(outer.fp16_groups, outer.fp32_groups, strict=True):
            for p, master in zip(low, high, strict=True):
                p.data.copy_(master.data)


# -------------------------------------------------------------------------------- the best weights, and loss scaling


def list_best(engine: Any, best_weights: dict[str, torch.Tensor]) -> list[Source]:
    """The best evaluation's weights (see best.py), cut as the masters are."""
    stage, rank, ranks = engine.zero_optimization_stage(), dist.get_rank(), dist.get_world_size()
    sources = []
    for segment in find_segments(engine) if best_weights else []:
        if stage == 0:
            segment = _share(segment, rank, ranks)
        begin = 0 if stage == 3 else segment.start
        tensor = best_weights[segment.name].reshape(-1)[begin : begin + segment.length]
        if segment.length:
            sources.append(Source(name=segment.name, kind=BEST, start=segment.start, shape=segment.shape, block_offset=0, tensor=tensor))
    return sources


def load_best(engine: Any, reader: Reader) -> dict[str, torch.Tensor]:
    """The best weights of a checkpoint in the shape of best.copy_trained; empty where it holds none."""
    weights: dict[str, torch.Tensor] = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad or BEST not in reader.kinds.get(name, ()):
            continue
        if engine.zero_optimization_stage() != 3:
            weights[name] = _read_plain(reader, name, BEST, 0, p.numel()).view(p.shape).to(p.dtype)
            continue
        shard = torch.zeros(p.ds_tensor.shape, dtype=p.ds_tensor.dtype)
        start = dist.get_rank(group=engine.optimizer.dp_process_group) * p.partition_numel()
        stop = min(start + p.partition_numel(), p.ds_numel)
        if stop > start:
            shard.view(-1)[: stop - start] = _read_plain(reader, name, BEST, start, stop)
        weights[name] = shard
    return weights


SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_loss_scale(engine: Any) -> dict[str, float]:
    """The dynamic loss scale of fp16 training; empty for other dtypes."""
    scaler = _scaler(engine)
    return {name: float(vars(scaler)[name]) for name in SCALER_FIELDS if name in vars(scaler)} if scaler is not None else {}


def put_loss_scale(engine: Any, fields: dict[str, float]) -> None:
    scaler = _scaler(engine)
    if scaler is not None:
        for name, value in fields.items():
            setattr(scaler, name, value if name == "cur_scale" else int(value))


def _scaler(engine: Any) -> Any:
    if not engine.fp16_enabled():
        return None
    return engine.optimizer.loss_scaler if engine.zero_optimization_stage() else engine.optimizer.loss_scale_config


def count_bytes(sources: list[Source]) -> int:
    return sum(s.tensor.numel() * DTYPE_BYTES[SAFETENSORS_DTYPE[s.tensor.dtype]] for s in sources)
