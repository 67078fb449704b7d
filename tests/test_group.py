"""The proof that ranks reach each other, and the names of those that do not."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import Ranks
from tiny import plan_tiny

from launcher.errors import ClusterError
from launcher.job.worker import check_in, find_interface

HOSTS = ("node1", "node2")


def prove(me: Any, plan: Any, absent: int) -> str:
    from launcher.train.group import prove_group

    if me.rank == absent:
        return ""
    try:
        prove_group(plan, HOSTS, timedelta(seconds=2))
    except ClusterError as error:
        return error.message
    return "proved"


def test_a_group_that_is_whole_is_proved(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    assert two_ranks.run(prove, plan_tiny(tiny, tmp_path / "run"), -1) == ["proved", "proved"]


def test_a_rank_that_stays_away_is_named_with_its_host(tiny: Path, tmp_path: Path) -> None:
    ranks = Ranks(2)  # a group of its own: gloo gives up a group in which a barrier failed
    try:
        said = ranks.run(prove, plan_tiny(tiny, tmp_path / "run"), 1)
    finally:
        for process in ranks.processes:
            process.kill()
    assert said[0] == "rank 1 on node2 did not take part in the first meeting of the group"


def test_a_rank_that_never_comes_to_the_store_is_named(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(ClusterError, match="rank 1 on node2 did not come to the group within 1 s, seen from rank 0 on node1"):
        check_in(store, 0, HOSTS, timeout_s=1.0)
    store.set("here/1", "")
    check_in(store, 0, HOSTS, timeout_s=1.0)


def test_the_interface_is_the_one_that_owns_the_address() -> None:
    assert find_interface("127.0.0.1") == "lo"
    with pytest.raises(ClusterError, match="203.0.113.9"):
        find_interface("203.0.113.9")


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="reads Linux's own table")
def test_every_address_of_this_host_has_its_interface() -> None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET:
                assert find_interface(one.address) == name
