"""Bytes, dtypes' sizes, and how numbers print."""

from __future__ import annotations

import re

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SUFFIX = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
           "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1 << 40}  # fmt: skip

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def make_bytes(text: str) -> int:
    """Bytes from a size with its unit: "24GiB" → 25769803776. Raises ValueError without a unit."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]i?B|B)\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number with its unit, such as 24GiB or 80GB")
    return int(float(match[1]) * _SUFFIX[match[2].upper()])


def make_seconds(text: str) -> float:
    """Seconds from a time with its unit: "90s" → 90, "10m" → 600, "2h" → 7200. Raises ValueError without a unit."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|h|d)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a time; write a number with its unit, such as 90s or 10m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def format_bytes(count: float) -> str:
    """Bytes for a person: 25769803776 → "24.0 GiB"."""
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """A count for a person: 134515008 → "134.5M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:g}"


def format_duration(seconds: float) -> str:
    """Seconds for a person: 3723 → "1:02:03", 63 → "1:03"."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
