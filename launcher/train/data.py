"""From rows to the tensors of a step: tokenise once, pack, order, batch.

    sources ─► examples ─► tokens on disk ─► Samples ─► global batch ─► StepBatch of a rank
               formats     once a content    packs      (seed, epoch,   micro-batches
                           hash              by index   cursor)

Nothing here talks to other ranks: every rank computes the same plan from the same bytes.
Shapes: B samples of a micro-batch, S tokens of a sample.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from launcher.data.formats import make_examples
from launcher.errors import DataError, ModelError
from launcher.recipe import Data, Source
from launcher.train.encode import FORMAT_VERSION, IGNORED, Ints, build_encoder, hash_json
from launcher.train.tokens import Progress, Tokens, count_targets, load_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_LEAK_TOLERANCE = 1e-3  # of the logits' deviation; measured: 0 in models that keep apart, 2.6e-3 (LFM2) to 1.9 (MPT) in others


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence, its examples one after the other. Labels are IGNORED where there is no loss, and not shifted."""

    input_ids: Ints
    labels: Ints
    position_ids: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """How an encoder-decoder's samples are cut and begun: the longest source and target, and what a decoder is given before its first token."""

    source_len: int
    target_len: int
    start_id: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """A split, read by index. A sample is a pack of examples, or one example where packing is off.

    `num_targets[i]` counts the tokens that sample i predicts: those with loss, except the first of each example.
    """

    num_tokens: Ints
    num_targets: Ints
    seq_len: int
    pad_id: int
    pair: Pair | None
    content_hash: str
    source_hashes: dict[str, str]
    num_dropped: int
    num_truncated: int
    _tokens: tuple[Tokens, ...]
    _source: Ints
    _start: Ints
    _length: Ints
    _packs: Ints
    _pack_ends: Ints

    def __len__(self) -> int:
        return len(self._pack_ends)

    @property
    def num_examples(self) -> int:
        """Examples of an epoch, repeated ones counted each time."""
        return len(self._length)

    @property
    def fill(self) -> float:
        """Mean share of seq_len (and of the longest target) that a sample uses."""
        return float(self.num_tokens.mean() / (self.seq_len + (self.pair.target_len if self.pair else 0)))

    def sample(self, index: int) -> Sample:
        """Sample `index`, with position ids that restart at 0 for each of its examples."""
        begin = int(self._pack_ends[index - 1]) if index else 0
        examples = self._packs[begin : int(self._pack_ends[index])]
        parts = [self._tokens[self._source[e]].stored[self._start[e] : self._start[e] + self._length[e]] for e in examples]
        if self.pair is not None:
            parts = [_cut_pair(part, self.pair) for part in parts]
        stored = np.concatenate(parts).astype(np.int64)
        labels = np.where(stored < 0, IGNORED, stored)
        position_ids = np.concatenate([np.arange(len(part), dtype=np.int64) for part in parts])
        labels[position_ids == 0] = IGNORED  # else it would be predicted from the example before
        return Sample(np.where(stored < 0, ~stored, stored), labels, position_ids)

    def stats(self) -> dict[str, int | float]:
        """What there is to say about the split, by name."""
        return {
            "examples": self.num_examples,
            "samples": len(self),
            "tokens": int(self.num_tokens.sum()),
            "target_tokens": int(self.num_targets.sum()),
            "mean_length": round(float(self._length.mean()), 1),
            "p50_length": int(np.median(self._length)),
            "max_length": int(self._length.max()),
            "fill": round(self.fill, 4),
            "dropped": self.num_dropped,
            "truncated": self.num_truncated,
        }


