"""What a dry run finds out beyond the plan: an estimate of time, what would fit, and the document that `--json` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from launcher.plan.advise import Suggestion, suggest_nodes
from launcher.plan.calibration import find_calibration, find_rates
from launcher.plan.plan import Plan, fits_on, make_suggestions
from launcher.plan.solve import Candidate, Choice
from launcher.plan.speed import Speed, estimate_run, estimate_step


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """A plan and what may be said about it."""

    plan: Plan
    speed: Speed | None
    """None where the catalogue does not know the device."""
    suggestions: list[Suggestion] | None
    """None where it fits, so that nobody has to ask."""
    nodes_that_fit: int | None
    choice: Choice | None
    """Of the autos, where it was asked for."""
    assumptions: tuple[str, ...]
    """What the plan and the estimate take for granted, beyond the notes of both."""


def make_dry_run(plan: Plan, choice: Choice | None = None) -> DryRun:
    """The dry run of a plan; with `choice` it explains what was chosen among."""
    fits = plan.memory.verdict != "DOES NOT FIT"
    return DryRun(
        plan=plan,
        speed=estimate_plan(plan),
        suggestions=None if fits else make_suggestions(plan),
        nodes_that_fit=None if fits else _find_nodes(plan),
        choice=choice,
        assumptions=tuple(_list_assumptions(plan)),
    )


def _list_assumptions(plan: Plan) -> Iterator[str]:
    cluster, device = plan.cluster, find_rates(plan.cluster)
    if cluster.host_memory <= 1:
        yield "host memory: its size is not known here, so what a host needs is told and not judged (host_memory of a cluster file says it)"
    if device is None:
        yield f"time: not estimated, because the catalogue does not know a {cluster.device_name}"
        return
    if cluster.nodes > 1:
        yield f"time: {device.network_rate / 1e9:g} GB/s a GPU assumed between machines, {device.link_rate / 1e9:g} GB/s within one"
    if cluster.accelerator == "cpu" and find_calibration(cluster) is None:
        yield "time: what a core computes is assumed; lepton-launch calibrate measures it on this machine"


def estimate_plan(plan: Plan) -> Speed | None:
    device = find_rates(plan.cluster)
    if device is None:
        return None
    step = estimate_step(plan.recipe, plan.shape, plan.layout, plan.batch, device, plan.trainable_params)
    return estimate_run(plan.recipe, plan.cluster, step, plan.base_dir)


def _find_nodes(plan: Plan) -> int | None:
    return suggest_nodes(plan.cluster, partial(fits_on, plan)) if plan.layout.accelerator == "cuda" else None


def make_document(dry: DryRun) -> dict[str, Any]:
    """The dry run for a program to read. The schema is documented in docs/plan.md and versioned by `schema_version`."""
    document = dry.plan.memory.to_dict()
    document["notes"] = [*dry.plan.notes, *document["notes"], *dry.assumptions]
    document["speed"] = asdict(dry.speed) | {"estimate": True} if dry.speed else None
    document["suggestions"] = None if dry.suggestions is None else [_suggestion_facts(item) for item in dry.suggestions]
    document["nodes_that_fit"] = dry.nodes_that_fit
    if dry.choice is not None:
        document["candidates"] = [_candidate_facts(item, taken=item is dry.choice.taken) for item in dry.choice.considered]
        document["candidates_total"] = dry.choice.total
        document["candidates_considered"] = len(dry.choice.considered)
    document["plan"] = dry.plan.to_dict()
    return document


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _suggestion_facts(item: Suggestion) -> dict[str, Any]:
    return {
        "changes": {key: _plain(value) for key, value in item.changes.items()},
        "step_s": item.step_s,
        "slowdown": item.slowdown,
        "device_total_bytes_p95": item.need,
        "effect": item.effect,
    }


def _candidate_facts(item: Candidate, *, taken: bool) -> dict[str, Any]:
    return {
        "changes": {key: _plain(value) for key, value in item.changes.items()},
        "step_s": item.step_s,
        "device_total_bytes_p95": None if item.memory is None else item.memory.device("total").p95,
        "device_bytes_at_least": item.floor or None,
        "is_exact": item.is_exact,
        "verdict": item.verdict,
        "taken": taken,
    }
