"""What a row means: a conversation, or plain text.

| format | fields of a row |
|---|---|
| messages | `messages`: [{role, content}], OpenAI style |
| sharegpt | `conversations`: [{from, value}], from human, gpt, system or tool |
| alpaca | `instruction`, `output`; optional `input`, `system` |
| prompt_completion | `prompt`, `completion`; optional `system` |
| text | `text` |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.data.rows import Row, read_rows
from launcher.errors import DataError, ModelError
from launcher.recipe import Data, Source

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}
_NEEDS: dict[str, tuple[str, ...]] = {  # in the order in which `auto` looks
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_FIELDS = tuple(dict.fromkeys((*(field for needs in _NEEDS.values() for field in needs), "input", "system")))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: role system, user, assistant or tool, and its text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order. Where the tokenizer has no chat template they are joined by `joiner`; None: a template is needed."""

    messages: tuple[Message, ...]
    where: str
    joiner: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A document that is learned as it stands."""

    text: str
    where: str


Example = Conversation | Text
ReadTurn = Callable[[dict[str, Any], str, Row], Message]


def make_examples(source: Source, base_dir: str, data: Data) -> Iterator[Example]:
    """The example of each row of a source. Raises DataError with file and line where a row holds none."""
    kind: str | None = None if source.format == "auto" else source.format
    for name in source.columns:
        if name not in _FIELDS:
            hint = f"{_suggest(name, _FIELDS)}columns is {{field: column}}"
            raise DataError(f"{source.path}: columns names {name!r}, which is no field", hint)
    for row in read_rows(source, base_dir):
        renamed = _rename(row, source.columns)
        kind = kind or _find_format(renamed, row)
        yield _make_example(kind, renamed, data, row)


def load_chat_template(data: Data, base_dir: str) -> str | None:
    """The text of data.chat_template: what the recipe says, or the file it names. Raises ModelError where there is none."""
    value = data.chat_template
    if value is None or "{%" in value or "{{" in value:
        return value
    for path in (Path(base_dir) / value, Path(value).expanduser()):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ModelError(
        f"data.chat_template: no file {value}, and it is no Jinja text either (it has no {{% or {{{{)",
        f"a relative path is looked for in {base_dir} and in {Path.cwd()}",
    )


def _suggest(name: str, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]}? " if near else f"one of {', '.join(names)}; "


def _rename(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    """The row by the format's names: each named column under its field, the others as they are."""
    for field, column in columns.items():
        if column not in row.value:
            near = difflib.get_close_matches(column, list(row.value), 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise DataError(f"{row.where} has no column {column!r} (columns.{field})", f"{hint}{_list_fields(row)}")
    taken = set(columns.values())
    return {k: v for k, v in row.value.items() if k not in taken} | {field: row.value[column] for field, column in columns.items()}


def _list_fields(row: Row) -> str:
    return f"it has: {', '.join(row.value) or 'no fields'}"


def _find_format(fields: dict[str, Any], row: Row) -> str:
    """The format whose fields the first row has."""
    for kind, needs in _NEEDS.items():
        if all(name in fields for name in needs):
            return kind
    known = "; ".join(f"{kind} ({', '.join(needs)})" for kind, needs in _NEEDS.items())
    raise DataError(f"{row.where} fits no format; {_list_fields(row)}", f"formats: {known}. Name columns with columns: {{field: column}}")


def _make_example(kind: str, fields: dict[str, Any], data: Data, row: Row) -> Example:
    if kind == "text":
        return Text(_read_text(fields, "text", row), row.where)
    if kind in ("messages", "sharegpt"):
        read_turn = _read_message if kind == "messages" else _read_sharegpt
        messages = _read_turns(fields, _NEEDS[kind][0], read_turn, row)
        joiner = None
    else:
        messages = _read_pair(kind, fields, row)
        joiner = "" if kind == "prompt_completion" else "\n\n"
    if data.system_prompt is not None and messages[0].role != "system":
        messages = (Message("system", data.system_prompt), *messages)
    if data.loss_on == "assistant" and not any(message.role == "assistant" for message in messages):
        raise DataError(f"{row.where} has no assistant turn to learn from", "drop the row, or set data.loss_on to all")
    return Conversation(messages, row.where, joiner)


def _read_pair(kind: str, fields: dict[str, Any], row: Row) -> tuple[Message, ...]:
    """A question and its answer, after the system message where the row has one."""
    question, answer = _NEEDS[kind]
    prompt = _read_text(fields, question, row, may_be_empty=kind == "prompt_completion")
    if kind == "alpaca" and fields.get("input"):
        prompt = f"{prompt}\n\n{_read_text(fields, 'input', row)}"
    system = (Message("system", _read_text(fields, "system", row)),) if fields.get("system") else ()
    return (*system, Message("user", prompt), Message("assistant", _read_text(fields, answer, row)))


def _read_text(fields: dict[str, Any], name: str, row: Row, *, may_be_empty: bool = False) -> str:
    value = fields.get(name)
    if value is None:
        raise DataError(f"{row.where} has no {name}", f"{_list_fields(row)}; name another column with columns: {{{name}: COLUMN}}")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # a number in JSON or parquet, such as a label
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {name} is not text but {type(value).__name__}", _list_fields(row))
    if not value.strip() and not may_be_empty:
        raise DataError(f"{row.where}: {name} is empty", "fill it in, or drop the row")
    return value


def _read_turns(fields: dict[str, Any], name: str, read_turn: ReadTurn, row: Row) -> tuple[Message, ...]:
    turns = fields.get(name)
    if turns is None:
        raise DataError(f"{row.where} has no {name}", f"{_list_fields(row)}; name another column with columns: {{{name}: COLUMN}}")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.where}: {name} is {'empty' if turns == [] else 'not a list of turns'}", _list_fields(row))
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        at = f"{row.where}: turn {number} of {name}"
        if not isinstance(turn, dict):
            raise DataError(f"{at} is not an object but {type(turn).__name__}", _list_fields(row))
        message = read_turn(turn, at, row)
        if not message.content.strip() and message.role == "assistant":
            raise DataError(f"{at} is an empty answer", "fill it in, or drop the row")
        messages.append(message)
    return tuple(messages)