def load_samples(
    data: Data,
    split: Literal["train", "eval"],
    tokenizer: PreTrainedTokenizerFast,
    *,
    base_dir: str,
    seed: int,
    cache_dir: Path,
    progress: Progress | None = None,
    start_id: int | None = None,
) -> Samples:
    """The samples of a split, tokenised once per content and kept under cache_dir/tokens.

    `start_id`: what an encoder-decoder's decoder begins with; its samples are pairs of a source and a target, one each.

    `progress` is called with the number of examples so far. The same arguments give the same samples on every rank.
    Raises DataError for bad rows, examples that are too long and an empty split, ModelError for templates.
    """
    pair = None if start_id is None else Pair(source_len=data.seq_len, target_len=data.target_len or data.seq_len, start_id=start_id)
    encoder = build_encoder(data, tokenizer, base_dir, pairs=pair is not None)
    held_out = split == "eval" and not data.eval
    sources = data.train if split == "train" or held_out else data.eval
    if held_out and not data.eval_fraction:
        raise DataError("there is no held-out set", "set data.eval or data.eval_fraction")
    tokens: list[Tokens] = []
    for source in sources:
        tokens.append(load_tokens(source, data, encoder, base_dir, cache_dir, progress, sum(len(t.ends) for t in tokens)))

    counts = [len(t.ends) for t in tokens]
    kept = _choose_rows(counts, data.eval_fraction, seed, held_out=held_out) if data.eval_fraction else np.ones(sum(counts), np.bool_)
    rows = np.flatnonzero(kept) if held_out else _weigh_rows(kept, counts, [source.weight for source in sources], seed)
    source_of_row = np.repeat(np.arange(len(tokens)), counts)
    lengths = np.concatenate([t.lengths for t in tokens])
    starts = np.concatenate([t.ends for t in tokens]) - lengths
    num_targets = np.concatenate([t.num_targets for t in tokens])

    whole = lengths
    if pair is not None:
        lengths = _cut_lengths(lengths, num_targets, pair)
        too_long = rows[whole[rows] > lengths[rows]]
        if len(too_long) and data.too_long == "error":
            raise _refuse_long_pairs(too_long, whole, num_targets, pair, lambda row: _find_row(row, sources, data, base_dir))
        if data.too_long == "drop":
            rows = rows[whole[rows] == lengths[rows]]
        num_targets = np.minimum(num_targets, pair.target_len)
    else:
        too_long = rows[lengths[rows] > data.seq_len]
    if pair is None and len(too_long) and data.too_long == "error":
        worst = int(too_long[np.argmax(lengths[too_long])])
        where, count = _find_row(worst, sources, data, base_dir), len(np.unique(too_long))
        raise DataError(
            f"{count} of {sum(counts)} examples are longer than data.seq_len {data.seq_len}: {where} has {lengths[worst]} tokens, the most",
            f"set data.seq_len to {lengths[worst]}, data.too_long to drop, or data.too_long to truncate",
        )
    if pair is None and data.too_long == "drop":
        rows = rows[lengths[rows] <= data.seq_len]
    for row in np.unique(too_long) if pair is None and data.too_long == "truncate" else ():
        lengths[row] = data.seq_len
        num_targets[row] = count_targets(tokens[source_of_row[row]].stored[starts[row] : starts[row] + data.seq_len])
    num_before = len(rows)
    rows = rows[num_targets[rows] > 0]
    num_dropped = (len(too_long) if data.too_long == "drop" else 0) + num_before - len(rows)
    if not len(rows):
        raise DataError(
            f"the {split} split is empty: of {sum(counts)} rows none is left with a token to learn ({num_dropped} dropped)",
            f"raise data.seq_len ({data.seq_len}), or see that data.chat_template marks the answers",
        )

    packs, pack_ends = _make_packs(lengths[rows], data.seq_len) if data.packing else (np.arange(len(rows)), np.arange(1, len(rows) + 1))
    token_hashes, weights = [t.hash for t in tokens], [s.weight for s in sources]
    facts: tuple[Any, ...] = (
        FORMAT_VERSION,
        split,
        token_hashes,
        weights,
        data.eval_fraction,
        seed,
        data.seq_len,
        data.too_long,
        data.packing,
    )
    facts += (pair.target_len, pair.start_id) if pair is not None else ()
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Samples(
        num_tokens=_sum_packs(lengths[rows], packs, pack_ends),
        num_targets=_sum_packs(num_targets[rows], packs, pack_ends),
        seq_len=data.seq_len,
        pad_id=int(pad_id),
        pair=pair,
        content_hash=hash_json(facts),
        source_hashes={name: digest for t in tokens for name, digest in t.files.items()},
        num_dropped=num_dropped,
        num_truncated=int((num_targets[too_long] > 0).sum()) if data.too_long == "truncate" else 0,
        _tokens=tuple(tokens),
        _source=source_of_row[rows],
        _start=starts[rows],
        _length=(lengths if pair is None else whole)[rows],
        _packs=packs,
        _pack_ends=pack_ends,
    )


