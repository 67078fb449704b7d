"""The settings of torch's allocator: taken from the environment that plans, told in the plan, and given to its workers as they were planned.

Otherwise a variable of one machine's shell would change what a run reserves, and no one would be told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""In the order in which torch 2.13 takes the first that is set (c10/core/AllocatorConfig.h)."""
MODELLED = {"expandable_segments": ("true", "false"), "backend": ("native",)}
"""Settings whose effect on what is reserved is replayed (launcher/plan/allocator.py), with the values that are."""


def read_settings(environment: Mapping[str, str]) -> str:
    """What torch would read, such as "expandable_segments:True"; empty where nothing is set."""
    return next((environment[name].strip() for name in VARIABLES if environment.get(name, "").strip()), "")


def parse_settings(settings: str) -> dict[str, str]:
    """Names and values: pairs between commas; a list of values stands in brackets."""
    return {name: value.strip() for name, value in re.findall(r"(\w+)\s*:\s*(\[[^\]]*\]|[^,]*)", settings)}


def has_expandable_segments(settings: str) -> bool:
    return parse_settings(settings).get("expandable_segments", "").lower() == "true"


def describe_settings(settings: str) -> list[str]:
    """The plan's note on them, naming those that the reserved figure does not know of."""
    if not settings:
        return []
    unknown = [f"{name}:{value}" for name, value in parse_settings(settings).items() if value.lower() not in MODELLED.get(name, ())]
    text = f"allocator: {settings}, from this shell's environment; every worker gets it, whatever its machine says"
    return [text + (f"; not modelled, so that the reserved figure is as without: {', '.join(unknown)}" if unknown else "")]


def put_settings(settings: str, environment: MutableMapping[str, str]) -> str:
    """Make these the settings of a process that has not imported torch yet. Gives what was set in their place, empty if nothing else was."""
    before = read_settings(environment)
    for name in VARIABLES:
        environment.pop(name, None)
    if settings:  # torch before 2.9 reads the second alone
        environment.update(dict.fromkeys(VARIABLES[:2], settings))
    return before if before != settings else ""
