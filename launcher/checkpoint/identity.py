"""What a checkpoint was made from, and how that differs from what is asked for now. No torch.

A recipe's keys fall in two: those that change what the weights become, and those that only change how they are
computed or shown. The second may change between a save and a resume; the first only by --allow-changed KEY.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import CheckpointError
from launcher.recipe import Recipe

FREE = (
    "name",
    "output_dir",
    "model.name_or_path",  # its weights are compared instead
    "model.attn_implementation",
    "model.liger_kernel",
    "model.loss",
    "model.trust_remote_code",
    "data.train",  # the tokens are compared instead
    "data.eval",
    "data.system_prompt",
    "data.chat_template",
    "batch.micro_batch_size",
    "parallel",
    "memory",
    "evaluate.every_steps",
    "evaluate.micro_batch_size",
    "evaluate.samples",
    "evaluate.max_new_tokens",
    "track",
    "save",
)
"""Keys, or sections, that may change without asking."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A key that is another now than when the checkpoint was made."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.then)} then, {_show(self.now)} now"


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def flatten_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys that decide what the weights become, dotted."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if _covers(FREE, key):
            return
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else name)
        else:
            flat[key] = value

    walk(recipe.model_dump(mode="json"), "")
    return flat


def make_identity(recipe: Recipe, *, dtype: str, weights: str = "", data: str = "") -> dict[str, Any]:
    """What a run is made from, flat. Without `weights` and `data`, what can be known before anything is loaded."""
    identity = flatten_recipe(recipe) | {"model.dtype": dtype}
    return identity | ({"model.weights": weights} if weights else {}) | ({"data.content": data} if data else {})


def find_differences(then: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """Keys whose values differ, among those that both sides know. A key of another method counts as missing."""
    unknown = {key for key in ("model.weights", "data.content") if key not in now}
    keys = sorted((then.keys() | now.keys()) - unknown)
    return [Difference(key, then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)]


def check_same(then: dict[str, Any], now: dict[str, Any], allowed: Iterable[str], what: str) -> list[Difference]:
    """The differences that `allowed` lets through. Raises CheckpointError that lists all others."""
    differences = find_differences(then, now)
    refused = [difference for difference in differences if not _covers(allowed, difference.key)]
    if refused:
        lines = "".join(f"\n  {difference}" for difference in refused)
        flags = " ".join(f"--allow-changed {difference.key}" for difference in refused)
        raise CheckpointError(
            f"{what} was made by another recipe, model or data set:{lines}", f"to go on with the change: {flags}; to start over: --fresh"
        )
    return differences


def _covers(keys: Iterable[str], key: str) -> bool:
    return any(key == wide or key.startswith(f"{wide}.") for wide in keys)


def check_keys(keys: Iterable[str]) -> None:
    """Raises CheckpointError for a key of --allow-changed that no recipe has."""
    sections = Recipe.model_fields
    for key in keys:
        if key.split(".")[0] not in sections:
            raise CheckpointError(f"--allow-changed {key}: a recipe has no such key", f"keys begin with {', '.join(sections)}")


def hash_weights(files: list[Path], cache: Path) -> str:
    """One hash of a base model's files, remembered by path, size and time of change: a large model is read once."""
    total = xxhash.xxh3_128()
    for path in sorted(files):
        total.update(path.name.encode())
        total.update(bytes.fromhex(_hash_file(path, cache)))
    return total.hexdigest()


def _hash_file(path: Path, cache: Path) -> str:
    stat = path.stat()
    known = cache / xxhash.xxh3_128_hexdigest(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    if known.is_file() and len(text := known.read_text(encoding="ascii")) == 32:
        return text
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = known.with_name(f"{known.name}.{os.getpid()}")
    unfinished.write_text(digest.hexdigest(), encoding="ascii")
    unfinished.replace(known)
    return digest.hexdigest()
