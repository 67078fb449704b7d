"""From examples to tokens: what a template writes, and which tokens of it carry loss."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from launcher.data.check import make_template_error
from launcher.data.formats import Conversation, Example, Text, load_chat_template
from launcher.errors import DataError, ModelError
from launcher.recipe import Data

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""The label of a token without loss (torch.nn.functional.cross_entropy's ignore_index)."""
FORMAT_VERSION = 1
"""Part of every content hash: raise it when the same rows give other tokens."""

Ints = npt.NDArray[np.int64]
Span = tuple[int, int]
"""Characters [start, end) of a text."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """How examples become tokens: the tokenizer, the template, and which tokens carry loss."""

    tokenizer: PreTrainedTokenizerFast
    pipeline: str
    template: str | None
    marks_answers: bool
    special_tokens: tuple[str, ...]
    starts_with_bos: bool
    loss_on: Literal["assistant", "all"]
    pairs: bool
    """For an encoder-decoder: a source without loss and a target with, each as the tokenizer writes a text of its own."""
    hash: str


def build_encoder(data: Data, tokenizer: PreTrainedTokenizerFast, base_dir: str, *, pairs: bool = False) -> Encoder:
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
    facts += ["pairs"] if pairs else []
    return Encoder(
        tokenizer=tokenizer,
        # The post-processor adds special tokens, which templates write themselves, and trims spaces off the offsets.
        pipeline=json.dumps(pipeline if pairs else pipeline | {"post_processor": None}),
        template=template,
        marks_answers=template is not None and _marks_answers(template),
        special_tokens=tuple(sorted(special, key=len, reverse=True)),
        starts_with_bos=starts_with_bos,
        loss_on=data.loss_on,
        pairs=pairs,
        hash=hash_json(facts),
    )


def _marks_answers(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def encode_examples(examples: Sequence[Example], encoder: Encoder, backend: Tokenizer) -> list[Ints]:
    """The tokens of each example; one without loss is stored as ~id, which is negative.

    Raises ModelError or DataError where a template cannot write an example or its answers cannot be told apart.
    """
    if encoder.pairs:
        return _encode_pairs(examples, encoder, backend)
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


def _encode_pairs(examples: Sequence[Example], encoder: Encoder, backend: Tokenizer) -> list[Ints]:
    """A source's tokens and its target's, which ends with the token that ends a text."""
    texts = [_write_pair(example, encoder) for example in examples]
    sources, targets = (backend.encode_batch(list(side), add_special_tokens=True) for side in zip(*texts, strict=True))
    tokens: list[Ints] = []
    for example, source, target in zip(examples, sources, targets, strict=True):
        source_ids, target_ids = np.asarray(source.ids, np.int64), np.asarray(target.ids, np.int64)
        if not len(source_ids):
            raise DataError(f"{example.where} has a source that gives no token", "fill it in, or drop the row")
        eos = encoder.tokenizer.eos_token_id
        tail = [int(eos)] if not len(target_ids) or target_ids[-1] != eos else []
        tokens.append(np.concatenate([~source_ids, target_ids, np.asarray(tail, np.int64)]))
    return tokens


def _write_pair(example: Example, encoder: Encoder) -> tuple[str, str]:
    """The text that is read and the one that is written: all before the last answer, and that answer."""
    if isinstance(example, Text):
        raise DataError(f"{example.where} is one text, and an encoder-decoder learns to write a target for a source",
                        "give each row a prompt and a completion")  # fmt: skip
    turns = [{"role": m.role, "content": m.content} for m in example.messages]
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise DataError(f"{example.where} does not end with an answer to something", "drop the row")
    if encoder.template is not None:
        return _apply_template(turns[:-1], example, encoder, generate=True), turns[-1]["content"]
    if any(turn["role"] == "assistant" for turn in turns[:-1]):
        raise DataError(f"{example.where} has several answers, and there is no chat template to write them into one source",
                        "set data.chat_template, or split the conversation into rows")  # fmt: skip
    return write_source(turns[:-1]), turns[-1]["content"]


def write_source(turns: Sequence[dict[str, str]]) -> str:
    """What an encoder-decoder without a chat template reads: system messages, and what was asked last."""
    return "\n\n".join(turn["content"] for turn in (*(t for t in turns[:-1] if t["role"] == "system"), turns[-1]))


def _find_targets(offsets: list[Span], spans: list[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens hold a character of a span. Where a prompt's last space and an answer are one token, it is learned."""
    starts, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    inside = np.zeros(len(starts), dtype=np.bool_)
    for start, end in spans:
        inside |= (starts < end) & (ends > start)
    return inside


def _write_plain(example: Example, encoder: Encoder) -> tuple[str, list[Span] | None]:
    """The text without a chat template, and the spans that carry loss; None: all of it."""
    if isinstance(example, Text):
        return example.text, None
    if example.joiner is None:
        raise make_template_error(example.where)
    *prompts, answer = (message.content for message in example.messages)
    prompt = "\n\n".join(prompts) + example.joiner
    text = prompt + answer
    return text, None if encoder.loss_on == "all" else [(len(prompt), len(text))]


def _close_plain(stored: Ints, encoder: Encoder) -> Ints:
    """A text between the token that opens it, where the tokenizer has one, and the one that ends it, which carries loss."""
    bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    head = [~int(bos)] if encoder.starts_with_bos and (not len(stored) or stored[0] not in (bos, ~bos)) else []
    tail = [int(eos)] if not len(stored) or stored[-1] != eos else []
    return np.concatenate([np.asarray(head, np.int64), stored, np.asarray(tail, np.int64)])


def _render(chats: Sequence[Conversation], encoder: Encoder) -> list[tuple[str, list[Span] | None]]:
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


def _apply_template(turns: list[dict[str, str]], chat: Conversation, encoder: Encoder, *, generate: bool = False) -> str:
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


def _render_marked(turns: list[dict[str, str]], chat: Conversation, encoder: Encoder) -> tuple[str, list[Span]]:
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


def _find_answers(text: str, turns: list[dict[str, str]], chat: Conversation, encoder: Encoder) -> list[Span]:
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


def _find_end(text: str, prompt: str, turns: list[dict[str, str]], chat: Conversation, encoder: Encoder) -> int | None:
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


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
