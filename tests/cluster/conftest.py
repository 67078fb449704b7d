"""The cluster that the tests of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hosts import why_not
from rayhosts import RayHosts, open_cluster


@pytest.fixture(scope="session")
def ray_hosts(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[RayHosts]:
    if reason := why_not():
        pytest.skip(reason)
    with open_cluster(tmp_path_factory.mktemp("hosts"), tiny) as cluster:
        yield cluster
