"""Models whose config.json ships with the launcher, so that planning for them needs no network."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "data" / "models.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model of the hub. `config` is what its config.json says, as far as it bears on size and shape."""

    name: str
    params: int
    """As transformers builds it."""
    config: dict[str, Any]
    has_chat_template: bool


def find_known(hub_id: str) -> KnownModel | None:
    """The shipped geometry of a hub id (upper and lower case alike); None for a model that is not among them."""
    return _load_known().get(hub_id.lower())


def load_known() -> dict[str, KnownModel]:
    """Every shipped hub id, in lower case, with its model."""
    return dict(_load_known())


@functools.cache
def _load_known() -> dict[str, KnownModel]:
    known: dict[str, KnownModel] = {}
    for facts in json.loads(MODELS.read_text(encoding="utf-8"))["models"]:
        for chat in (True, False):
            model = KnownModel(name=facts["name"], params=facts["params"], config=facts["config"], has_chat_template=chat)
            known |= {hub_id.lower(): model for hub_id in facts["chat" if chat else "base"]}
    return known
