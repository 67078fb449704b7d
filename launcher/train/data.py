"""From rows to the tensors of a step: tokenise once, pack, order, batch.

    sources ─► examples ─► tokens on disk ─► Samples ─► global batch ─► StepBatch of a rank
               formats     once a content    packs      (seed, epoch,   micro-batches
                           hash              by index   cursor)

Nothing here talks to other ranks: every rank computes the same plan from the same bytes.
Shapes: B samples of a micro-batch, S tokens of a sample.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from launcher.data.check import make_template_error
from launcher.data.formats import Conversation, Example, Text, load_chat_template, make_examples
from launcher.data.rows import HUB_SCHEME, find_files, load_hub
from launcher.errors import DataError, ModelError
from launcher.recipe import Data, Source
from launcher.units import format_bytes

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""The label of a token without loss (torch.nn.functional.cross_entropy's ignore_index)."""
FORMAT_VERSION = 1
"""Part of every content hash: raise it when the same rows give other tokens."""
_EXAMPLES_A_BATCH = 512
_LEAK_TOLERANCE = 1e-3  # of the logits' deviation; measured: 0 in models that keep apart, 2.6e-3 (LFM2) to 1.9 (MPT) in others
_ARRAYS = {"stored": "<i4", "ends": "<i8", "num_targets": "<i8"}

Ints = npt.NDArray[np.int64]
Progress = Callable[[int], None]
Span = tuple[int, int]
"""Characters [start, end) of a text."""


# ---------------------------------------------------------------------------------------------- tokens and loss


@dataclass(frozen=True, slots=True)
class _Encoder:
    """How examples become tokens: the tokenizer, the template, and which tokens carry loss."""

    tokenizer: PreTrainedTokenizerFast
    pipeline: str
    template: str | None
    marks_answers: bool
    special_tokens: tuple[str, ...]
    starts_with_bos: bool
    loss_on: Literal["assistant", "all"]
    hash: str


def _build_encoder(data: Data, tokenizer: PreTrainedTokenizerFast, base_dir: str) -> _Encoder:
    """Raises ModelError for a tokenizer without a fast backend, or with no token that ends a text."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"the tokenizer is a {type(tokenizer).__name__}, not a fast one", "use a model with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no token that ends a text (eos_token)", "name one in its tokenizer_config.json")
    template = load_chat_template(data, base_dir)
    if template is None and tokenizer.chat_template is not None:
        template = tokenizer.get_chat_template()
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    pipeline |= {"truncation": None, "padding": None}  # state of the last call
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    first_ids: list[int] = tokenizer("a")["input_ids"]
    starts_with_bos = tokenizer.bos_token_id is not None and first_ids[0] == tokenizer.bos_token_id
    facts = [FORMAT_VERSION, pipeline, template, tokenizer.special_tokens_map, starts_with_bos, data.system_prompt, data.loss_on]
    return _Encoder(
        tokenizer=tokenizer,
        # The post-processor adds special tokens, which templates write themselves, and trims spaces off the offsets.
        pipeline=json.dumps(pipeline | {"post_processor": None}),
        template=template,
        marks_answers=template is not None and _marks_answers(template),
        special_tokens=tuple(sorted(special, key=len, reverse=True)),
        starts_with_bos=starts_with_bos,
        loss_on=data.loss_on,
        hash=_hash_json(facts),
    )


def _marks_answers(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _encode(examples: Sequence[Example], encoder: _Encoder, backend: Tokenizer) -> list[Ints]:
    """The tokens of each example; one without loss is stored as ~id, which is negative.

    Raises ModelError or DataError where a template cannot write an example or its answers cannot be told apart.
    """
    written = [_write_plain(e, encoder) if isinstance(e, Text) or encoder.template is None else None for e in examples]
    chats = [e for e, plain in zip(examples, written, strict=True) if plain is None and isinstance(e, Conversation)]
    rendered = iter(_render(chats, encoder))
    texts, spans = zip(*(plain if plain is not None else next(rendered) for plain in written), strict=True)
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    tokens: list[Ints] = []
    for example, plain, encoding, answer_spans in zip(examples, written, encodings, spans, strict=True):
        ids = np.asarray(encoding.ids, dtype=np.int64)
        stored = ids if answer_spans is None else np.where(_find_targets(encoding.offsets, answer_spans), ids, ~ids)
        if plain is not None:
            stored = _close_plain(stored, encoder)
        if not len(stored):
            raise DataError(f"{example.where} gives no token", "drop the row")
        tokens.append(stored)
    return tokens


def _find_targets(offsets: list[Span], spans: list[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens hold a character of a span. Where a prompt's last space and an answer are one token, it is learned."""
    starts, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    inside = np.zeros(len(starts), dtype=np.bool_)
    for start, end in spans:
        inside |= (starts < end) & (ends > start)
    return inside