def _cut_lengths(lengths: Ints, num_targets: Ints, pair: Pair) -> Ints:
    """Of pairs, source and target each cut to the longest there may be."""
    cut: Ints = np.minimum(lengths - num_targets, pair.source_len) + np.minimum(num_targets, pair.target_len)
    return cut


def _cut_pair(stored: npt.NDArray[np.int32], pair: Pair) -> npt.NDArray[np.int32]:
    """A pair's tokens, a long source cut before the token that ends it, a long target where it is full."""
    source, target = stored[stored < 0], stored[stored >= 0]
    if len(source) > pair.source_len:
        source = np.concatenate([source[: pair.source_len - 1], source[-1:]])
    return np.concatenate([source, target[: pair.target_len]])


def _refuse_long_pairs(too_long: Ints, lengths: Ints, num_targets: Ints, pair: Pair, where: Callable[[int], str]) -> DataError:
    source = int(too_long[np.argmax((lengths - num_targets)[too_long])])
    target = int(too_long[np.argmax(num_targets[too_long])])
    longest, longest_target = int((lengths - num_targets)[source]), int(num_targets[target])
    found = [f"{where(source)} has a source of {longest} tokens"] if longest > pair.source_len else []
    found += [f"{where(target)} has a target of {longest_target}"] if longest_target > pair.target_len else []
    remedies = [f"data.seq_len to {longest}"] if longest > pair.source_len else []
    remedies += [f"data.target_len to {longest_target}"] if longest_target > pair.target_len else []
    return DataError(
        f"{len(np.unique(too_long))} examples are longer than data.seq_len {pair.source_len} or data.target_len {pair.target_len}:"
        f" {', '.join(found)}, the most",
        f"set {' and '.join(remedies)}, or data.too_long to drop or to truncate",
    )


def _find_row(row: int, sources: Sequence[Source], data: Data, base_dir: str) -> str:
    """Where a row stands. That is not kept with the tokens: the sources are read once more up to it."""
    examples = chain.from_iterable(make_examples(source, base_dir, data) for source in sources)
    return next(islice(examples, row, None)).where


def _make_random_order(count: int, *key: int) -> Ints:
    """A permutation that depends on `key` alone. Raw Philox bits, because numpy may change how it shuffles."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(np.asarray(bits, np.uint64), kind="stable").astype(np.int64)


def _choose_rows(counts: list[int], fraction: float, seed: int, *, held_out: bool) -> npt.NDArray[np.bool_]:
    """Which rows are held out, or which are not: by (seed, row) alone. Raises DataError where nothing is left."""
    total = sum(counts)
    if total < 2:
        raise DataError(f"{total} row cannot be split by data.eval_fraction {fraction:g}", "add rows, or name data.eval")
    chosen = np.zeros(total, np.bool_)
    chosen[_make_random_order(total, seed, 1)[: min(max(round(total * fraction), 1), total - 1)]] = True
    return chosen if held_out else ~chosen


def _weigh_rows(kept: npt.NDArray[np.bool_], counts: list[int], weights: list[float], seed: int) -> Ints:
    """The rows of an epoch: each as often as the whole part of its source's weight, and a share of them once more."""
    rows: list[Ints] = []
    begin = 0
    for index, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        own = begin + np.flatnonzero(kept[begin : begin + count])
        whole, share = int(weight), weight - int(weight)
        more = np.sort(_make_random_order(len(own), seed, 2, index)[: round(len(own) * share)])
        rows += [np.tile(own, whole), own[more]]
        begin += count
    return np.concatenate(rows)


