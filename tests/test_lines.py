"""What workers print, and what of it a terminal shows."""

from __future__ import annotations

import pytest

from launcher.job.lines import HOLD_S, Merger, format_origin, format_ranks, is_noise, split_lines


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[W1124 05:58:16.622 socket.cpp:767] [c10d] The client socket cannot be initialized",
        "[Gloo] Rank 0 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3",
        "[2026-11-24 05:58:16,622] [WARNING] [real_accelerator.py:213:get_accelerator] Setting accelerator to CPU.",
        "Writing model shards: 100%|##########| 1/1 [00:00<00:00, 264.31it/s]",
        "Map:  37%|###7      | 37/100 [00:00<00:00, 264.31it/s]",
        "/x/y.py:12: FutureWarning: this will change",
        "  warnings.warn(",
        "2026-11-24 05:58:16,622\tINFO worker.py:1927 -- Connecting to existing Ray cluster",
        "[2026-11-24 05:58:16,622 W 123 456] core_worker.cc:12: something",
    ],
)
def test_chatter_is_noise(line: str) -> None:
    assert is_noise(line)


@pytest.mark.parametrize("line", ["CUDA error: device-side assert triggered", "warning: 3 rows were left out", "loss is high"])
def test_what_a_user_can_act_on_is_not(line: str) -> None:
    assert not is_noise(line)


def test_a_traceback_is_one_message_and_a_bar_its_last_state() -> None:
    text = "before\nTraceback (most recent call last):\n  File 'x', line 1\n    boom()\nValueError: no\nafter\n10%\r20%\r100% done\n"
    assert split_lines(text) == [
        "before",
        "Traceback (most recent call last):\n  File 'x', line 1\n    boom()\nValueError: no",
        "after",
        "100% done",
    ]


def test_the_remedy_of_an_error_belongs_to_its_traceback() -> None:
    traceback = "Traceback (most recent call last):\n  File 'x', line 1\nlauncher.errors.DataError: no rows\n  → name another file"
    assert split_lines(f"{traceback}\nafter\n  → not of a traceback\n") == [traceback, "after", "  → not of a traceback"]


def test_what_all_ranks_say_is_said_once() -> None:
    merger = Merger()
    for rank in (2, 0, 1):
        merger.add(rank, ["the disk is slow"], now_s=10.0 + rank / 10)
    merger.add(1, ["only me"], now_s=10.0)
    assert merger.take(10.0 + HOLD_S / 2) == []
    lines = merger.take(11.5 + HOLD_S)
    assert [(line.text, line.ranks) for line in lines] == [("the disk is slow", (0, 1, 2)), ("only me", (1,))]
    assert merger.take(99.0) == []


def test_origins() -> None:
    hosts = {0: "node1", 1: "node2", 2: "node3", 3: "node4"}
    assert format_origin((2,), hosts) == "node3 rank 2"
    assert format_origin((0, 1, 2, 3), hosts) == "all 4 ranks"
    assert format_origin((0, 1, 3), hosts) == "ranks 0-1, 3"
    assert format_ranks([5, 0, 1, 2]) == "0-2, 5"
