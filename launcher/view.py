"""How values look on a terminal and in a pipe: the plan, what a run came to, examples, errors. No torch, no ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launcher.errors import Interrupted, LauncherError
from launcher.progress import Summary, describe_change, format_loss, format_perplexity, printable
from launcher.run import Event, RunFolder
from launcher.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from launcher.doctor import Ability, Finding
    from launcher.job.submit import Job
    from launcher.plan import Plan
    from launcher.train.inspect import Bin, ShownData

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
    label = ("", "") if isinstance(error, Interrupted) else ("error: ", "bold red")  # who pressed Ctrl-C did nothing wrong
    console.print(Text.assemble(label, error.message), soft_wrap=True)
    if error.remedy:
        console.print(Text.assemble(("  → ", "bold green"), error.remedy), soft_wrap=True)


def print_plan(plan: Plan, stream: TextIO, without: tuple[str, ...] = ()) -> None:
    """The plan as a panel on a terminal, as labelled lines in a pipe; without what is told in full elsewhere."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from launcher.plan.describe import describe_plan

    console = make_console(stream)
    lines = [(label, text) for label, text in describe_plan(plan) if label not in without]
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
        table.add_row(*(Text(printable(cell.strip())) for cell in row))
    return table


def print_data(data: ShownData, stream: TextIO) -> None:
    """Examples with the tokens that carry loss in green (in ⟦ ⟧ in a pipe), then each split in numbers."""
    from rich.text import Text

    console = make_console(stream)
    marks = "in green" if console.is_terminal else "in ⟦ ⟧"
    if data.examples:
        console.print(f"the first {len(data.examples)} training examples, what carries loss {marks}:", style="bold")
    for number, example in enumerate(data.examples, start=1):
        console.print(f"\n── {number}: {example.tokens} tokens, {example.target_tokens} with loss", style="dim", markup=False)
        text = Text()
        for part in example.parts:
            text.append(f"⟦{part.text}⟧" if part.loss and not console.is_terminal else part.text, style="bold green" if part.loss else "")
        console.print(text, soft_wrap=True)
    console.print()
    console.print(_splits_table(data))
    for split in data.splits:
        console.print(f"\nlengths in {split.split}, in tokens", style="bold", markup=False)
        for line in draw_histogram(split.histogram):
            console.print(line, markup=False)


def _splits_table(data: ShownData) -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("")
    for split in data.splits:
        table.add_column(split.split, justify="right")
    rows: list[tuple[str, Callable[[dict[str, int | float]], str]]] = [
        ("examples", lambda stats: f"{stats['examples']:,}"),
        ("tokens", lambda stats: f"{stats['tokens']:,}"),
        ("with loss", lambda stats: f"{stats['target_tokens']:,} ({stats['target_tokens'] / stats['tokens']:.0%})"),
        ("length: mean, median, longest", lambda stats: f"{stats['mean_length']:g}, {stats['p50_length']}, {stats['max_length']}"),
        (_name_sequences(data), lambda stats: f"{stats['samples']:,}"),
        ("filled", lambda stats: f"{stats['fill']:.1%}"),
        ("dropped, truncated (too long)", lambda stats: f"{stats['dropped']}, {stats['truncated']}"),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(split.stats) for split in data.splits))
    return table


def _name_sequences(data: ShownData) -> str:
    if data.target_len is not None:
        return f"sources of at most {data.seq_len}, targets of at most {data.target_len}"
    return f"sequences of {data.seq_len}" + ("" if data.packing else ", one example each")


def draw_histogram(bins: list[Bin], width: int = 40) -> list[str]:
    """A bar a bin: "  12-24  ██████ 31"."""
    most, digits = max(bin.count for bin in bins), len(str(bins[-1].longest))
    return [f"  {bin.shortest:>{digits}}-{bin.longest:<{digits}}  {'█' * -(-bin.count * width // most)} {bin.count}" for bin in bins]


