"""The command's frame: the group that verbs join, the options they share, and the one place that turns an error into an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from launcher import __version__
from launcher.errors import Interrupted, LauncherError, RecipeError

# In the order of --help.
VERBS = (
    "run",
    "list",
    "status",
    "logs",
    "attach",
    "stop",
    "checkpoints",
    "data",
    "generate",
    "export",
    "recipes",
    "doctor",
    "calibrate",
)
GROUP_OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")


class Verbs(TyperGroup):
    """A first argument that is no verb is a recipe to run; an error becomes its exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=VERBS.index)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["json"] = "--json" in args
        if args and args[0] not in self.commands and args[0] not in GROUP_OPTIONS:
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with errors_as_exit_codes(as_json=ctx.meta["json"]):
            return super().invoke(ctx)


@contextlib.contextmanager
def errors_as_exit_codes(*, as_json: bool) -> Iterator[None]:
    """Report what is raised inside and exit with its code. With --json the report is JSON on stdout."""
    try:
        yield
    except LauncherError as error:
        _exit_with(error, as_json)
    except KeyboardInterrupt:
        _exit_with(Interrupted("interrupted"), as_json)
    except (typer.Exit, typer.Abort, TyperException, BrokenPipeError):
        raise  # typer's own: help was shown, an option was wrong, or nobody reads us any more
    except Exception as error:  # noqa: BLE001  the boundary: nothing may reach the user as a bare traceback
        _exit_with(_make_unforeseen(error), as_json)


def _exit_with(error: LauncherError, as_json: bool) -> NoReturn:
    from launcher.view import print_error

    if as_json:
        facts = {"error": type(error).__name__, "message": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
        print_json(facts | ({"faults": [dataclasses.asdict(fault) for fault in error.faults]} if isinstance(error, RecipeError) else {}))
    else:
        print_error(error, sys.stderr)
    raise typer.Exit(error.exit_code)


def _make_unforeseen(error: Exception) -> LauncherError:
    """An error that no code of ours raised: named where the table knows it, else one line and where its traceback is."""
    from launcher.train.foreign import TABLE

    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for matches, kind, remedy in TABLE:
        if matches(error):
            return kind(line, remedy)
    with tempfile.NamedTemporaryFile("w", prefix="lepton-launch-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    whose = "" if isinstance(error, OSError) else "this is a fault of lepton-launch; "
    return LauncherError(line, f"{whose}the traceback is in {file.name}")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


app = typer.Typer(
    cls=Verbs,
    name="lepton-launch",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=r"Fine-tune a language model from a YAML recipe: lepton-launch RECIPE \[section.key=value ...]",
    epilog="Start with: lepton-launch quickstart. What this machine can do: lepton-launch doctor.",
)


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="Changes to the recipe.", show_default=False)
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of one in runs/.", show_default=False)]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE|ADDRESS",
        help="A cluster file, or a running Ray: http://HOST:8265; without it, this machine.",
        show_default=False,
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="RUN", help="The name of a run on a cluster.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout, errors too.")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"lepton-launch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)] = False,
) -> None: ...