def _read_message(turn: dict[str, Any], at: str, row: Row) -> Message:
    """OpenAI's {role, content}; content is text, or parts of type text."""
    role, content = turn.get("role"), turn.get("content")
    if role is None:
        sharegpt = "it looks like sharegpt: set format, and columns: {conversations: COLUMN}"
        hint = sharegpt if "from" in turn else f"it has: {', '.join(turn)}"
        raise DataError(f"{at} has no role", hint)
    if role not in ROLES:
        raise DataError(f"{at} has the unknown role {role!r}", f"{_suggest(str(role), ROLES)}{_list_fields(row)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise DataError(f"{at} holds tool calls, which cannot be trained on", "write the call as text in content, or drop the row")
    if turn.get("weight") == 0:
        raise DataError(f"{at} has weight 0, and every assistant turn is learned", "drop the field or the row")
    if isinstance(content, list):
        content = "".join(_read_part(part, at) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{at} has no text in content", f"it has: {', '.join(turn)}")
    return Message(role, content)


def _read_part(part: Any, at: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise DataError(f"{at} holds a part of type {kind!r}", 'only text is trained on: {"type": "text", "text": "..."}')


def _read_sharegpt(turn: dict[str, Any], at: str, row: Row) -> Message:
    sender, value = turn.get("from"), turn.get("value")
    if sender is None:
        hint = "it looks like messages: set format, and columns: {messages: COLUMN}" if "role" in turn else f"it has: {', '.join(turn)}"
        raise DataError(f"{at} has no from", hint)
    if sender not in _SHAREGPT_ROLES:
        raise DataError(f"{at} is from {sender!r}, an unknown role", f"{_suggest(str(sender), tuple(_SHAREGPT_ROLES))}{_list_fields(row)}")
    if not isinstance(value, str):
        raise DataError(f"{at} has no text in value", f"it has: {', '.join(turn)}")
    return Message(_SHAREGPT_ROLES[sender], value)
