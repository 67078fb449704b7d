"""How a dry run looks on a terminal and in a pipe: memory phase by phase, what decides, what would fit, how long. No torch, no ray."""

from __future__ import annotations

import json
import re
import textwrap
from typing import TYPE_CHECKING, Any, TextIO

from launcher.plan.budget import COMPONENTS
from launcher.recipe import Lora, QLora
from launcher.units import GIB, format_bytes, format_count, format_duration
from launcher.view import make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from launcher.plan import Plan
    from launcher.plan.advise import Suggestion
    from launcher.plan.budget import Component, MemoryPlan, Phase, Verdict
    from launcher.plan.calibration import Calibration
    from launcher.plan.dry_run import DryRun
    from launcher.plan.solve import Changes, Choice
    from launcher.plan.speed import Speed
    from launcher.plan.sweep import Cell

GROUPS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "weights": ("blue", "█", ("weights", "quantisation state", "adapters", "gathered parameters")),
    "training": ("magenta", "▓", ("gradients", "fp32 master", "optimizer states", "buckets", "step workspace")),
    "activations": ("green", "▒", ("activation checkpoints", "activations")),
    "logits": ("cyan", "≡", ("logits and loss",)),
    "work and overhead": ("bright_black", "░", ()),
}
"""Components that share a colour (on a terminal) or a fill (in a pipe); the last takes all that is in no other."""
VERDICT_STYLE: dict[Verdict, str] = {"FITS": "bold green", "TIGHT": "bold yellow", "DOES NOT FIT": "bold red"}
NAME_WIDTH, NUMBER_WIDTH = 17, 10
DEVICE_FIGURES = ("allocated", "reserved", "total", "P95")
HOST_FIGURES = ("total", "P95")
EXPLAINED = (
    ("stage", "parallel.zero_stage"),
    ("offload", "parallel.offload"),
    ("recompute", "memory.gradient_checkpointing"),
    ("base", "method.quantization"),
    ("loss", "model.loss"),
    ("bucket", "parallel.reduce_bucket_size"),
)
MOST_EXPLAINED = 24
"""Rows of the table of candidates; --json has them all."""
NO_BREAK = "\u00a0"


def group_of(name: str) -> str:
    return next((group for group, (_, _, names) in GROUPS.items() if name in names), list(GROUPS)[-1])


def print_dry_run(dry: DryRun, stream: TextIO) -> None:
    """All that a dry run found out: device and host memory, disk, network, an estimate of time, and what would fit."""
    console = make_console(stream)
    memory = dry.plan.memory
    _print_verdict(console, dry.plan)
    _print_phases(console, memory.phases, memory.decisive, memory.budget, _device_title(dry.plan), DEVICE_FIGURES)
    _print_decisive(console, memory)
    _print_host(console, dry.plan)
    for label, text in describe_rest(dry.plan, dry.speed):
        _print_wrapped(console, f"{label:<{NAME_WIDTH}}", text)
    for note in (*memory.notes, *dry.assumptions):
        _print_wrapped(console, f"{'':<{NAME_WIDTH}}· ", note, "dim")
    if dry.suggestions is not None:
        _print_suggestions(console, dry.suggestions, dry.nodes_that_fit)
    if dry.choice is not None:
        _print_choice(console, dry.choice)


def _device_title(plan: Plan) -> str:
    ranks = f", the worst of {plan.layout.world_size} ranks" if plan.layout.world_size > 1 else ""
    return f"memory of {'a GPU' if plan.layout.accelerator == 'cuda' else 'a worker'}{ranks}"


def _print_verdict(console: Console, plan: Plan) -> None:
    from rich.text import Text

    memory = plan.memory
    console.print(Text.assemble((memory.verdict, VERDICT_STYLE[memory.verdict]), "  ", describe_verdict(plan)), soft_wrap=True)


def describe_verdict(plan: Plan) -> str:
    """What the verdict stands on: needs at P95, and what there is."""
    memory, device = plan.memory, plan.memory.device("total")
    per = "a GPU" if plan.layout.accelerator == "cuda" else "a worker"
    budget = f"the budget of {format_bytes(memory.budget)}" if plan.recipe.memory.budget else format_bytes(memory.budget)
    text = f"{per} needs {format_bytes(device.p50)}, at most {format_bytes(device.p95)} (P95), of {budget}; {memory.decisive_phase} decides"
    if memory.host_budget is not None and memory.host.p95 > 0.97 * memory.host_budget:
        text += f"; a node needs {format_bytes(memory.host.p50)}, at most {format_bytes(memory.host.p95)}, of {format_bytes(memory.host_budget)}"
    return text


