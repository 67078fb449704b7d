"""Rows of every kind of file, and where each error points."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.rows import read_rows
from launcher.errors import DataError
from launcher.recipe import Source

ROWS = [{"prompt": 'ä, or "b"?', "completion": "b"}, {"prompt": "two\nlines", "completion": "ok"}, {"prompt": "c", "completion": "d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'prompt,completion\n"ä, or ""b""?",b\n"two\nlines",ok\nc,d\n'


def write(path: Path, text: str | bytes) -> Path:
    raw = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def write_arrow(path: Path, open_writer: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, open_writer(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def read(folder: Path, name: str, **fields: Any) -> list[tuple[dict[str, Any], str]]:
    return [(row.value, row.where.replace(f"{folder}{os.sep}", "")) for row in read_rows(Source(path=name, **fields), str(folder))]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "text", "wheres"),
    [
        ("r.jsonl", LINES.replace("\n", "\n\n", 1), ["r.jsonl:1", "r.jsonl:3", "r.jsonl:4"]),
        ("r.jsonl", "\ufeff" + LINES, ["r.jsonl:1", "r.jsonl:2", "r.jsonl:3"]),
        ("r.json", json.dumps(ROWS, indent=1), ["r.json:row 1", "r.json:row 2", "r.json:row 3"]),
        ("r.json", json.dumps({"data": ROWS}), ["r.json:row 1", "r.json:row 2", "r.json:row 3"]),
        ("r.csv", CSV, ["r.csv:2", "r.csv:3", "r.csv:5"]),
        ("r.csv", "\ufeff" + CSV.replace("\n", "\r\n").replace("two\r\n", "two\n"), ["r.csv:2", "r.csv:3", "r.csv:5"]),
    ],
)
def test_reads_text_files(tmp_path: Path, name: str, text: str, wheres: list[str], suffix: str) -> None:
    write(tmp_path / (name + suffix), text)
    assert read(tmp_path, name + suffix) == [(row, w.replace(name, name + suffix)) for row, w in zip(ROWS, wheres, strict=True)]


def test_reads_tsv_with_bare_quotes(tmp_path: Path) -> None:
    write(tmp_path / "r.tsv", 'label\ttext\nham\t"quoted" or not\nspam\t"open\n')
    assert read(tmp_path, "r.tsv") == [
        ({"label": "ham", "text": '"quoted" or not'}, "r.tsv:2"),
        ({"label": "spam", "text": '"open'}, "r.tsv:3"),
    ]


def test_columns_by_position_mean_no_header(tmp_path: Path) -> None:
    write(tmp_path / "r.tsv", "hi\tham\nwin\tspam\n")
    assert read(tmp_path, "r.tsv", columns={"prompt": "0", "completion": "1"}) == [
        ({"0": "hi", "1": "ham"}, "r.tsv:1"),
        ({"0": "win", "1": "spam"}, "r.tsv:2"),
    ]


def test_reads_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet", row_group_size=2)
    assert read(tmp_path, "r.parquet") == [(row, f"r.parquet:row {i}") for i, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize("open_writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_reads_arrow_file_and_stream(tmp_path: Path, open_writer: Callable[..., Any]) -> None:
    write_arrow(tmp_path / "r.arrow", open_writer)
    assert read(tmp_path, "r.arrow") == [(row, f"r.arrow:row {i}") for i, row in enumerate(ROWS, 1)]


def test_glob_is_sorted_and_limit_spans_files(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", LINES)
    wheres = [where for _, where in read(tmp_path, "*.jsonl", limit=7)]
    assert wheres == [f"{n}.jsonl:{i}" for n in "ab" for i in (1, 2, 3)] + ["c.jsonl:1"]


def test_looks_in_the_base_folder_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "here" / "r.jsonl", '{"a": "here"}\n')
    write(tmp_path / "base" / "other.jsonl", '{"a": "base"}\n')
    monkeypatch.chdir(tmp_path / "here")
    assert next(read_rows(Source(path="r.jsonl"), str(tmp_path / "base"))).value == {"a": "here"}
    write(tmp_path / "base" / "r.jsonl", '{"a": "base"}\n')
    assert next(read_rows(Source(path="r.jsonl"), str(tmp_path / "base"))).value == {"a": "base"}
    assert next(read_rows(Source(path=str(tmp_path / "here" / "r.jsonl")), "/")).value == {"a": "here"}


def test_reads_a_long_file_in_constant_memory(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    for name in ("r.jsonl", "r.jsonl.gz"):
        write(tmp_path / name, line * 20_000)
        tracemalloc.start()
        assert sum(1 for _ in read_rows(Source(path=name), str(tmp_path))) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20  # the file is 20 MB


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.jsonl", '{"a": "b"}\n{"a": \n', "r.jsonl:2 is not JSON: Expecting value (column 7)"),
        ("r.jsonl", '{"a": "b"}\n\n["a"]\n', "r.jsonl:3 is not an object but an array"),
        ("r.jsonl", '{"a": "b"}\n3\n', "r.jsonl:2 is not an object but a number"),
        ("r.jsonl", b'{"a": "b"}\n{"a": "\xe4"}\n', "r.jsonl:2 is not UTF-8 (byte 8 of the line)"),
        ("r.jsonl", '{"a": "b"}\n'.encode("utf-16"), "r.jsonl:1 is not UTF-8"),
        ("r.jsonl", "", "r.jsonl has no rows"),
        ("r.jsonl", "\n \n", "r.jsonl has no rows"),
        ("r.json", "", "r.json has no rows"),
        ("r.json", "[]", "r.json has no rows"),
        ("r.json", '[{"a": "b"},\n {"a": }]', "r.json:2 is not JSON"),
        ("r.json", '{"a": "b"}\n{"a": "b"}\n', "name a file with one object a line .jsonl"),
        ("r.json", '{"rows": []}', "r.json is not an array of objects"),
        ("r.json", '[{"a": "b"}, null]', "r.json:row 2 is not an object but null"),
        ("r.csv", "a,b\n1,2\n1,2,3\n", "r.csv:3 has 3 fields, and the first row has 2"),
        ("r.csv", 'a,b\n"1\n1",2\n1\n', "r.csv:4 has 1 fields, and the first row has 2"),
        ("r.csv", 'a,b\n1,2\n1,"2\n3,4\n', "r.csv:3 cannot be split into fields"),
        ("r.csv", "a,a\n1,2\n", "r.csv:1 names the column 'a' twice"),
        ("r.csv", "a,b\n", "r.csv has no rows"),
        ("r.csv", b"a,b\n1,2\n1,\xff\n", "r.csv:3 is not UTF-8"),
        ("r.parquet", "not parquet", "r.parquet:row 1 cannot be read as parquet"),
        ("r.arrow", "not arrow", "r.arrow:row 1 cannot be read as arrow"),
        ("r.xlsx", "x", "r.xlsx is of no known kind (.xlsx)"),
        ("r", "x", "is of no known kind (no extension)"),
        ("r.parquet.gz", "x", "r.parquet.gz is of no known kind (.gz)"),
    ],
)
def test_error_names_file_and_line(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read(tmp_path, name)
    assert says in str(caught.value)


def test_damaged_gz_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(100_000).hex().encode())
    for content in (whole[: len(whole) // 2], b"no gzip"):
        (tmp_path / "r.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match="r.jsonl.gz:1 cannot be unpacked"):
            read(tmp_path, "r.jsonl.gz")


def test_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "d" / "train.jsonl", LINES)
    with pytest.raises(DataError, match="did you mean d/train.jsonl") as caught:
        read(tmp_path, "d/trian.jsonl")
    assert "no file d/trian.jsonl" in caught.value.message
    with pytest.raises(DataError, match=r"no file matches d/\*\.csv"):
        read(tmp_path, "d/*.csv")
    with pytest.raises(DataError, match=r"is a folder\n.*\*\.jsonl"):
        read(tmp_path, "d")


def test_cut_off_parquet_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    table = pa.Table.from_pylist([{"text": os.urandom(50).hex()} for _ in range(4000)])
    pq.write_table(table, path, row_group_size=2000, compression="none")
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 3 // 4 : len(raw) * 3 // 4 + 2000] = b"\xff" * 2000
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"r.parquet:row \d+"):
        read(tmp_path, "r.parquet")


def test_hub_rows_come_with_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, *, split: str, revision: str | None) -> Any:
        assert (name, split, revision) == ("me/set", "test", "v1")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read(Path("/nowhere"), "hub://me/set", split="test", revision="v1", limit=2) == [
        (row, f"hub://me/set:row {i}") for i, row in enumerate(ROWS[:2], 1)
    ]


def test_hub_errors_are_data_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, **_: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError(f"no {name}")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"hub://me/set \(split train, revision v1\) cannot be loaded: no me/set"):
        read(Path("/nowhere"), "hub://me/set", revision="v1")
    with pytest.raises(DataError, match="names no hub data set"):
        read(Path("/nowhere"), "hub://me/set/more")