def _make_packs(lengths: Ints, seq_len: int) -> tuple[Ints, Ints]:
    """Best-fit decreasing: the examples of each pack, flat, and where each pack ends.

    Each example, longest first, goes to the pack with the least room that still holds it; O(n log n).
    """
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # by room left
    rooms: list[int] = []  # the keys of open_packs, sorted
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            pack = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[at]
        else:
            room, pack = seq_len, len(packs)
            packs.append([])
        packs[pack].append(example)
        if room > length:
            if room - length not in open_packs:
                open_packs[room - length] = []
                insort(rooms, room - length)
            open_packs[room - length].append(pack)
    return np.concatenate([np.asarray(pack, np.int64) for pack in packs]), np.cumsum([len(pack) for pack in packs])


def _sum_packs(values: Ints, packs: Ints, pack_ends: Ints) -> Ints:
    return np.diff(np.cumsum(values[packs])[pack_ends - 1], prepend=0)


# ---------------------------------------------------------------------------------------------- order and batches


@lru_cache(maxsize=4)
def make_epoch_order(num_samples: int, seed: int, epoch: int) -> Ints:
    """The order of an epoch: a permutation of range(num_samples) that depends on (seed, epoch) alone."""
    order = _make_random_order(num_samples, seed, 3, epoch)
    order.setflags(write=False)
    return order