def _print_phases(
    console: Console, phases: tuple[Phase, ...], decisive: Phase, budget: int | None, title: str, figures: tuple[str, ...]
) -> None:
    """A line a phase: its bar and figures; below it what it is made of, unless it decides and has a table of its own."""
    from rich.text import Text

    bar_width = max(10, min(console.width, 160) - NAME_WIDTH - len(figures) * NUMBER_WIDTH - 3)
    scale = max([phase.figure("total").p95 for phase in phases] + ([budget] if budget else []))
    console.print()
    heads = "".join(f"{head:>{NUMBER_WIDTH}}" for head in figures)
    bar_head = f"{'of ' + format_bytes(budget) if budget else '':<{bar_width + 1}}"
    console.print(Text(title, style="bold"))
    console.print(Text(f"{'':<{NAME_WIDTH}}{bar_head}{heads}", style="dim"))
    for phase in phases:
        total = phase.figure("total")
        numbers = (phase.allocated_bytes, phase.reserved_bytes, total.p50, total.p95)[-len(figures) :]
        style = "bold" if phase is decisive else ""
        line = Text(f"{'▸' if phase is decisive else ' '} {phase.name:<{NAME_WIDTH - 2}}", style=style)
        line.append_text(_draw_bar(phase, scale, budget, bar_width, colours=console.is_terminal))
        line.append(" " + "".join(f"{format_bytes(number):>{NUMBER_WIDTH}}" for number in numbers), style=style)
        console.print(line, soft_wrap=True)
        if phase is not decisive or figures is not DEVICE_FIGURES:
            _print_wrapped(console, "    ", describe_components(phase), "dim")
    if figures is DEVICE_FIGURES:
        console.print(_legend(colours=console.is_terminal), soft_wrap=True)


def describe_components(phase: Phase) -> str:
    """What a phase is made of in one line; parts below a hundredth of it are one."""
    total = phase.total_bytes
    large = [part for part in _in_order(phase) if part.bytes >= total / 100]
    rest = total - sum(part.bytes for part in large)
    told = [f"{part.name} {format_bytes(part.bytes)}" for part in large] + ([f"other {format_bytes(rest)}"] if rest else [])
    return " + ".join(told)


def _draw_bar(phase: Phase, scale: int, budget: int | None, width: int, *, colours: bool) -> Text:
    """A bar whose whole width is `scale` bytes, a stretch a group of components, with a mark at the budget."""
    from rich.text import Text

    bar, drawn, so_far = Text(), 0, 0
    for group, (colour, fill, _) in GROUPS.items():
        so_far += sum(part.bytes for part in phase.components if group_of(part.name) == group)
        end = round(so_far / scale * width)
        bar.append(("█" if colours else fill) * (end - drawn), style=colour)
        drawn = max(drawn, end)
    bar.append("·" * (width - drawn), style="dim")
    if budget and budget < scale:
        at = min(width - 1, round(budget / scale * width))
        bar = Text.assemble(bar[:at], ("│", "bold red"), bar[at + 1 :])
    return bar


def _legend(*, colours: bool) -> Text:
    from rich.text import Text

    legend = Text("    ")
    for group, (colour, fill, _) in GROUPS.items():
        legend.append("█" if colours else fill, style=colour)
        legend.append(f" {group}   ", style="dim")
    return legend


def _in_order(phase: Phase) -> list[Component]:
    return sorted(phase.components, key=lambda part: COMPONENTS.index(part.name) if part.name in COMPONENTS else len(COMPONENTS))


def _print_wrapped(console: Console, head: str, text: str, style: str = "") -> None:
    from rich.text import Text

    width = max(30, min(console.width, 160) - len(head))
    held = re.sub(r"(?<=\d) (?=[KMGT]iB|B\b)", NO_BREAK, text)
    lines = textwrap.wrap(held, width, break_long_words=False, break_on_hyphens=False) or [""]
    for number, line in enumerate(lines):
        console.print(Text(f"{head if not number else ' ' * len(head)}{line.replace(NO_BREAK, ' ')}", style=style), soft_wrap=True)


