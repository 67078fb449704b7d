"""A dry run as one page: the memory's timeline as a picture, its numbers as tables. Nothing is fetched: no script, no font, no image."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from launcher.plan.budget import COMPONENTS
from launcher.plan.describe import describe_plan
from launcher.units import GIB, format_bytes
from launcher.view_plan import describe_rest, describe_slowdown, describe_verdict, format_changes

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.plan.budget import Component, FigureName, Phase
    from launcher.plan.dry_run import DryRun

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 980, 430, 64, 16, 30, 56
PALETTE = (
    "#2f5fa8", "#5b8bd0", "#8fb4e6", "#b9d2f2", "#a03a6b", "#c86a9b", "#e39fc3", "#f0c6dc", "#2f7d5b", "#5aa985", "#c98a1b", "#e3b55c",
    "#f0d79d", "#7a7f87", "#9ba0a8", "#bcc0c6", "#d3d6da", "#e4e6e9", "#8d6cab", "#4f9da6", "#6b7d3a",
)  # fmt: skip
"""A colour a component, in the order of COMPONENTS."""
STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --dim: #666d76; --paper: #ffffff; --line: #d9dde2; --bad: #c0392b; --good: #2f7d5b; --near: #b9770e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --dim: #9aa1a9; --paper: #16191d; --line: #343a41; --bad: #ef7466; --good: #6cc49b; --near: #e8b04a } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1000px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.verdict { font-weight: 700 } .FITS { color: var(--good) } .TIGHT { color: var(--near) } .DOES { color: var(--bad) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
.wide table { font-size: .78rem } .wide td, .wide th { padding-right: .35rem } .wide td:first-child { white-space: nowrap }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--dim); font-weight: 500 } td.n, th.n { text-align: right; white-space: nowrap }
svg { width: 100%; height: auto } svg text { fill: var(--ink); font-size: 12px } svg .dim { fill: var(--dim) } svg .grid { stroke: var(--line) }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px } .legend span { margin-right: 1.1rem; white-space: nowrap }
code { font-size: .92em; overflow-wrap: anywhere } .dim { color: var(--dim) }
"""


def make_page(dry: DryRun) -> str:
    """The whole page as HTML."""
    plan, memory = dry.plan, dry.plan.memory
    verdict = memory.verdict
    parts = [
        f"<h1>{escape(plan.recipe.name)}</h1>",
        f'<p><span class="verdict {verdict.split()[0]}">{verdict}</span> &nbsp;{escape(describe_verdict(plan))}</p>',
        "<h2>Memory of a device through the run</h2>",
        draw_timeline(memory.phases, memory.budget),
        _draw_legend(memory.phases),
        _phase_table(memory.phases, memory.decisive),
        f"<h2>What {escape(memory.decisive_phase)} holds, which decides</h2>",
        _component_table(memory.decisive),
    ]
    if memory.host_phases:
        parts += ["<h2>Memory of a host</h2>", draw_timeline(memory.host_phases, memory.host_budget), _draw_legend(memory.host_phases),
                  _component_table(memory.host_decisive)]  # fmt: skip
    if dry.suggestions:
        rows = [[f"<code>{escape(' '.join(format_changes(item.changes)))}</code>", format_bytes(item.need), escape(describe_slowdown(item.slowdown)),
                 escape(item.effect or "the result stays the same")] for item in dry.suggestions]  # fmt: skip
        parts += [
            "<h2>What would fit, cheapest first</h2>",
            _table(["add to the command", "needs (P95)", "speed", "effect"], rows, numbers={1}),
        ]
    parts += ["<h2>Disk, network, time</h2>", _table(["", ""], [[escape(a), escape(b)] for a, b in describe_rest(plan, dry.speed)])]
    words = [[escape(label), escape(text)] for label, text in describe_plan(plan) if label and label != "memory"]
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*plan.notes, *memory.notes, *dry.assumptions))
    parts += ["<h2>Plan</h2>", _table(["", ""], words), f"<h2>Chosen and assumed</h2><ul>{notes}</ul>"]
    title = f"{plan.recipe.name}: memory plan"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def draw_timeline(phases: tuple[Phase, ...], budget: int | None) -> str:
    """The phases from left to right as an SVG: components stacked to the expected total, a whisker to P95, a line at the budget."""
    most = max([phase.figure("total").p95 for phase in phases] + ([budget] if budget else []))
    top, step = _make_scale(most)
    inner, slot = HEIGHT - TOP - BOTTOM, (WIDTH - LEFT - RIGHT) / len(phases)
    width = min(120.0, slot * 0.72)

    def y_of(size: float) -> float:
        return TOP + inner * (1 - size / top)

    marks: list[str] = []
    for number in range(round(top / step) + 1):
        y = y_of(number * step)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text class="dim" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number * step / GIB:g}</text>')
    for index, phase in enumerate(phases):
        marks += _draw_phase(phase, LEFT + slot * index + (slot - width) / 2, width, y_of)
    if budget:
        y = y_of(budget)
        marks.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c0392b" stroke-width="2" stroke-dasharray="6 4"/>'
        )
        marks.append(f'<text x="{WIDTH - RIGHT}" y="{y - 6:.1f}" text-anchor="end">budget {format_bytes(budget)}</text>')
    marks.append(f'<text class="dim" x="{LEFT - 8}" y="{TOP - 8}" text-anchor="end">GiB</text>')
    label = "memory by phase: " + ", ".join(f"{phase.name} {format_bytes(phase.total_bytes)}" for phase in phases)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(marks)}</svg>'


