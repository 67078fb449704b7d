"""What the model will be given, for a person to look at: examples with their loss marked, lengths, how full packs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.plan import Plan
from launcher.plan.speed import find_target_len
from launcher.run import cache_dir
from launcher.train.data import Sample, Samples, load_samples
from launcher.train.encode import IGNORED
from launcher.train.model import find_start_id, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COUNTED_SAMPLES = 5000
"""Lengths are taken from so many samples at most: enough for their distribution."""
HISTOGRAM_BINS = 10


@dataclass(frozen=True, slots=True)
class Part:
    """A run of tokens that all carry loss, or none of them."""

    text: str
    loss: bool


@dataclass(frozen=True, slots=True)
class Bin:
    """How many examples are `shortest` to `longest` tokens long."""

    shortest: int
    longest: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownExample:
    """An example as the model reads it."""

    parts: list[Part]
    tokens: int
    target_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSplit:
    """A split in numbers."""

    split: str
    stats: dict[str, int | float]
    histogram: list[Bin]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownData:
    splits: list[ShownSplit]
    examples: list[ShownExample]
    seq_len: int
    packing: bool
    target_len: int | None = None
    """The longest target of an encoder-decoder's pairs, whose longest source is seq_len."""


def inspect_data(plan: Plan, rows: int) -> ShownData:
    """The data of a plan, with its first `rows` training examples written out. Raises DataError and ModelError."""
    data = plan.recipe.data
    tokenizer = load_tokenizer(plan)

    def load(split: Any) -> Samples:
        return load_samples(data, split, tokenizer, base_dir=plan.base_dir, seed=plan.recipe.seed, cache_dir=cache_dir(),
                            start_id=find_start_id(plan, tokenizer))  # fmt: skip

    train = load("train")
    splits = [_show_split("train", train)]
    if data.eval or data.eval_fraction:
        splits.append(_show_split("eval", load("eval")))
    return ShownData(splits=splits, examples=_show_examples(train, tokenizer, rows), seq_len=data.seq_len, packing=bool(data.packing),
                     target_len=find_target_len(plan.recipe, plan.shape) or None)  # fmt: skip


def _show_split(name: str, samples: Samples) -> ShownSplit:
    counted = range(min(len(samples), COUNTED_SAMPLES))
    lengths = np.concatenate([_lengths(samples.sample(index)) for index in counted])
    counts, edges = np.histogram(lengths, bins=min(HISTOGRAM_BINS, int(lengths.max() - lengths.min()) + 1))
    lasts = [False] * (len(counts) - 1) + [True]  # the last bin holds its upper edge, the others do not
    histogram = [
        Bin(int(np.ceil(low)), int(high) if last else int(np.ceil(high)) - 1, int(count))
        for count, low, high, last in zip(counts, edges[:-1], edges[1:], lasts, strict=True)
    ]
    return ShownSplit(split=name, stats=samples.stats(), histogram=histogram)


def _lengths(sample: Sample) -> Any:
    starts = np.flatnonzero(sample.position_ids == 0)
    return np.diff(np.append(starts, len(sample.position_ids)))


def _show_examples(samples: Samples, tokenizer: PreTrainedTokenizerFast, rows: int) -> list[ShownExample]:
    shown: list[ShownExample] = []
    for index in range(len(samples)):
        sample = samples.sample(index)
        ends = np.cumsum(_lengths(sample))
        for end, length in zip(ends, np.diff(ends, prepend=0), strict=True):
            if len(shown) == rows:
                return shown
            part = slice(end - length, end)
            shown.append(_show_example(sample.input_ids[part], sample.labels[part], tokenizer))
    return shown


def _show_example(ids_S: Any, labels_S: Any, tokenizer: PreTrainedTokenizerFast) -> ShownExample:
    """The text in runs of tokens with and without loss. Cut by decoding prefixes, so that a tokenizer that
    strips the space before a first word does not lose it within the text."""
    carries = labels_S != IGNORED
    ends = [*(np.flatnonzero(np.diff(carries)) + 1).tolist(), len(ids_S)]
    parts: list[Part] = []
    before = ""
    for end in ends:
        text = tokenizer.decode(ids_S[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(Part(text[len(before) :], bool(carries[end - 1])))
        before = text
    return ShownExample(parts=parts, tokens=len(ids_S), target_tokens=int(carries.sum()))
