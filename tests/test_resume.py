"""A resumed run is the unbroken run, to the last bit; at another world size or stage, to 1e-4.

Each case runs once without a break, saving on the way; then it is begun again with the checkpoint of step 3 alone.
Both end with a checkpoint, whose files (masters, optimizer states, random generators) must have the same bytes.
The wide matrix is `make test-checkpoints`; a slice of it runs by default.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, evaluations, fine_tune, losses
from tiny import plan_tiny

from launcher.plan import Plan
from launcher.run import Event

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "r": 4, "dropout": 0.1},
    "qlora4": {"kind": "qlora", "bits": 4, "r": 4, "dropout": 0.1},
    "qlora8": {"kind": "qlora", "bits": 8, "r": 4, "dropout": 0.1},
    "freeze": {"kind": "freeze", "last_layers": 1, "patterns": ["*norm*"]},
}
STAGES: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3, "leaf_modules": False},
    "3-leaf": {"zero_stage": 3},
    "2-offload": {"zero_stage": 2, "offload_optimizer": True},
    "3-offload": {"zero_stage": 3, "offload_optimizer": True, "offload_param": True},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3},
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "lion": {"lr": 3e-4},
    "adafactor": {"lr": 1e-2},
    "adamw_8bit": {"lr": 3e-3},
    "paged_adamw": {"lr": 3e-3},
    "paged_adamw_8bit": {"lr": 3e-3},
    "lion_8bit": {"lr": 3e-4},
}


def plan_case(
    tiny: Path,
    run_dir: Path,
    ranks: int,
    method: str = "full",
    stage: str = "2",
    optimizer: str = "adamw",
    dtype: str = "fp32",
    **more: Any,
) -> Plan:
    """Six steps over two mixed sources, packed, with dropout, accumulation, clipping, warm-up and decay, and evaluations in between."""
    mixed = [{"path": str(tiny / "train.jsonl"), "weight": 0.3}, {"path": str(tiny / "eval.jsonl"), "weight": 1.5}]
    sections: dict[str, Any] = {
        "model": {"dtype": dtype},
        "method": METHODS[method],
        "parallel": STAGES[stage],
        "optim": {"name": optimizer, **OPTIMIZERS[optimizer]},
        "data": {"train": mixed},
        "schedule": {"max_steps": 6, "epochs": 30.0, "warmup_steps": 2},
        "evaluate": {"every_steps": 2, "early_stopping": {"patience": 50}},
        "save": {"every_steps": 3, "keep": 10},
        **more,
    }
    return plan_tiny(tiny, run_dir, ranks=ranks, **sections)


def assert_same_run(ranks: Ranks, tiny: Path, tmp_path: Path, **case: Any) -> list[Event]:
    straight = ranks.run(fine_tune, plan_case(tiny, tmp_path / "straight", ranks.size, **case))[0]
    take_step(tmp_path / "straight", tmp_path / "resumed", 3)
    resumed: list[Event] = ranks.run(fine_tune, plan_case(tiny, tmp_path / "resumed", ranks.size, **case))[0]
    assert losses(resumed) == losses(straight)[3:]
    assert evaluations(resumed, "during") == evaluations(straight, "during")[1:]
    assert evaluations(resumed, "after") == evaluations(straight, "after")
    assert read_shards(tmp_path / "resumed", 6) == read_shards(tmp_path / "straight", 6)
    assert read_exported(tmp_path / "resumed") == read_exported(tmp_path / "straight")
    return resumed


def take_step(source: Path, target: Path, step: int) -> None:
    """Lay one checkpoint of a run into a new run's folder."""
    shutil.copytree(source / f"checkpoints/step-{step:06d}", target / f"checkpoints/step-{step:06d}")


def read_shards(run_dir: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / f"checkpoints/step-{step:06d}").glob("*.safetensors")}


def read_exported(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "model").glob("*.safetensors")}


SLICE = [
    ("full", "3", "adamw", "bf16"),
    ("lora", "2", "adamw", "fp32"),
    ("qlora4", "2", "adamw", "bf16"),
    ("qlora4", "3-leaf", "paged_adamw_8bit", "bf16"),
    ("qlora8", "0", "sgd", "bf16"),
    ("full", "2", "adamw_8bit", "bf16"),
    ("full", "3-leaf", "lion_8bit", "fp32"),
    ("full", "0", "adafactor", "bf16"),
    ("full", "1", "lion", "fp32"),
    ("full", "3-offload", "adafactor", "bf16"),
    ("lora", "2-offload", "adamw", "bf16"),
]


def meets_in_pairs(method: str, stage: str, optimizer: str, dtype: str) -> bool:
    """Half of the full product: every two of method, stage, optimizer and precision still meet in a case."""
    places = [list(METHODS).index(method), list(STAGES).index(stage), list(OPTIMIZERS).index(optimizer)]
    return sum(places) % 2 == ["fp32", "bf16"].index(dtype)