def print_findings(findings: list[Finding], abilities: list[Ability], stream: TextIO) -> None:
    """A line a finding with its remedy below, then what works here."""
    from rich.text import Text

    console = make_console(stream)
    signs = {"ok": ("ok", "green"), "note": ("note", "cyan"), "warning": ("warning", "yellow"), "broken": ("BROKEN", "bold red")}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        sign, style = signs[finding.health]
        console.print(Text.assemble((f"{sign:<8}", style), f"{finding.name:<{width}}  {finding.found}"), soft_wrap=True)
        if finding.remedy:
            console.print(Text.assemble(" " * (8 + width + 2), ("→ ", "bold green"), finding.remedy), soft_wrap=True)
    console.print("\nwhat works here", style="bold")
    width = max(len(ability.what) for ability in abilities)
    for ability in abilities:
        console.print(
            Text.assemble(("yes     ", "green") if ability.works else ("no      ", "yellow"), f"{ability.what:<{width}}  {ability.why}"),
            soft_wrap=True,
        )
    counts = [(sum(finding.health == health for finding in findings), health) for health in ("broken", "warning")]
    told = ", ".join(f"{count} {health}{'s' if health == 'warning' and count > 1 else ''}" for count, health in counts if count)
    console.print(f"\n{told or 'all that a run needs is here'}", style="bold", markup=False)


def print_jobs(jobs: list[Job], stream: TextIO) -> None:
    """A line a run: its name, Ray's state, since when and for how long, its folder."""
    from rich.table import Table

    table = Table()
    for name in ("run", "state", "started", "took", "folder"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        table.add_row(job.run, job.state.lower(), _format_time(job.started), _format_span(job), job.folder)
    make_console(stream).print(table)


def print_status(job: Job, progress: dict[str, Any], stream: TextIO) -> None:
    """How far one run is, as labelled lines."""
    steps = f"{progress['step']} of {progress['total_steps']}" if progress["total_steps"] else "none yet"
    lines = [
        ("run", f"{job.run} ({job.submission_id})"),
        ("state", job.state.lower() + (f", {progress['doing']}" if progress["doing"] and not job.is_over else "")),
        ("steps", steps + (f", loss {format_loss(progress['loss'])}" if progress["step"] else "")),
        ("committed", "nothing yet" if progress["committed"] is None else f"step {progress['committed']}"),
        ("restarts", str(progress["restarts"]) + (f", the last took {progress['recovery_s']:.1f} s" if progress["recovery_s"] else "")),
        ("started", f"{_format_time(job.started)}, {_format_span(job)} ago" if not job.is_over else f"{_format_time(job.started)}, took {_format_span(job)}"),
        ("folder", progress["folder"]),
        ("ended with", progress["ended_with"]),
    ]  # fmt: skip
    for label, text in lines:
        if text:
            print(f"{label:<11}{text}", file=stream)


def _format_time(seconds: float | None) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""


def _format_span(job: Job) -> str:
    import time

    return format_duration((job.ended or time.time()) - job.started) if job.started else ""


def print_checkpoints(place: str, rows: list[dict[str, Any]], stream: TextIO) -> None:
    """A line a checkpoint, then what is wrong with those that are not whole."""
    import datetime

    from rich.table import Table

    console = make_console(stream)
    console.print(place, markup=False, soft_wrap=True)
    if not rows:
        console.print("no checkpoints yet", style="dim")
        return
    table = Table()
    for name in ("step", "size", "ranks", "ZeRO", "saved", "condition"):
        table.add_column(name, justify="left" if name in ("saved", "condition") else "right")
    for row in rows:
        saved = f"{datetime.datetime.fromtimestamp(row['time']):%Y-%m-%d %H:%M:%S}" if "time" in row else ""
        verified = {None: "", True: ", verified", False: ", DAMAGED"}[row["verified"]]
        table.add_row(str(row["step"]), format_bytes(row["bytes"]), str(row.get("world_size", "")), str(row.get("zero_stage", "")), saved,
                      row["condition"] + verified)  # fmt: skip
    console.print(table)
    for row in rows:
        if row.get("why"):
            console.print(f"step {row['step']}: {row['why']}", markup=False, soft_wrap=True)
    if all(row["verified"] is None for row in rows):
        console.print("verify reads every byte and compares it with its hash", style="dim")
