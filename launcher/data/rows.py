"""Rows of a data source, one at a time, each with the place it stands at.

Lines of jsonl, csv, tsv and the batches of parquet and arrow are streamed; a .json array is read whole.
Text formats may be compressed (.gz). A .tsv is tab-separated text without quoting (IANA text/tab-separated-values).
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from launcher.errors import DataError
from launcher.recipe import Source

HUB_SCHEME = "hub://"
EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_TEXT_EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv")
_ROWS_A_BATCH = 1024
_LONGEST_FIELD = 2**31 - 1  # the csv module's default, 131072 characters, is shorter than a long document


@dataclass(frozen=True, slots=True)
class Row:
    """What a row says (`value`) and where it stands (`where`): path:line in a text file, else path:row N from 1."""

    value: dict[str, Any]
    where: str


def read_rows(source: Source, base_dir: str) -> Iterator[Row]:
    """The rows of a source in the order of its files' names, the first `limit` of them.

    Raises DataError with file and line: missing, empty or unreadable files, broken rows.
    """
    if source.path.startswith(HUB_SCHEME):
        rows = _read_hub(source)
    else:
        headless = bool(source.columns) and all(column.isdigit() for column in source.columns.values())
        rows = chain.from_iterable(_read_file(path, headless) for path in find_files(source, base_dir))
    return islice(rows, source.limit)


def find_files(source: Source, base_dir: str) -> list[Path]:
    """The files of a source: its path or glob, sorted; taken from `base_dir`, then from here. Raises DataError."""
    for folder in (Path(base_dir), Path.cwd()):
        path = folder / Path(source.path).expanduser()
        found = [path] if path.exists() else sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if found:
            for file in found:
                _check_file(file)
            return found
    raise _make_missing_error(source.path, base_dir)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder", f"name its files, such as {path}/*.jsonl")
    if _extension(path) not in EXTENSIONS:
        known = f"known: {', '.join(EXTENSIONS)}; text kinds also .gz"
        raise DataError(f"{path} is of no known kind ({path.suffix or 'no extension'})", known)


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] != [".gz"]:
        return suffixes[-1] if suffixes else ""
    return suffixes[-2] if suffixes[-2:-1] and suffixes[-2] in _TEXT_EXTENSIONS else ".gz"


def _make_missing_error(name: str, base_dir: str) -> DataError:
    folders = list(dict.fromkeys((Path(base_dir).resolve(), Path.cwd())))
    if glob.has_magic(name):
        return DataError(f"no file matches {name}", f"looked in {' and '.join(map(str, folders))}")
    near: list[str] = []
    for folder in folders:
        parent = (folder / Path(name).expanduser()).parent
        names = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
        near += [str(Path(name).parent / match) for match in difflib.get_close_matches(Path(name).name, names, 3, 0.5)]
    hint = f"did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
    return DataError(f"no file {name}", f"{hint}looked in {' and '.join(map(str, folders))}")


def _read_file(path: Path, headless: bool) -> Iterator[Row]:
    """The rows of one file. Raises DataError where it has none."""
    extension = _extension(path)
    if extension == ".jsonl":
        rows = _read_jsonl(path)
    elif extension == ".json":
        rows = _read_json(path)
    elif extension in (".csv", ".tsv"):
        rows = _read_csv(path, "\t" if extension == ".tsv" else ",", headless)
    else:
        rows = _read_columnar(path, extension)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} has no rows", "write at least one, or leave the file out")
    yield first
    yield from rows


def _open_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line of a UTF-8 file."""
    number = 0
    try:
        with cast("IO[bytes]", gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")) as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number} is not UTF-8 (byte {error.start + 1} of the line)", "convert the file: iconv -t UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1} cannot be unpacked: {error}", "the .gz file is cut off or damaged: make it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _open_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is not JSON: {error.msg} (column {error.colno})", "one JSON object a line") from None
        yield _check_object(value, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _open_lines(path))
    try:
        value = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "name a file with one object a line .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg} (column {error.colno})", hint) from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f"{path} is not an array of objects", 'write [{...}, {...}] or {"data": [{...}, {...}]}')
    for number, row in enumerate(rows, start=1):
        yield _check_object(row, f"{path}:row {number}")


def _check_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        example = 'a row is an object, such as {"prompt": "...", "completion": "..."}'
        raise DataError(f"{where} is not an object but {_json_kind(value)}", example)
    return Row(value, where)


def _json_kind(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


class _Tsv(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _read_csv(path: Path, delimiter: str, headless: bool) -> Iterator[Row]:
    """Rows of named columns, or columns "0", "1", ... where the file has no header."""
    csv.field_size_limit(_LONGEST_FIELD)
    lines = (line for _, line in _open_lines(path))
    reader = csv.reader(lines, _Tsv if delimiter == "\t" else csv.excel, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [str(i) for i in range(len(fields))] if headless else _check_header(fields, where)
                if not headless:
                    continue
            if len(fields) != len(header):
                problem = f"{where} has {len(fields)} fields, and the first row has {len(header)}"
                raise DataError(problem, _explain_fields(header, delimiter))
            yield Row(dict(zip(header, fields, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}:{line} cannot be split into fields: {error}", "quotes in a quoted field are doubled") from None


def _check_header(fields: list[str], where: str) -> list[str]:
    twice = [name for name in fields if fields.count(name) > 1]
    if twice:
        raise DataError(f"{where} names the column {twice[0]!r} twice", "give each column a name of its own")
    return fields


def _explain_fields(header: list[str], delimiter: str) -> str:
    rule = "a tab separates fields" if delimiter == "\t" else "a field that holds a comma or a line break is put in double quotes"
    return f"columns: {', '.join(header)}; {rule}"


def _read_columnar(path: Path, extension: str) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    try:
        for batch in _open_parquet(path) if extension == ".parquet" else _open_arrow(path):
            for value in batch.to_pylist():
                number += 1
                yield Row(value, f"{path}:row {number}")
    except (pa.ArrowException, OSError) as error:
        problem = f"{path}:row {number + 1} cannot be read as {extension[1:]}: {' '.join(str(error).split())}"
        raise DataError(problem, "the file is cut off, damaged or of another kind") from None


def _open_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_ROWS_A_BATCH)


def _open_arrow(path: Path) -> Iterator[Any]:
    """Batches of an Arrow IPC file, or of an IPC stream (which datasets.save_to_disk writes)."""
    import pyarrow as pa

    with pa.OSFile(str(path), "rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if not is_file:
            yield from pa.ipc.open_stream(file)
            return
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def check_hub_name(source: Source) -> str:
    """OWNER/NAME of a hub:// source. Raises DataError where it is not one."""
    name = source.path.removeprefix(HUB_SCHEME)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"{source.path} names no hub data set", "write hub://OWNER/NAME")
    return name


def load_hub(source: Source) -> Any:
    """The `datasets.Dataset` of a hub:// source. Raises DataError where the hub does not give it."""
    name = check_hub_name(source)
    import datasets

    try:
        return datasets.load_dataset(name, split=source.split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # OSError: not found, no network
        problem = " ".join(str(error).split())
        at = f"{source.path} (split {source.split}{f', revision {source.revision}' if source.revision else ''})"
        hint = "check name, split and revision, log in for a gated one, or use a local file"
        raise DataError(f"{at} cannot be loaded: {problem}", hint) from None


def _read_hub(source: Source) -> Iterator[Row]:
    empty = True
    for number, value in enumerate(load_hub(source), start=1):
        empty = False
        yield Row(dict(value), f"{source.path}:row {number}")
    if empty:
        raise DataError(f"{source.path} (split {source.split}) has no rows")
