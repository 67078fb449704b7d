"""How values look on a terminal and in a pipe: the plan, what a run came to, examples, errors. No torch, no ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launcher.progress import Summary, describe_change, format_loss, format_perplexity
from launcher.run import Event, RunFolder
from launcher.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.errors import LauncherError
    from launcher.plan import Plan

PIPE_WIDTH = 120


def make_console(stream: TextIO) -> Console:
    """A console that writes colours and boxes to a terminal, and plain text of a fixed width to a pipe."""
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=PIPE_WIDTH)


def print_error(error: LauncherError, stream: TextIO) -> None:
    """What is wrong, then what to do about it."""
    from rich.text import Text

    console = make_console(stream)
    console.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    if error.remedy:
        console.print(Text.assemble(("  → ", "bold green"), error.remedy), soft_wrap=True)


def print_plan(plan: Plan, stream: TextIO) -> None:
    """The plan as a panel on a terminal, as labelled lines in a pipe."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from launcher.plan.describe import describe_plan

    console = make_console(stream)
    lines = describe_plan(plan)
    if not console.is_terminal:
        for label, text in [("plan", plan.recipe.name), *lines]:
            print(f"{label:<11}{text}" if label else f"{'':<11}· {text}", file=stream)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    for label, text in lines:
        grid.add_row(label, Text(text if label else f"· {text}", style="" if label else "dim"))
    console.print(Panel(grid, title=f"plan of {plan.recipe.name}", title_align="left", border_style="cyan"))


def summary_facts(summary: Summary, folder: RunFolder) -> dict[str, Any]:
    """The summary for a program to read."""

    def scores(event: Event | None) -> dict[str, Any] | None:
        return {key: event[key] for key in ("loss", "perplexity", "tokens")} if event else None

    return {
        "run_dir": str(folder.path),
        "model": str(folder.model),
        "report": str(folder.report),
        "before": scores(summary.before),
        "after": scores(summary.after),
        "samples": [{"prompt": prompt, "before": before, "after": after} for prompt, before, after in summary.samples],
        "steps": summary.last_step["step"] if summary.last_step else 0,
        "train_s": summary.train_s,
        "tokens_per_s": summary.tokens_per_s,
        "memory_bytes": summary.memory_bytes,
    }


def print_summary(summary: Summary, folder: RunFolder, stream: TextIO, *, adapter: bool) -> None:
    """Held-out loss and sampled answers before and after, where everything is, and what to type next."""
    from rich.text import Text

    console = make_console(stream)
    console.print()
    console.print(_results_table(summary))
    if summary.samples:
        console.print(_samples_table(summary))
    if summary.last_step is not None and summary.train_s is not None:
        pace = f", {format_count(round(summary.tokens_per_s))} tokens/s" if summary.tokens_per_s else ""
        memory = f", {format_bytes(summary.memory_bytes)} a worker at the peak" if summary.memory_bytes else ""
        console.print(f"{summary.last_step['step']} steps in {format_duration(summary.train_s)}{pace}{memory}\n", markup=False)
    run = show_path(folder.path)
    lines = [
        ("adapter" if adapter else "model", show_path(folder.model)),
        ("report", show_path(folder.report)),
        ("talk to it", f"lepton-launch generate {run}"),
        ("one answer", f"lepton-launch generate {run} --prompt {_quote(summary.samples[0][0] if summary.samples else 'Hello!')}"),
    ]
    if adapter:
        lines.append(("merge it", f"lepton-launch export {run} --merge"))
    for label, text in lines:
        console.print(Text.assemble((f"{label:<11}", "bold cyan"), text), soft_wrap=True)


def show_path(path: Path) -> str:
    """The path as a person here would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _quote(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _results_table(summary: Summary) -> Any:
    from rich.table import Table

    table = Table(title="held-out set" if summary.after else "training", title_justify="left", title_style="bold")
    for name in ("", "before" if summary.after else "first step", "after" if summary.after else "last step", "change"):
        table.add_column(name, justify="left" if not name else "right")
    if summary.before and summary.after:
        losses = summary.before["loss"], summary.after["loss"]
        perplexities = summary.before["perplexity"], summary.after["perplexity"]
        table.add_row("loss", *map(format_loss, losses), describe_change(*losses))
        table.add_row("perplexity", *map(format_perplexity, perplexities), describe_change(*perplexities))
    elif summary.first_step and summary.last_step:
        losses = summary.first_step["loss"], summary.last_step["loss"]
        table.add_row("loss", *map(format_loss, losses), describe_change(*losses))
    return table


def _samples_table(summary: Summary) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="sampled answers", title_justify="left", title_style="bold", show_lines=True)
    for name, ratio in (("prompt", 2), ("before", 4), ("after", 4)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for row in summary.samples:
        table.add_row(*(Text(cell.strip()) for cell in row))
    return table
