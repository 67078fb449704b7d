"""Keys and tensor names of a GGUF file. No weights, no numpy."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from launcher.errors import ModelError

_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def read_gguf_header(path: Path) -> dict[str, Any]:
    """Keys and values of a GGUF file (spec: ggml docs/gguf.md, versions 2 and 3) plus "tensor_names".

    An array is given by its length: what is needed of one is how many tokens it lists.
    """
    try:
        with path.open("rb") as file:
            magic, version = struct.unpack("<4sI", file.read(8))
            if magic != b"GGUF" or version not in (2, 3):
                raise ModelError(f"{path} is not a GGUF file of version 2 or 3", "download it again")
            tensors, pairs = struct.unpack("<QQ", file.read(16))
            header: dict[str, Any] = {}
            for _ in range(pairs):
                key = _read_gguf_string(file)
                header[key] = _read_gguf_value(file, *struct.unpack("<I", file.read(4)))
            header["tensor_names"] = frozenset(_read_gguf_tensor_name(file) for _ in range(tensors))
            return header
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except (struct.error, KeyError, UnicodeDecodeError, OverflowError, MemoryError):
        raise ModelError(f"{path}: the GGUF header ends early or is damaged", "download it again") from None


def _read_gguf_string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8")


def _read_gguf_value(file: BinaryIO, kind: int) -> Any:
    if kind == _GGUF_STRING:
        return _read_gguf_string(file)
    if kind != _GGUF_ARRAY:
        code = _GGUF_SCALARS[kind]
        return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]
    item_kind, length = struct.unpack("<IQ", file.read(12))
    if item_kind == _GGUF_STRING:
        for _ in range(length):
            file.seek(struct.unpack("<Q", file.read(8))[0], 1)
    else:
        file.seek(length * struct.calcsize(f"<{_GGUF_SCALARS[item_kind]}"), 1)
    return length


def _read_gguf_tensor_name(file: BinaryIO) -> str:
    name = _read_gguf_string(file)
    (dims,) = struct.unpack("<I", file.read(4))
    file.seek(8 * dims + 4 + 8, 1)
    return name