def global_batch(cursor: int, *, num_samples: int, global_batch_size: int, total_samples: int, seed: int) -> Ints:
    """The samples of the step that begins after `cursor` samples. It may straddle epochs; only the last is short."""
    epochs, places = np.divmod(np.arange(cursor, min(cursor + global_batch_size, total_samples)), num_samples)
    parts = [make_epoch_order(num_samples, seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts) if parts else places


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """What one optimizer step sees: all its samples by id, this rank's micro-batches, targets and tokens over all ranks."""

    sample_ids: Ints
    micro_batches: tuple[dict[str, torch.Tensor], ...]
    num_targets: int
    num_tokens: int


def open_steps(
    samples: Samples,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    total_samples: int,
    start: int = 0,
    flat: bool = False,
) -> Iterator[StepBatch]:
    """The steps after `start` samples, for one rank. A function of its arguments: ranks need not talk.

    A rank takes every world_size-th sample of the global batch, so that the batch is the same at any world size.
    Each rank gives as many micro-batches every step; the last, short batch is filled with samples without targets.
    `flat` is collate's. Raises ValueError where global_batch_size is not divisible by micro_batch_size x world_size.
    """
    if global_batch_size % (micro_batch_size * world_size):
        raise ValueError(f"global_batch_size {global_batch_size} is no multiple of {micro_batch_size} x {world_size} ranks")
    per_rank = global_batch_size // world_size
    cursor = start
    while cursor < total_samples:
        ids = global_batch(cursor, num_samples=len(samples), global_batch_size=global_batch_size, total_samples=total_samples, seed=seed)
        micro_batches = _collate_ids(samples, ids[rank::world_size], per_rank, micro_batch_size, flat)
        yield StepBatch(ids, tuple(micro_batches), int(samples.num_targets[ids].sum()), int(samples.num_tokens[ids].sum()))
        cursor += len(ids)


def open_eval_batches(
    samples: Samples, *, micro_batch_size: int, rank: int, world_size: int, flat: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Every sample once over the ranks, in order; each rank gives equally many batches, filled without targets."""
    num_batches = -(-len(samples) // (micro_batch_size * world_size))
    yield from _collate_ids(samples, np.arange(len(samples))[rank::world_size], num_batches * micro_batch_size, micro_batch_size, flat)


def _collate_ids(samples: Samples, ids: Ints, count: int, micro_batch_size: int, flat: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of the samples `ids`, completed to `count`."""
    zero = np.zeros(1, np.int64)
    filler = Sample(zero + samples.pad_id, zero + IGNORED, zero)
    for begin in range(0, count, micro_batch_size):
        picked = [samples.sample(int(i)) for i in ids[begin : begin + micro_batch_size]]
        picked += [filler] * (micro_batch_size - len(picked))
        yield (
            collate(picked, samples.pad_id, flat=flat)
            if samples.pair is None
            else collate_pairs(picked, samples.pad_id, samples.pair.start_id)
        )


def check_packing(model: torch.nn.Module) -> None:
    """Check by one small forward pass that a model keeps the examples of a sequence apart by their position ids.

    Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX and their like do, to the last bit. GPT-OSS, BERT, RoBERTa, OPT, Bloom, Falcon and MPT do not hand
    position ids to their mask, and convolutions and state spaces (Mamba, LFM2) read across (transformers 5.23).
    Raises ModelError.
    """
    import torch

    device, was_training = next(model.parameters()).device, model.training
    position_ids_BS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    sequences = [torch.tensor([[*first, 3, 4, 5, 6]], device=device) for first in ((7, 8, 9, 10), (11, 12, 13, 14))]
    model.eval()
    # LLM.int8() picks its columns of outliers over all rows at once: examples would see that of each other, and nothing else.
    in_8_bits: list[Any] = [m.state for m in model.modules() if type(m).__name__ == "Linear8bitLt" and "bitsandbytes" in type(m).__module__]
    thresholds = [state.threshold for state in in_8_bits]
    for state in in_8_bits:
        state.threshold = 0.0
    try:
        with torch.no_grad():
            one, other = (model(input_ids=ids_BS, position_ids=position_ids_BS, use_cache=False).logits[0, 4:] for ids_BS in sequences)
        leak = float((one - other).abs().max() / one.float().std())
    except TypeError:
        leak = float("inf")  # takes no position_ids
    finally:
        model.train(was_training)
        for state, threshold in zip(in_8_bits, thresholds, strict=True):
            state.threshold = threshold
    if leak > _LEAK_TOLERANCE:
        raise ModelError(f"{type(model).__name__} lets an example of a pack see the one before it", "set data.packing to false")


def collate(samples: Sequence[Sample], pad_id: int, *, flat: bool = False) -> dict[str, torch.Tensor]:
    """input_ids, labels and position_ids of a micro-batch, right-padded to its longest sample.

    There is no attention_mask: where it is None, transformers keeps the examples of a sequence apart by their restarting
    position ids (masking_utils.find_packed_sequence_indices). The padding is a sequence of its own, without loss.
    `flat` puts all samples into one row, B = 1, with no padding: flash attention keeps examples apart in such a row only
    (modeling_flash_attention_utils._is_packed_sequence).
    """
    import torch

    if flat:
        names = ("input_ids", "labels", "position_ids")
        rows = [[s.input_ids for s in samples], [s.labels for s in samples], [s.position_ids for s in samples]]
        return {name: torch.from_numpy(np.concatenate(parts))[None] for name, parts in zip(names, rows, strict=True)}
    shape = (len(samples), max(len(s.input_ids) for s in samples))
    input_ids_BS, labels_BS = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    position_ids_BS = np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids_BS[row, :length] = sample.input_ids
        labels_BS[row, :length] = sample.labels
        position_ids_BS[row, :length] = sample.position_ids
        position_ids_BS[row, length:] = np.arange(shape[1] - length)
    arrays = {"input_ids": input_ids_BS, "labels": labels_BS, "position_ids": position_ids_BS}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def collate_pairs(samples: Sequence[Sample], pad_id: int, start_id: int) -> dict[str, torch.Tensor]:
    """input_ids of the sources, labels of the targets, decoder_input_ids one place behind them, each right-padded to its longest.

    attention_mask says what of a source is padding, and is left out where nothing is: transformers then needs no mask. A target's padding
    needs none: it stands behind all that is learned.
    """
    import torch

    sources = [s.input_ids[s.labels == IGNORED] for s in samples]
    targets = [s.input_ids[s.labels != IGNORED] for s in samples]
    source_shape, target_shape = (len(samples), max(map(len, sources))), (len(samples), max(1, *map(len, targets)))
    input_ids_BS, mask_BS = np.full(source_shape, pad_id, np.int64), np.zeros(source_shape, np.int64)
    labels_BT, begun_BT = np.full(target_shape, IGNORED, np.int64), np.full(target_shape, pad_id, np.int64)
    begun_BT[:, 0] = start_id
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        input_ids_BS[row, : len(source)] = source
        mask_BS[row, : len(source)] = 1
        labels_BT[row, : len(target)] = target
        begun_BT[row, 1 : len(target)] = target[:-1]
    arrays = {"input_ids": input_ids_BS, "decoder_input_ids": begun_BT, "labels": labels_BT}
    arrays |= {} if mask_BS.all() else {"attention_mask": mask_BS}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