def _draw_phase(phase: Phase, x: float, width: float, y_of: Callable[[float], float]) -> list[str]:
    marks: list[str] = []
    below, total = 0, phase.figure("total")
    for part in _in_order(phase):
        upper, lower = y_of(below + part.bytes), y_of(below)
        title = f"{part.name}: {format_bytes(part.bytes)} ({part.provenance}{f', ± {part.error:.0%}' if part.error else ''})"
        marks.append(f'<rect x="{x:.1f}" y="{upper:.1f}" width="{width:.1f}" height="{max(0.0, lower - upper):.2f}" fill="{_colour(part.name)}">'
                     f"<title>{escape(title)}</title></rect>")  # fmt: skip
        below += part.bytes
    middle, high, low = x + width / 2, y_of(total.p95), y_of(total.p50)
    marks.append(f'<path d="M{middle:.1f} {low:.1f}V{high:.1f}M{middle - 7:.1f} {high:.1f}h14" stroke="currentColor" fill="none"/>')
    marks.append(f'<text x="{middle:.1f}" y="{min(high, low) - 6:.1f}" text-anchor="middle">{total.p50 / GIB:.1f}</text>')
    for line, word in enumerate(phase.name.split(" ")):
        marks.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 20 + 15 * line}" text-anchor="middle">{escape(word)}</text>')
    return marks


def _make_scale(most: int) -> tuple[float, float]:
    """The top of an axis and the distance of its marks: a round number of GiB, four to eight marks."""
    step = 2.0**-10 * GIB
    while most * 1.08 / step > 8:
        step *= 2
    return step * (int(most * 1.08 / step) + 1), step


def _colour(name: str) -> str:
    return PALETTE[COMPONENTS.index(name) % len(PALETTE)] if name in COMPONENTS else PALETTE[-1]


def _in_order(phase: Phase) -> list[Component]:
    return sorted(phase.components, key=lambda part: COMPONENTS.index(part.name) if part.name in COMPONENTS else len(COMPONENTS))


def _draw_legend(phases: tuple[Phase, ...]) -> str:
    names = {part.name for phase in phases for part in phase.components}
    keys = "".join(
        f'<span><i class="key" style="background:{_colour(name)}"></i>{escape(name)}</span>' for name in COMPONENTS if name in names
    )
    return f'<p class="legend">{keys}</p>'


def _phase_table(phases: tuple[Phase, ...], decisive: Phase) -> str:
    """A row a component and a figure, a column a phase."""
    heads = ["", *(f"<b>{escape(phase.name)}</b>" if phase is decisive else escape(phase.name) for phase in phases)]
    rows = []
    for name in COMPONENTS:
        sizes = [sum(part.bytes for part in phase.components if part.name == name) for phase in phases]
        if any(sizes):
            key = f'<i class="key" style="background:{_colour(name)}"></i>{escape(name)}'
            rows.append([key, *(format_bytes(size) if size else "" for size in sizes)])
    figures: dict[str, FigureName] = {"allocated": "allocated", "reserved": "reserved", "device total": "total"}
    for label, figure in figures.items():
        rows.append([f"<b>{label}</b>", *(format_bytes(phase.figure(figure).p50) for phase in phases)])
    rows.append(["<b>device total, P95</b>", *(format_bytes(phase.figure("total").p95) for phase in phases)])
    return _table(heads, rows, numbers=set(range(1, len(heads))))


def _component_table(phase: Phase) -> str:
    rows = [[escape(part.name), format_bytes(part.bytes), f"± {part.error:.0%}" if part.error else "", part.provenance, part.counts_in]
            for part in _in_order(phase)]  # fmt: skip
    return _table(["component", "bytes", "error", "where the number comes from", "first seen in"], rows, numbers={1, 2})


def _table(heads: list[str], rows: list[list[str]], numbers: set[int] | None = None) -> str:
    """A table of cells that are HTML already."""

    def cells(tag: str, values: list[str]) -> str:
        return "".join(f"<{tag}{' class=n' if index in (numbers or set()) else ''}>{value}</{tag}>" for index, value in enumerate(values))

    head = f"<tr>{cells('th', heads)}</tr>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'
