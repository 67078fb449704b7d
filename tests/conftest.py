"""Fixtures that several test files share."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plans import CONFIG, write_config

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks
from tiny import write_conversations, write_model


def pytest_configure() -> None:
    """A shell starts what runs in its background with SIGINT ignored, and processes inherit that; the tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests keep tokens and converted weights to themselves, and know of no calibration."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        # For the S3 server on loopback (test_checkpoint_storage.py): ranks inherit them when they are started.
        for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_EC2_METADATA_DISABLED", "true")):
            patch.setenv(name, value)
        patch.setenv("XDG_CONFIG_HOME", str(cache / "config"))
        yield cache


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl and eval.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model")
    write_conversations(folder / "train.jsonl", 200, seed=1)
    write_conversations(folder / "eval.jsonl", 20, seed=2)
    return folder


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder that can be planned with: a configuration, and a name for weights that nobody reads."""
    return write_config(tmp_path / "model", CONFIG)
