"""What rows of each format mean, what is refused, and the preflight of the launching side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.data.check import CHECKED_ROWS, check_data
from launcher.data.formats import Conversation, Example, Message, Text, load_chat_template, make_examples
from launcher.errors import DataError, ModelError
from launcher.recipe import Data, Source

QA = (Message("user", "q"), Message("assistant", "a"))
SYS = Message("system", "s")


def turns(*pairs: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in (pair.split(":", 1) for pair in pairs)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, rows: list[Any], data: dict[str, Any] | None = None, **fields: Any) -> list[Example]:
    write_rows(folder / "r.jsonl", rows)
    source = Source(path="r.jsonl", **fields)
    return list(make_examples(source, str(folder), Data(train=(source,), **(data or {}))))


@pytest.mark.parametrize(
    ("kind", "row", "messages", "joiner"),
    [
        ("messages", {"messages": turns("system:s", "user:q", "assistant:a")}, (SYS, *QA), None),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *turns("assistant:a")]}, QA, None),
        ("messages", {"messages": turns("user:q", "assistant:a", "tool:4", "assistant:b")},
         (*QA, Message("tool", "4"), Message("assistant", "b")), None),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA, None),
        ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         (SYS, *QA), None),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, QA, "\n\n"),
        ("alpaca", {"instruction": "q", "input": "i", "output": "a", "system": "s"},
         (SYS, Message("user", "q\n\ni"), Message("assistant", "a")), "\n\n"),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, QA, ""),
        ("prompt_completion", {"prompt": "q", "completion": 1, "id": 7}, (QA[0], Message("assistant", "1")), ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("auto", [True, False])
def test_conversation_of_each_format(tmp_path: Path, kind: str, row: Any, messages: Any, joiner: str | None, auto: bool) -> None:
    examples = read(tmp_path, [row], format="auto" if auto else kind)
    assert examples == [Conversation(messages, f"{tmp_path}/r.jsonl:1", joiner)]


@pytest.mark.parametrize("kind", ["auto", "text"])
def test_text(tmp_path: Path, kind: str) -> None:
    assert read(tmp_path, [{"text": " t\n"}], format=kind) == [Text(" t\n", f"{tmp_path}/r.jsonl:1")]


def test_columns_rename(tmp_path: Path) -> None:
    rows = [{"question": "q", "prompt": "not this", "answer": "a"}]
    (example,) = read(tmp_path, rows, columns={"prompt": "question", "completion": "answer"})
    assert isinstance(example, Conversation) and example.messages == QA
    (swapped,) = read(tmp_path, [{"prompt": "a", "completion": "q"}], columns={"prompt": "completion", "completion": "prompt"})
    assert isinstance(swapped, Conversation) and swapped.messages == QA
    (tmp_path / "r.tsv").write_text("a\tq\n")
    source = Source(path="r.tsv", columns={"prompt": "1", "completion": "0"})
    (headless,) = make_examples(source, str(tmp_path), Data(train=(source,)))
    assert isinstance(headless, Conversation) and headless.messages == QA


def test_system_prompt_only_where_there_is_none(tmp_path: Path) -> None:
    rows = [{"messages": turns("user:q", "assistant:a")}, {"messages": turns("system:own", "user:q", "assistant:a")}]
    first, second = read(tmp_path, rows, {"system_prompt": "s"})
    assert isinstance(first, Conversation) and first.messages == (SYS, *QA)
    assert isinstance(second, Conversation) and second.messages == (Message("system", "own"), *QA)


GOOD: dict[str, Any] = {"messages": turns("user:q", "assistant:a")}
PAIR = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("rows", "fields", "says"),
    [
        ([GOOD, {"text": "x"}], {}, "r.jsonl:2 has no messages\n  → it has: text"),
        ([{"body": "x"}], {}, "r.jsonl:1 fits no format; it has: body"),
        ([PAIR, {"prompt": "q", "completion": " \n"}], {}, "r.jsonl:2: completion is empty"),
        ([PAIR, {"prompt": "q", "completion": None}], {}, "r.jsonl:2 has no completion"),
        ([PAIR, {"prompt": "q", "completion": ["a"]}], {}, "r.jsonl:2: completion is not text but list"),
        ([PAIR, {"prompt": "q", "completion": True}], {}, "r.jsonl:2: completion is not text but bool"),
        ([{"instruction": "", "output": "a"}], {}, "r.jsonl:1: instruction is empty"),
        ([{"text": ""}], {}, "r.jsonl:1: text is empty"),
        ([GOOD, {"messages": turns("user:q")}], {}, "r.jsonl:2 has no assistant turn to learn from"),
        ([{"messages": []}], {}, "r.jsonl:1: messages is empty"),
        ([{"messages": "q"}], {}, "r.jsonl:1: messages is not a list of turns"),
        ([{"messages": ["q"]}], {}, "turn 1 of messages is not an object but str"),
        ([{"messages": turns("user:q", "asistant:a")}], {}, "r.jsonl:1: turn 2 of messages has the unknown role 'asistant'"),
        ([{"messages": turns("user:q", "asistant:a")}], {}, "→ did you mean assistant?"),
        ([{"messages": turns("user:q", "assistant: ")}], {}, "r.jsonl:1: turn 2 of messages is an empty answer"),
        ([{"messages": [{"from": "human", "value": "q"}]}], {}, "it looks like sharegpt"),
        ([{"messages": [{"role": "user"}]}], {}, "r.jsonl:1: turn 1 of messages has no text in content"),
        ([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}], {}, "holds a part of type 'image_url'"),
        ([{"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}], {}, "holds tool calls"),
        ([{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}], {}, "has weight 0"),
        ([{"conversations": [{"from": "bing", "value": "a"}]}], {}, "turn 1 of conversations is from 'bing', an unknown role"),
        ([{"conversations": [{"from": "gpt", "value": ""}]}], {}, "is an empty answer"),
        ([{"conversations": turns("user:q")}], {}, "it looks like messages"),
        ([{"conversations": [{"from": "gpt"}]}], {}, "has no text in value"),
        ([PAIR], {"columns": {"prompt": "promt"}}, "r.jsonl:1 has no column 'promt' (columns.prompt)\n  → did you mean prompt?"),
        ([PAIR], {"columns": {"question": "prompt"}}, "columns names 'question', which is no field"),
        ([PAIR], {"format": "text"}, "r.jsonl:1 has no text\n  → it has: prompt, completion; name another column"),
    ],
)
def test_error_names_the_row(tmp_path: Path, rows: list[Any], fields: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows, **fields)
    assert says in str(caught.value)


def test_loss_on_all_needs_no_assistant_turn(tmp_path: Path) -> None:
    assert len(read(tmp_path, [{"messages": turns("user:q")}], {"loss_on": "all"})) == 1


def make_data(folder: Path, rows: list[Any], **fields: Any) -> Data:
    write_rows(folder / "r.jsonl", rows)
    return Data.model_validate({"train": "r.jsonl"} | fields)


def test_check_passes_good_data_and_reads_no_more_than_it_must(tmp_path: Path) -> None:
    data = make_data(tmp_path, [GOOD] * CHECKED_ROWS + [{"bad": "row"}])
    check_data(data, str(tmp_path), has_chat_template=True)
    with pytest.raises(DataError, match=f"r.jsonl:{CHECKED_ROWS}"):
        check_data(make_data(tmp_path, [GOOD] * (CHECKED_ROWS - 1) + [{"bad": "row"}]), str(tmp_path), has_chat_template=True)


def test_check_wants_a_template_for_conversations(tmp_path: Path) -> None:
    data = make_data(tmp_path, [GOOD])
    with pytest.raises(ModelError, match="set data.chat_template"):
        check_data(data, str(tmp_path), has_chat_template=False)
    check_data(data, str(tmp_path), has_chat_template=None)
    check_data(make_data(tmp_path, [GOOD], chat_template="{{ messages }}"), str(tmp_path), has_chat_template=False)
    check_data(make_data(tmp_path, [PAIR]), str(tmp_path), has_chat_template=False)


def test_check_finds_missing_empty_and_unsplittable_sets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file e.jsonl"):
        check_data(make_data(tmp_path, [GOOD], eval="e.jsonl"), str(tmp_path), has_chat_template=True)
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(DataError, match="e.jsonl has no rows"):
        check_data(make_data(tmp_path, [GOOD], eval="e.jsonl"), str(tmp_path), has_chat_template=True)
    with pytest.raises(DataError, match="which data.eval_fraction cannot split"):
        check_data(make_data(tmp_path, [GOOD], eval_fraction=0.5), str(tmp_path), has_chat_template=True)
    with pytest.raises(DataError, match="names no hub data set"):
        check_data(Data.model_validate({"train": "hub://a b"}), str(tmp_path), has_chat_template=True)


def test_chat_template_is_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ 1 }}")
    assert load_chat_template(make_data(tmp_path, [GOOD], chat_template="t.jinja"), str(tmp_path)) == "{{ 1 }}"
    assert load_chat_template(make_data(tmp_path, [GOOD], chat_template="{{ 2 }}"), str(tmp_path)) == "{{ 2 }}"
    assert load_chat_template(make_data(tmp_path, [GOOD]), str(tmp_path)) is None
    with pytest.raises(ModelError, match="data.chat_template: no file u.jinja"):
        load_chat_template(make_data(tmp_path, [GOOD], chat_template="u.jinja"), str(tmp_path))


def test_package_is_light() -> None:
    heavy = "torch,transformers,numpy,datasets,pyarrow,jinja2"
    code = f"import sys, launcher.data.check; print([m for m in '{heavy}'.split(',') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