def _write_plain(example: Example, encoder: _Encoder) -> tuple[str, list[Span] | None]:
    """The text without a chat template, and the spans that carry loss; None: all of it."""
    if isinstance(example, Text):
        return example.text, None
    if example.joiner is None:
        raise make_template_error(example.where)
    *prompts, answer = (message.content for message in example.messages)
    prompt = "\n\n".join(prompts) + example.joiner
    text = prompt + answer
    return text, None if encoder.loss_on == "all" else [(len(prompt), len(text))]


def _close_plain(stored: Ints, encoder: _Encoder) -> Ints:
    """A text between the token that opens it, where the tokenizer has one, and the one that ends it, which carries loss."""
    bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    head = [~int(bos)] if encoder.starts_with_bos and (not len(stored) or stored[0] not in (bos, ~bos)) else []
    tail = [int(eos)] if not len(stored) or stored[-1] != eos else []
    return np.concatenate([np.asarray(head, np.int64), stored, np.asarray(tail, np.int64)])


def _render(chats: Sequence[Conversation], encoder: _Encoder) -> list[tuple[str, list[Span] | None]]:
    """The text of each conversation and the spans of its answers; None: everything carries loss."""
    if not chats:
        return []
    messages = [[{"role": m.role, "content": m.content} for m in chat.messages] for chat in chats]
    if encoder.loss_on == "assistant" and encoder.marks_answers:
        return [_render_marked(turns, chat, encoder) for turns, chat in zip(messages, chats, strict=True)]
    texts = [_apply_template(turns, chat, encoder) for turns, chat in zip(messages, chats, strict=True)]
    if encoder.loss_on == "all":
        return [(text, None) for text in texts]
    return [(text, _find_answers(text, turns, chat, encoder)) for text, turns, chat in zip(texts, messages, chats, strict=True)]


