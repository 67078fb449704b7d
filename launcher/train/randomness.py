"""The random generators that training draws from: torch's, CUDA's, Python's and numpy's, kept per rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from launcher.checkpoint.reshard import Reader
from launcher.train.fragments import Source, read_whole

KIND = "random"


def seed_rank(seed: int, rank: int, samples_seen: int = 0) -> None:
    """Dropout differs between ranks, and not between runs. `samples_seen` tells the restarts at another world size apart."""
    own = seed * 100_003 + rank + samples_seen * 1_000_003
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own % 2**32)


def list_random_states() -> list[Source]:
    """This rank's generators, copied now."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    states["python"] = torch.tensor([version, *words, -1 if gauss is None else 1])
    states["python_gauss"] = torch.tensor([gauss or 0.0], dtype=torch.float64)
    kind, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    states["numpy"] = torch.tensor([*np.asarray(key).tolist(), position, has_gauss])
    states["numpy_gauss"] = torch.tensor([cached], dtype=torch.float64)
    rank = dist.get_rank()
    return [
        Source(name=f"{name}@{rank}", kind=KIND, start=0, shape=tuple(state.shape), block_offset=0, tensor=state.clone())
        for name, state in states.items()
    ]


def load_random_states(reader: Reader) -> dict[str, torch.Tensor]:
    """This rank's generators of a checkpoint; empty where it was saved at another world size."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if reader.commit.world_size != ranks:
        return {}
    names = ["torch", "python", "python_gauss", "numpy", "numpy_gauss", *(["cuda"] if torch.cuda.is_available() else [])]
    return {name: read_whole(reader, f"{name}@{rank}", KIND) for name in names if KIND in reader.kinds.get(f"{name}@{rank}", ())}


def put_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    version, *words, has_gauss = (int(value) for value in states["python"])
    gauss: Any = float(states["python_gauss"]) if has_gauss == 1 else None
    random.setstate((version, tuple(words), gauss))
    *key, position, has_cached = (int(value) for value in states["numpy"])
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_cached, float(states["numpy_gauss"])))
