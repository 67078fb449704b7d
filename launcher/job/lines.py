"""What workers print, on its way to a terminal: one line a message, said once for all ranks that said it, noise left out.

Nothing is lost: the file of a rank holds every byte it wrote. Pure functions and one small state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

HOLD_S = 1.0
"""How long a line waits for other ranks to say the same."""

REMEDY = "  → "
"""How the second line of an error of ours begins (errors.py)."""

_NOISE = re.compile(
    "|".join(
        (
            r"\[W\d{3,4} [\d:.]+ .*\.cpp:\d+\]",  # torch's C++ warnings: sockets, IPv6, ProcessGroup teardown
            r"\[rank\d+\]:\[[WE]\d",
            r"\[Gloo\] Rank",
            r"\[lepton-launch\] ",  # the first line of a log, for who reads the file
            r"\[[\d-]+ [\d:,.]+\] \[(INFO|WARNING|DEBUG)\]",  # DeepSpeed's logger
            r"\((raylet|autoscaler|pid=|Worker pid=|bundle_reservation)",
            r"[\d-]+ [\d:,.]+\s+(INFO|WARNING) \w+\.py:\d+",  # Ray's logger
            r"\[[\d-]+ [\d:,.]+ [EWIC] \d+ \d+\]",  # Ray's C++ side
            r"(Loading|Writing) (checkpoint|model|weights).*\d+%",
            r".*\|\s*\d+/\d+ \[.*(it/s|s/it|\?it)",  # progress bars
            r".*(FutureWarning|DeprecationWarning|UserWarning|ResourceWarning)\b",
            r"\s*warnings\.warn\(",
            r"NOTE: Redirects are currently not supported",
            r"Using \S+ as PyTorch extensions root|(Detected CUDA files|Emitting ninja|Building extension|Loading extension|ninja: )",
            r"(wandb|mlflow): ",
            r".*oneDNN|.*TF-TRT|.*computation_placer",
            r"The tied weights mapping|`torch_dtype` is deprecated|Setting `pad_token_id`",
            r"Failed to load CPU gemm_4bit_forward|bitsandbytes library load error",
            r"A new version of the following files was downloaded",
        )
    )
)


def is_noise(line: str) -> bool:
    """Whether a line tells a user nothing to act on: libraries' own chatter, progress bars, deprecations."""
    return not line.strip() or _NOISE.match(line) is not None


def split_lines(text: str) -> list[str]:
    """The messages of a piece of a log: a bar that redraws itself counts once, a traceback is one message."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    messages: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            inside = True
            messages.append(line)
        elif inside:
            messages[-1] += "\n" + line
            inside = line.startswith((" ", "\t")) or not line
        elif line.startswith(REMEDY) and messages and messages[-1].startswith("Traceback"):
            messages[-1] += "\n" + line
        elif line:
            messages.append(line)
    return messages


@dataclass(frozen=True, slots=True)
class Line:
    """A message and the ranks that said it."""

    text: str
    ranks: tuple[int, ...]


@dataclass(slots=True)
class Merger:
    """Holds each line a moment, so that what all ranks say is said once."""

    held: dict[str, tuple[float, list[int]]] = field(default_factory=dict)

    def add(self, rank: int, lines: Iterable[str], now_s: float) -> None:
        for line in lines:
            since, ranks = self.held.get(line, (now_s, []))
            if rank not in ranks:
                ranks.append(rank)
            self.held[line] = (since, ranks)

    def take(self, now_s: float) -> list[Line]:
        """The lines that have waited long enough, in the order in which they came."""
        ready = [text for text, (since, _) in self.held.items() if now_s - since >= HOLD_S]
        return [Line(text, tuple(sorted(self.held.pop(text)[1]))) for text in ready]


def format_origin(ranks: tuple[int, ...], hosts: dict[int, str]) -> str:
    """Who said it: "node2 rank 3", "ranks 0-2", "all 4 ranks"."""
    if len(ranks) == 1:
        host = hosts.get(ranks[0], "")
        return f"{host} rank {ranks[0]}".strip()
    if len(ranks) == len(hosts):
        return f"all {len(ranks)} ranks"
    return f"ranks {format_ranks(ranks)}"


def format_ranks(ranks: Iterable[int]) -> str:
    """Numbers with their runs drawn together: 0, 1, 2, 5 → "0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in spans)