def _apply_template(turns: list[dict[str, str]], chat: Conversation, encoder: _Encoder, *, generate: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        text = encoder.tokenizer.apply_chat_template(turns, chat_template=encoder.template, tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        raise _make_refusal(chat, error) from None
    return str(text)


def _make_refusal(chat: Conversation, error: Exception) -> ModelError:
    problem = " ".join(str(error).split())
    roles = ", ".join(message.role for message in chat.messages[:6])
    hint = f"its turns: {roles}; set data.chat_template to another"
    return ModelError(f"{chat.where}: the chat template refuses the conversation: {problem}", hint)


def _render_marked(turns: list[dict[str, str]], chat: Conversation, encoder: _Encoder) -> tuple[str, list[Span]]:
    """Text and answers of a template that marks them itself with {% generation %}."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[turns], chat_template=encoder.template, return_assistant_tokens_mask=True, **encoder.tokenizer.special_tokens_map
        )
    except TemplateError as error:
        raise _make_refusal(chat, error) from None
    return texts[0], [(int(start), int(end)) for start, end in spans[0]]


def _find_answers(text: str, turns: list[dict[str, str]], chat: Conversation, encoder: _Encoder) -> list[Span]:
    """The spans of a conversation's answers, each with the token that ends its turn, in a template without marks.

    An answer begins where the conversation before it, rendered with the generation prompt, ends: that prompt is what the
    model will be asked with. It ends behind the special token that follows its text, or, where the template writes
    more than the text (a thinking block, a space), where the conversation rendered up to it ends. Either must be
    found in the rendered whole, so a template that rewrites earlier turns is refused, never masked by guess.
    """
    spans: list[Span] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if index == 0:
            raise ModelError(
                f"{chat.where} begins with an assistant turn, and there is no prompt before it to tell it from",
                "put a user message first, drop the turn, or set data.chat_template to one that marks answers with {% generation %}",
            )
        prompt = _apply_template(turns[:index], chat, encoder, generate=True)
        end = _find_end(text, prompt, turns[: index + 1], chat, encoder)
        if end is None:
            raise ModelError(
                f"{chat.where}: turn {index + 1} cannot be told apart: the chat template rewrites it in the whole conversation",
                "set data.chat_template to one that marks answers with {% generation %} ... {% endgeneration %}, or data.loss_on to all",
            )
        spans.append((len(prompt), end))
    return spans


def _find_end(text: str, prompt: str, turns: list[dict[str, str]], chat: Conversation, encoder: _Encoder) -> int | None:
    """Where the last of `turns` ends in the whole text; None where the text does not hold it as the template writes it."""
    if not text.startswith(prompt):
        return None
    for content in dict.fromkeys((turns[-1]["content"], turns[-1]["content"].strip())):
        if text.startswith(content, len(prompt)):
            after = len(prompt) + len(content)
            after += len(text[after:]) - len(text[after:].lstrip())
            for token in encoder.special_tokens:
                if text.startswith(token, after):
                    return after + len(token)
    rendered = _apply_template(turns, chat, encoder)
    eos = str(encoder.tokenizer.eos_token)
    for candidate in (rendered, rendered.removesuffix(eos)):  # some templates close every text with eos (Phi-3)
        if text.startswith(candidate) and len(candidate) > len(prompt):
            closed = candidate.rstrip()
            return len(closed) if closed.endswith(encoder.special_tokens) else len(candidate)
    return None


# ---------------------------------------------------------------------------------------------- tokens on disk


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tokens:
    """The tokenised examples of one source, in the order of its rows; `stored` is on disk."""

    stored: npt.NDArray[np.int32]
    ends: Ints
    num_targets: Ints
    hash: str
    files: dict[str, str]

    @property
    def lengths(self) -> Ints:
        return np.diff(self.ends, prepend=0)


def _load_tokens(
    source: Source, data: Data, encoder: _Encoder, base_dir: str, cache_dir: Path, progress: Progress | None, seen: int
) -> _Tokens:
    """The tokens of a source: those on disk under its content hash, else tokenised now."""
    files = _hash_source(source, base_dir)
    # Folders and names are left out, kinds are not: the same bytes at another place give the same tokens.
    contents = [(Path(name).suffixes, digest) for name, digest in files.items()]
    facts = (encoder.hash, contents, source.format, source.columns, source.limit)
    content_hash = _hash_json(facts)
    folder = cache_dir / "tokens" / content_hash
    tokens = _read_tokens(folder, files)
    if tokens is None:
        _write_tokens(folder, make_examples(source, base_dir, data), encoder, progress, seen)
        tokens = _read_tokens(folder, files)
    if tokens is None:
        raise DataError(f"{folder} cannot be read back after it was written", "check the disk, or set another cache folder")
    if progress is not None:
        progress(seen + len(tokens.ends))
    return tokens


def _hash_source(source: Source, base_dir: str) -> dict[str, str]:
    """sha256 of each file of a source; for a hub data set its fingerprint, which covers commit and split."""
    if source.path.startswith(HUB_SCHEME):
        return {f"{source.path}:{source.split}": str(load_hub(source)._fingerprint)}
    return {str(path): _hash_file(path) for path in find_files(source, base_dir)}


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


class _ArrayWriter:
    """A one-dimensional .npy file that grows: its header is padded by numpy so that the length can be set at the end."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.file = path.open("w+b")
        self.dtype = np.dtype(dtype)
        self.count = 0
        self.crc32 = 0
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: npt.NDArray[Any]) -> None:
        raw = values.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.crc32 = zlib.crc32(raw, self.crc32)
        self.count += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _write_tokens(folder: Path, examples: Iterator[Example], encoder: _Encoder, progress: Progress | None, seen: int) -> None:
    """Tokenise into a sibling folder and rename it: what stands under the hash is whole, whoever wrote it first."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(encoder.pipeline)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    num_bytes = 0
    try:
        temporary.mkdir(parents=True)
        arrays = {name: _ArrayWriter(temporary / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
        stored, ends, num_targets = arrays.values()
        while batch := list(islice(examples, _EXAMPLES_A_BATCH)):
            tokens = _encode(batch, encoder, backend)
            num_bytes += sum(4 * len(t) + 16 for t in tokens)
            lengths = np.asarray([len(t) for t in tokens], np.int64)
            ends.append(stored.count + np.cumsum(lengths))
            num_targets.append(np.asarray([_count_targets(t) for t in tokens], np.int64))
            stored.append(np.concatenate(tokens))
            if progress is not None:
                progress(seen + ends.count)
        for writer in arrays.values():
            writer.close()
        meta = {"version": FORMAT_VERSION, "arrays": {name: {"count": w.count, "crc32": w.crc32} for name, w in arrays.items()}}
        with (temporary / "meta.json").open("w") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = format_bytes(_free_bytes(folder))
        raise DataError(
            f"{temporary.parent} is full: the tokens need at least {format_bytes(num_bytes)}, and {free} are free",
            "free some space, or put output_dir on another disk",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _publish(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name. Where another process was first, its folder stays."""
    if folder.exists() and _read_tokens(folder, {}) is None:
        shutil.rmtree(folder, ignore_errors=True)  # cut off or damaged
    _sync_folder(temporary)
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_tokens(folder: Path, files: dict[str, str]) -> _Tokens | None:
    """The tokens of a folder; None where it is not there, not whole or not as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        facts = {name: (int(meta["arrays"][name]["count"]), int(meta["arrays"][name]["crc32"])) for name in arrays}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any((len(array), _make_crc32(array)) != facts[name] for name, array in arrays.items()):
        return None
    return _Tokens(**arrays, hash=folder.name, files=files)


def _make_crc32(array: npt.NDArray[Any]) -> int:
    crc32, step = 0, 1 << 22
    for start in range(0, len(array), step):
        crc32 = zlib.crc32(array[start : start + step].tobytes(), crc32)
    return crc32


def _count_targets(stored: npt.NDArray[Any]) -> int:
    """Tokens that are predicted: those with loss, but never the first, which has nothing before it."""
    return int((stored[1:] >= 0).sum())


# ---------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence, its examples one after the other. Labels are IGNORED where there is no loss, and not shifted."""

    input_ids: Ints
    labels: Ints
    position_ids: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """A split, read by index. A sample is a pack of examples, or one example where packing is off.

    `num_targets[i]` counts the tokens that sample i predicts: those with loss, except the first of each example.
    """

    num_tokens: Ints
    num_targets: Ints
    seq_len: int
    pad_id: int
    content_hash: str
    source_hashes: dict[str, str]
    num_dropped: int
    num_truncated: int
    _tokens: tuple[_Tokens, ...]
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
        """Mean share of seq_len that a sample uses."""
        return float(self.num_tokens.mean() / self.seq_len)

    def sample(self, index: int) -> Sample:
        """Sample `index`, with position ids that restart at 0 for each of its examples."""
        begin = int(self._pack_ends[index - 1]) if index else 0
        examples = self._packs[begin : int(self._pack_ends[index])]
        parts = [self._tokens[self._source[e]].stored[self._start[e] : self._start[e] + self._length[e]] for e in examples]
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
) -> Samples:
    """The samples of a split, tokenised once per content and kept under cache_dir/tokens.

    `progress` is called with the number of examples so far. The same arguments give the same samples on every rank.
    Raises DataError for bad rows, examples that are too long and an empty split, ModelError for templates.
    """
    encoder = _build_encoder(data, tokenizer, base_dir)
    held_out = split == "eval" and not data.eval
    sources = data.train if split == "train" or held_out else data.eval
    if held_out and not data.eval_fraction:
        raise DataError("there is no held-out set", "set data.eval or data.eval_fraction")
    tokens: list[_Tokens] = []
    for source in sources:
        tokens.append(_load_tokens(source, data, encoder, base_dir, cache_dir, progress, sum(len(t.ends) for t in tokens)))

    counts = [len(t.ends) for t in tokens]
    kept = _choose_rows(counts, data.eval_fraction, seed, held_out=held_out) if data.eval_fraction else np.ones(sum(counts), np.bool_)
    rows = np.flatnonzero(kept) if held_out else _weigh_rows(kept, counts, [source.weight for source in sources], seed)
    source_of_row = np.repeat(np.arange(len(tokens)), counts)
    lengths = np.concatenate([t.lengths for t in tokens])
    starts = np.concatenate([t.ends for t in tokens]) - lengths
    num_targets = np.concatenate([t.num_targets for t in tokens])

    too_long = rows[lengths[rows] > data.seq_len]
    if len(too_long) and data.too_long == "error":
        worst = int(too_long[np.argmax(lengths[too_long])])
        where, count = _find_row(worst, sources, data, base_dir), len(np.unique(too_long))
        raise DataError(
            f"{count} of {sum(counts)} examples are longer than data.seq_len {data.seq_len}: {where} has {lengths[worst]} tokens, the most",
            f"set data.seq_len to {lengths[worst]}, data.too_long to drop, or data.too_long to truncate",
        )
    if data.too_long == "drop":
        rows = rows[lengths[rows] <= data.seq_len]
    for row in np.unique(too_long) if data.too_long == "truncate" else ():
        lengths[row] = data.seq_len
        num_targets[row] = _count_targets(tokens[source_of_row[row]].stored[starts[row] : starts[row] + data.seq_len])
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
    facts = (FORMAT_VERSION, split, token_hashes, weights, data.eval_fraction, seed, data.seq_len, data.too_long, data.packing)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Samples(
        num_tokens=_sum_packs(lengths[rows], packs, pack_ends),
        num_targets=_sum_packs(num_targets[rows], packs, pack_ends),
        seq_len=data.seq_len,
        pad_id=int(pad_id),
        content_hash=_hash_json(facts),
        source_hashes={name: digest for t in tokens for name, digest in t.files.items()},
        num_dropped=num_dropped,
        num_truncated=int((num_targets[too_long] > 0).sum()) if data.too_long == "truncate" else 0,
        _tokens=tuple(tokens),
        _source=source_of_row[rows],
        _start=starts[rows],
        _length=lengths[rows],
        _packs=packs,
        _pack_ends=pack_ends,
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
        yield collate(picked + [filler] * (micro_batch_size - len(picked)), samples.pad_id, flat=flat)


def check_packing(model: torch.nn.Module) -> None:
    """Check by one small forward pass that a model keeps the examples of a sequence apart by their position ids.

    Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX and their like do, to the last bit. OPT, Bloom, Falcon and MPT do not hand
    position ids to their mask, and convolutions and state spaces (Mamba, LFM2) read across (transformers 5.23).
    Raises ModelError.
    """
    import torch

    device, was_training = next(model.parameters()).device, model.training
    position_ids_BS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    sequences = [torch.tensor([[*first, 3, 4, 5, 6]], device=device) for first in ((7, 8, 9, 10), (11, 12, 13, 14))]
    model.eval()
    try:
        with torch.no_grad():
            one, other = (model(input_ids=ids_BS, position_ids=position_ids_BS, use_cache=False).logits[0, 4:] for ids_BS in sequences)
        leak = float((one - other).abs().max() / one.float().std())
    except TypeError:
        leak = float("inf")  # takes no position_ids
    finally:
        model.train(was_training)
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
