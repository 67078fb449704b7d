"""Tokens on disk: made once a content hash, published in one move, checked at each load."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from launcher.data.formats import Example, make_examples
from launcher.data.rows import HUB_SCHEME, find_files, load_hub
from launcher.errors import DataError
from launcher.recipe import Data, Source
from launcher.train.encode import FORMAT_VERSION, Encoder, Ints, encode_examples, hash_json
from launcher.units import format_bytes

if TYPE_CHECKING:
    pass

Progress = Callable[[int], None]
_EXAMPLES_A_BATCH = 512
_ARRAYS = {"stored": "<i4", "ends": "<i8", "num_targets": "<i8"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """The tokenised examples of one source, in the order of its rows; `stored` is on disk."""

    stored: npt.NDArray[np.int32]
    ends: Ints
    num_targets: Ints
    hash: str
    files: dict[str, str]

    @property
    def lengths(self) -> Ints:
        return np.diff(self.ends, prepend=0)


def load_tokens(
    source: Source, data: Data, encoder: Encoder, base_dir: str, cache_dir: Path, progress: Progress | None, seen: int
) -> Tokens:
    """The tokens of a source: those on disk under its content hash, else tokenised now."""
    files = _hash_source(source, base_dir)
    # Folders and names are left out, kinds are not: the same bytes at another place give the same tokens.
    contents = [(Path(name).suffixes, digest) for name, digest in files.items()]
    facts = (encoder.hash, contents, source.format, source.columns, source.limit)
    content_hash = hash_json(facts)
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


def _write_tokens(folder: Path, examples: Iterator[Example], encoder: Encoder, progress: Progress | None, seen: int) -> None:
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
            tokens = encode_examples(batch, encoder, backend)
            num_bytes += sum(4 * len(t) + 16 for t in tokens)
            lengths = np.asarray([len(t) for t in tokens], np.int64)
            ends.append(stored.count + np.cumsum(lengths))
            num_targets.append(np.asarray([count_targets(t) for t in tokens], np.int64))
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


def _read_tokens(folder: Path, files: dict[str, str]) -> Tokens | None:
    """The tokens of a folder; None where it is not there, not whole or not as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        facts = {name: (int(meta["arrays"][name]["count"]), int(meta["arrays"][name]["crc32"])) for name in arrays}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any((len(array), _make_crc32(array)) != facts[name] for name, array in arrays.items()):
        return None
    return Tokens(**arrays, hash=folder.name, files=files)


def _make_crc32(array: npt.NDArray[Any]) -> int:
    crc32, step = 0, 1 << 22
    for start in range(0, len(array), step):
        crc32 = zlib.crc32(array[start : start + step].tobytes(), crc32)
    return crc32


def count_targets(stored: npt.NDArray[Any]) -> int:
    """Tokens that are predicted: those with loss, but never the first, which has nothing before it."""
    return int((stored[1:] >= 0).sum())