def _print_decisive(console: Console, memory: MemoryPlan) -> None:
    """The components of the phase that decides: bytes, how sure, and where each number comes from."""
    from rich.table import Table

    phase = memory.decisive
    table = Table(title=f"{memory.decisive_phase}, which decides", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name, justify in (("component", "left"), ("bytes", "right"), ("±", "right"), ("from", "left"), ("seen in", "left")):
        table.add_column(name, justify=justify, header_style="dim")  # type: ignore[arg-type]
    for part in _in_order(phase):
        error = f"{part.error:.0%}" if part.error else ""
        seen = {"allocated": "allocated, reserved, total", "reserved": "reserved, total", "total": "total"}[part.counts_in]
        table.add_row(part.name, format_bytes(part.bytes), error, part.provenance, seen)
    console.print()
    console.print(table)


def _print_host(console: Console, plan: Plan) -> None:
    memory = plan.memory
    if memory.host_phases:
        ranks = plan.layout.workers_per_node
        title = f"host memory of a node ({ranks} rank{'s' if ranks > 1 else ''})"
        _print_phases(console, memory.host_phases, memory.host_decisive, memory.host_budget, title, HOST_FIGURES)
    console.print()


def describe_rest(plan: Plan, speed: Speed | None) -> list[tuple[str, str]]:
    """Disk, network and the estimate of time: a label and what it says."""
    disk, memory = plan.memory.disk, plan.memory
    lines = [
        (
            "disk",
            f"{format_bytes(disk.run_folder_bytes)} for the run folder: a checkpoint {format_bytes(disk.checkpoint_bytes)}, kept ones"
            f" {format_bytes(disk.kept_checkpoints_bytes)}, the exported model {format_bytes(disk.export_bytes)}"
            + (
                f"; {format_bytes(disk.merged_bytes)} more for a merge, which comes after the run and is not judged"
                if disk.merged_bytes
                else ""
            )
            + (f"; {format_bytes(disk.nvme_bytes)} of offloaded states on each machine's NVMe disk" if disk.nvme_bytes else ""),
        ),
        (
            "network",
            f"{format_bytes(memory.network_bytes)} a step sent by each rank" if memory.network_bytes else "nothing: there is one rank",
        ),
    ]
    return [*lines, ("time", describe_speed(speed) if speed else "not estimated: the device is not in the catalogue")]


def describe_speed(speed: Speed) -> str:
    """The estimate of speed, marked as one."""
    text = (
        f"estimated, not measured: {format_seconds(speed.step_s)} a step, {format_count(round(speed.tokens_per_s))} tokens/s,"
        f" MFU {speed.mfu:.0%}, most of it {speed.bound}"
    )
    if speed.steps is not None and speed.total_s is not None:
        text += f"; about {speed.steps:,} step{'s' if speed.steps != 1 else ''} in {format_duration(speed.total_s)}"
    return text + (f", costing about {speed.cost:,.2f}" if speed.cost is not None else "")


def format_seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 120 else format_duration(seconds)


def _print_suggestions(console: Console, suggestions: list[Suggestion], nodes: int | None) -> None:
    """What would fit, cheapest first, as it is typed after the recipe's name."""
    console.print()
    if not suggestions and nodes is None:
        console.print(
            "no change of this recipe that the launcher knows fits these devices: take more of them, or larger ones", style="bold"
        )
        return
    console.print("what would fit, cheapest first (add to the command):", style="bold")
    for suggestion in suggestions:
        console.print("  " + " ".join(format_changes(suggestion.changes)), markup=False, soft_wrap=True)
        effect = suggestion.effect or "the result stays the same"
        _print_wrapped(
            console, "      ", f"needs {format_bytes(suggestion.need)}; {describe_slowdown(suggestion.slowdown)}; {effect}", "dim"
        )
    if nodes is not None:
        console.print(f"  --nodes {nodes}", markup=False)
        console.print("      the recipe as it is, on more machines", style="dim")


def describe_slowdown(slowdown: float) -> str:
    """1.3 → "about 1.3 × the time"; what is no slower says so."""
    if 0.95 < slowdown < 1.05:
        return "about as fast"
    return f"about {slowdown:.1f} × the time" if slowdown > 1 else f"about {1 / slowdown:.1f} × as fast"


def format_changes(changes: Changes) -> list[str]:
    """Changes as overrides of the command line, quoted for a shell where need be."""
    return [_quote(f"{key}={_yaml(value)}") for key, value in changes.items()]


def _yaml(value: Any) -> str:
    if isinstance(value, Lora | QLora):
        facts = {"kind": value.kind, **value.model_dump(mode="json", exclude_defaults=True)}
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in facts.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def _quote(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _print_choice(console: Console, choice: Choice) -> None:
    """The candidates that were looked at for the autos, fastest first."""
    from rich.table import Table

    from launcher.plan.solve import describe_setting

    console.print()
    if not choice.considered:
        console.print("nothing in this recipe is auto, so there was nothing to choose", style="bold")
        return
    console.print(f"considered for auto: {len(choice.considered)} of {choice.total} candidates, fastest first", style="bold")
    table = Table(box=None, pad_edge=False)
    # A key that every candidate has alike takes no column.
    shown = [(head, key) for head, key in EXPLAINED if len({describe_setting(key, c) for c in choice.considered}) > 1]
    for name in (*(head for head, _ in shown), "micro", "a step", "needs (P95)", "verdict"):
        table.add_column(name, header_style="dim", justify="right" if name in ("a step", "needs (P95)") else "left", no_wrap=True)
    half = MOST_EXPLAINED // 2
    for number, candidate in enumerate(choice.considered):
        if half <= number < len(choice.considered) - half:
            if number == half:
                table.add_row(*["..."] * (len(shown) + 4), style="dim")
            continue
        if candidate.verdict is None:
            continue
        micro = f"{candidate.batch.micro_batch_size} × {candidate.batch.gradient_accumulation_steps}"
        cells = [describe_setting(key, candidate) for _, key in shown]
        memory = candidate.memory
        need = format_bytes(memory.device("total").p95) if memory else f"> {format_bytes(candidate.floor)}"
        mark = " ← taken" if candidate is choice.taken else ""
        table.add_row(*cells, micro, format_seconds(candidate.step_s), need, f"{candidate.verdict}{mark}",
                      style=VERDICT_STYLE[candidate.verdict].removeprefix("bold "))  # fmt: skip
    console.print(table)
    hidden, left = len(choice.considered) - 2 * half, choice.total - len(choice.considered)
    if hidden > 0:
        console.print(f"{hidden} in the middle are not shown: --json has them all", style="dim")
    if left:
        rest = f"the {left} others are slower, and were" if left > 1 else "the other one is slower, and was"
        console.print(f"{rest} not looked at", style="dim")


def print_sweep(cells: list[Cell], axes: list[str], stream: TextIO) -> None:
    """A table of what fits where: a row each combination."""
    from rich.table import Table

    console = make_console(stream)
    table = Table(box=None, pad_edge=False)
    for name in (*axes, "micro", "P95, GiB", "of", "a step", "tokens/s", "verdict"):
        table.add_column(name, header_style="dim", justify="left" if name == "verdict" else "right", no_wrap=name != "verdict")
    for cell in cells:
        if cell.plan is None:
            table.add_row(*cell.values, *("",) * 5, cell.problem, style="dim")
            continue
        memory = cell.plan.memory
        pace = (format_seconds(cell.speed.step_s), format_count(round(cell.speed.tokens_per_s))) if cell.speed else ("", "")
        decides = f" ({memory.decisive_phase})" if memory.verdict == "DOES NOT FIT" else ""
        table.add_row(*cell.values, str(cell.plan.batch.micro_batch_size), f"{memory.device('total').p95 / GIB:.1f}", f"{memory.budget / GIB:.1f}",
                      *pace, f"{memory.verdict}{decides}", style=VERDICT_STYLE[memory.verdict].removeprefix("bold "))  # fmt: skip
    console.print(table)
    if any(cell.speed for cell in cells):
        console.print("times are estimates, not measurements", style="dim")


def print_calibration(calibration: Calibration, stream: TextIO) -> None:
    """What was measured: sizes, rates, slack."""
    console = make_console(stream)
    lines = [(name, format_bytes(size)) for name, size in calibration.bytes.items()]
    for name, rate in calibration.rates.items():
        lines.append(
            (
                name.replace("_", " "),
                f"{rate / 1e9:,.0f} G{'FLOP' if 'flops' in name else 'B'}/s{' a core' if calibration.device == 'CPU' else ''}",
            )
        )
    if calibration.slack is not None:
        lines.append(("allocator slack", f"{calibration.slack:.0%} beyond live tensors"))
    console.print(f"{calibration.device}, with {calibration.versions.get('torch', 'torch')}", style="bold", markup=False)
    for name, told in lines:
        console.print(f"  {name:<20}{told}", markup=False)