WIDE = [
    *itertools.product(METHODS, STAGES, ["adamw"], ["fp32", "bf16"]),
    *itertools.product(["full", "qlora4"], ["0", "1", "2", "3"], OPTIMIZERS, ["fp32", "bf16"]),
]


def is_possible(method: str, stage: str, optimizer: str, dtype: str) -> bool:
    """What a recipe may ask for."""
    return not (stage == "3-offload" and method == "qlora8")


@pytest.mark.parametrize(("method", "stage", "optimizer", "dtype"), SLICE)
def test_resumed_is_unbroken(method: str, stage: str, optimizer: str, dtype: str, two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    assert_same_run(two_ranks, tiny, tmp_path, method=method, stage=stage, optimizer=optimizer, dtype=dtype)


@pytest.mark.checkpoints
@pytest.mark.parametrize(
    ("method", "stage", "optimizer", "dtype"),
    [case for case in dict.fromkeys(WIDE) if case not in SLICE and is_possible(*case) and meets_in_pairs(*case)],
)
def test_resumed_is_unbroken_wide(
    method: str, stage: str, optimizer: str, dtype: str, two_ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    assert_same_run(two_ranks, tiny, tmp_path, method=method, stage=stage, optimizer=optimizer, dtype=dtype)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_one_rank_and_its_states_are_whole(stage: str, one_rank: Ranks, tiny: Path, tmp_path: Path) -> None:
    assert_same_run(one_rank, tiny, tmp_path, method="lora", stage=stage)


@pytest.mark.checkpoints
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_four_ranks(stage: str, optimizer: str, four_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    assert_same_run(four_ranks, tiny, tmp_path, stage=stage, optimizer=optimizer, batch={"global_batch_size": 8, "micro_batch_size": 1})


# --------------------------------------------------------------------------------------- early stopping, the best weights


@pytest.mark.parametrize("stage", ["2", "3"])
def test_early_stopping_and_the_best_weights_survive(stage: str, two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    """The best evaluation comes before the checkpoint, and the run ends with its weights."""
    case: dict[str, Any] = {
        "stage": stage,
        "data": {"train": str(tiny / "train.jsonl")},
        "optim": {"name": "adamw", "lr": 0.15, "max_grad_norm": 0.0},
        "schedule": {"max_steps": 40, "epochs": 60.0, "kind": "constant"},
        "evaluate": {"every_steps": 2, "early_stopping": {"patience": 3}},
    }
    straight = two_ranks.run(fine_tune, plan_case(tiny, tmp_path / "straight", 2, **case))[0]
    stop = next(event for event in straight if event["event"] == "early_stop")
    last = max(step for step in range(3, stop["step"], 3))
    assert stop["best_step"] <= last < stop["step"], "nothing to remember between the best evaluation and the end"
    take_step(tmp_path / "straight", tmp_path / "resumed", last)
    resumed = two_ranks.run(fine_tune, plan_case(tiny, tmp_path / "resumed", 2, **case))[0]
    assert next(event for event in resumed if event["event"] == "early_stop") == stop
    assert evaluations(resumed, "after") == evaluations(straight, "after")
    assert read_exported(tmp_path / "resumed") == read_exported(tmp_path / "straight")
    again = two_ranks.run(fine_tune, plan_case(tiny, tmp_path / "resumed", 2, **case))[0]
    assert losses(again) == [], "a run that had stopped early trained on"
    assert evaluations(again, "after") == evaluations(straight, "after")


def test_keep_best_saves_and_keeps_the_best(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    case: dict[str, Any] = {
        "data": {"train": str(tiny / "train.jsonl")},
        "optim": {"name": "adamw", "lr": 0.15, "max_grad_norm": 0.0},
        "schedule": {"max_steps": 8, "epochs": 60.0, "kind": "constant"},
        "evaluate": {"every_steps": 2},
        "save": {"every_steps": 3, "keep": 1, "keep_best": True},
    }
    events = two_ranks.run(fine_tune, plan_case(tiny, tmp_path, 2, **case))[0]
    during = evaluations(events, "during")
    best = 2 * (during.index(min(during)) + 1)
    assert best < 8
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-{best:06d}", "step-000008"]


# ------------------------------------------------------------------------------------------------------------ elastic


def record_samples(me: Any, plan: Plan, stop_after: int | None = None) -> tuple[list[Event], list[int]]:
    """Job: fine_tune, and the index of each training sample this rank read, in order."""
    from launcher.train.data import Samples

    read: list[int] = []
    real = Samples.sample

    def sample(self: Samples, index: int) -> Any:
        read.append(index)
        return real(self, index)

    Samples.sample = sample  # type: ignore[method-assign]
    try:
        return fine_tune(me, plan, stop_after), read
    finally:
        Samples.sample = real  # type: ignore[method-assign]


def elastic_case(tiny: Path, run_dir: Path, ranks: int, stage: str, optimizer: str = "adamw") -> Plan:
    """Two epochs and a half of 48 examples in steps of 24, no held-out set: what is read is what is trained on."""
    return plan_tiny(
        tiny,
        run_dir,
        ranks=ranks,
        parallel=STAGES[stage],
        optim={"name": optimizer, **OPTIMIZERS[optimizer]},
        data={"train": [{"path": str(tiny / "train.jsonl"), "limit": 48}], "eval": [], "packing": False},
        batch={"global_batch_size": 24, "micro_batch_size": 1},
        schedule={"epochs": 2.5, "max_steps": None, "warmup_steps": 1},
        save={"every_steps": 3, "keep": 10},
    )


def assert_elastic(saved_on: Ranks, resumed_on: Ranks, tiny: Path, tmp_path: Path, stages: tuple[str, str], optimizer: str = "adamw", within: float = 1e-4) -> None:  # fmt: skip
    straight = saved_on.run(fine_tune, elastic_case(tiny, tmp_path / "straight", saved_on.size, stages[0], optimizer))[0]
    first = saved_on.run(record_samples, elastic_case(tiny, tmp_path / "broken", saved_on.size, stages[0], optimizer), 3)
    second = resumed_on.run(record_samples, elastic_case(tiny, tmp_path / "broken", resumed_on.size, stages[1], optimizer))
    assert losses(first[0][0]) + losses(second[0][0]) == pytest.approx(losses(straight), abs=within)
    before = [index for _, read in first for index in read]
    after = [index for _, read in second for index in read]
    assert (len(before), len(after)) == (72, 48)
    # The first 48 samples are epoch one, and so on: each once an epoch, and half of them in the last half.
    counts = Counter(before + after)
    assert set(counts) == set(range(48)) and set(counts.values()) == {2, 3} and Counter(counts.values())[3] == 24
    assert all(count <= 2 for count in Counter(before).values()) and len(set(before)) == 48


@pytest.mark.parametrize(("stages", "optimizer"), [(("2", "3"), "adamw"), (("3", "0"), "adamw"), (("0", "1"), "sgd")])
def test_two_ranks_to_one_and_back(
    stages: tuple[str, str], optimizer: str, two_ranks: Ranks, one_rank: Ranks, tiny: Path, tmp_path: Path
) -> None:
    assert_elastic(two_ranks, one_rank, tiny, tmp_path / "down", stages, optimizer)
    assert_elastic(one_rank, two_ranks, tiny, tmp_path / "up", stages, optimizer)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_eight_bit_states_at_another_world_size(stage: str, two_ranks: Ranks, one_rank: Ranks, tiny: Path, tmp_path: Path) -> None:
    """Blocks that are cut elsewhere are quantised anew, so the losses agree less closely than those of exact states."""
    assert_elastic(two_ranks, one_rank, tiny, tmp_path, (stage, stage), "adamw_8bit", within=2e-2)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture
def other_ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("stages", [("2", "2"), ("3", "2")])
def test_four_ranks_to_two(stages: tuple[str, str], four_ranks: Ranks, two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    assert_elastic(four_ranks, two_ranks, tiny, tmp_path, stages)


@pytest.mark.checkpoints
@pytest.mark.parametrize("other_ranks", [3, 8], indirect=True)
def test_four_ranks_to_three_and_eight(other_ranks: Ranks, four_ranks: Ranks, one_rank: Ranks, tiny: Path, tmp_path: Path) -> None:
    for stages in (("0", "0"), ("1", "1"), ("2", "2"), ("3", "3"), ("2", "3"), ("3", "1")):
        name = "-".join(stages)
        assert_elastic(four_ranks, other_ranks, tiny, tmp_path / name, stages)
        assert_elastic(other_ranks, one_rank, tiny, tmp_path / f"{name}-one", stages)


@pytest.mark.checkpoints
@pytest.mark.parametrize(
    ("stages", "optimizer"),
    [((one, other), ["adamw", "sgd", "lion"][(int(one) + int(other)) % 3]) for one, other in itertools.product("0123", "0123")],
)
def test_every_stage_to_every_stage(
    stages: tuple[str, str], optimizer: str, two_ranks: Ranks, one_rank: Ranks, tiny: Path, tmp_path: Path
) -> None:
    assert_elastic(two_ranks, one_rank, tiny, tmp_path, stages, optimizer)


def test_factored_states_do_not_fit_flat_ones(two_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    two_ranks.run(fine_tune, plan_case(tiny, tmp_path, 2, stage="0", optimizer="adafactor"), 3)
    with pytest.raises(AssertionError, match=r"(row|col)_var.*stage 2 keeps a full state"):
        two_ranks.run(fine_tune, plan_case(tiny, tmp_path, 2, stage="2", optimizer="adafactor"))
