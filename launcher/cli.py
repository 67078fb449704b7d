"""lepton-launch: one short function a verb, and the only place that turns an error into an exit code.

Nothing heavy is imported here: `lepton-launch --help` answers before torch would have loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from launcher import __version__
from launcher.errors import BudgetError, ClusterError, DataError, Fault, Interrupted, LauncherError, RecipeError

if TYPE_CHECKING:
    from launcher.cluster import Cluster
    from launcher.plan import Plan
    from launcher.run import RunFolder
    from launcher.train.generate import Chat

VERBS = ("run", "data", "generate", "export", "recipes", "doctor")
GROUP_OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")


class Verbs(TyperGroup):
    """A first argument that is no verb is a recipe to run; an error becomes its exit code."""

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
        _print_json(facts | ({"faults": [dataclasses.asdict(fault) for fault in error.faults]} if isinstance(error, RecipeError) else {}))
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


def _print_json(value: Any) -> None:
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
recipes_app = typer.Typer(
    help="List, show and copy the recipes that ship, or print the JSON Schema for editors.",
    no_args_is_help=False,
    invoke_without_command=True,
)
app.add_typer(recipes_app, name="recipes")


def main() -> None:
    """The entry point. A terminal that cannot show a character shows a question mark, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="lepton-launch")


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="Changes to the recipe.", show_default=False)
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of one in runs/.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout, errors too.")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"lepton-launch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)] = False,
) -> None: ...


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="How many machines take part.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="A cluster file; without one, this machine.", show_default=False)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers a machine; one a GPU unless told, two on CPU.")] = None,
    accelerator: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="What to compute on; a GPU where there is one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune what the recipe says; the word run may be left out."""
    from launcher.progress import make_summary
    from launcher.run import read_events
    from launcher.view import print_plan, print_summary, summary_facts

    told = sys.stderr if as_json else sys.stdout
    path, changes = _locate_recipe(recipe), tuple(overrides or ())
    plan = _make_checked_plan(path, changes, _choose_cluster(cluster, nodes, workers, accelerator))
    if dry_run and as_json:
        _print_json(plan.to_dict())
        return
    print_plan(plan, told)
    if dry_run:
        return
    folder = _start_run_folder(plan, path, changes)
    _run_job(folder, told)
    summary = make_summary(read_events(folder))
    print_summary(summary, folder, told, adapter=plan.recipe.method.kind in ("lora", "qlora"))
    if as_json:
        _print_json(summary_facts(summary, folder))


def _locate_recipe(name_or_path: str) -> Path:
    """The recipe's file. What is no recipe may have been meant as a verb."""
    from launcher.gallery import locate_recipe

    try:
        return locate_recipe(name_or_path)
    except RecipeError:
        near = difflib.get_close_matches(name_or_path, VERBS, 1)
        if near:
            fault = Fault(name_or_path, "", "no verb, no such file and no shipped recipe of this name", f"did you mean {near[0]}?")
            raise RecipeError([fault]) from None
        raise


def _choose_cluster(file: Path | None, nodes: int | None, workers: int | None, accelerator: Literal["cpu", "cuda"] | None) -> Cluster:
    """The cluster of the file or of this machine, with what the command line asks for. Raises ClusterError."""
    from launcher.cluster import find_local_cluster, load_cluster

    cluster = load_cluster(file) if file else find_local_cluster(workers, accelerator)
    if accelerator and accelerator != cluster.accelerator:
        raise ClusterError(
            f"--accelerator {accelerator}: {file} says {cluster.accelerator}", "change the cluster file, or drop --accelerator"
        )
    changes = {"nodes": nodes, "workers_per_node": workers}
    return cluster.model_copy(update={name: value for name, value in changes.items() if value})


def _make_checked_plan(path: Path, overrides: tuple[str, ...], cluster: Cluster) -> Plan:
    """The plan of a recipe whose data has been looked at too: all that can be wrong before long work."""
    from launcher.data.check import check_data
    from launcher.plan import make_plan
    from launcher.recipe import load_recipe
    from launcher.run import next_run_path

    recipe = load_recipe(path, overrides)
    run_path = next_run_path(Path(recipe.output_dir), recipe.name)
    plan = make_plan(recipe, cluster, base_dir=str(path.parent.resolve()), run_dir=str(run_path))
    check_data(recipe.data, plan.base_dir, has_chat_template=plan.shape.has_chat_template)
    return plan


def _start_run_folder(plan: Plan, recipe_path: Path, overrides: tuple[str, ...]) -> RunFolder:
    """Make the run folder with the recipe as it was given and the plan in it."""
    from launcher.run import make_run_folder

    _check_startable(plan)
    folder = make_run_folder(Path(plan.recipe.output_dir), plan.recipe.name)
    given = "".join(f"#   {line}\n" for line in (str(recipe_path.resolve()), *overrides))
    folder.recipe.write_text(f"# As it was given to lepton-launch:\n{given}{recipe_path.read_text(encoding='utf-8')}", encoding="utf-8")
    dataclasses.replace(plan, run_dir=str(folder.path)).save(folder.plan)
    return folder


def _check_startable(plan: Plan) -> None:
    """What stands between a good plan and its start: nodes that are not there, a disk that is too full."""
    import shutil

    from launcher.units import DTYPE_BYTES, format_bytes

    if plan.cluster.address == "local" and plan.layout.nodes > 1:
        raise ClusterError(f"the plan needs {plan.layout.nodes} nodes, and this machine is one",
                           "name a running cluster with --cluster FILE, drop --nodes, or add --dry-run to see the plan only")  # fmt: skip
    saved = plan.trainable_params if plan.recipe.method.kind in ("lora", "qlora") else plan.num_params
    needed = saved * DTYPE_BYTES[plan.layout.dtype]
    place = next(folder for folder in (Path(plan.run_dir), *Path(plan.run_dir).parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BudgetError(f"{place} has {format_bytes(free)} of disk left, and the trained weights take {format_bytes(needed)}"
                          f" ({saved:,} parameters in {plan.layout.dtype})", "free some, or set output_dir to another disk")  # fmt: skip


def _run_job(folder: RunFolder, told: TextIO) -> None:
    from launcher.job.local import run_job
    from launcher.plan import load_plan
    from launcher.progress import make_display

    display = make_display(told)
    try:
        display.show({"event": "phase", "name": "starting Ray"})
        run_job(load_plan(folder.plan), display.show)
    finally:
        display.close()


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show the examples as the model will see them, the tokens that carry loss marked, and how they fill the packs."""
    from launcher.train.inspect import inspect_data
    from launcher.view import print_data

    plan = _make_checked_plan(_locate_recipe(recipe), tuple(overrides or ()), _choose_cluster(None, None, None, None))
    shown = inspect_data(plan, rows)
    if as_json:
        _print_json(dataclasses.asdict(shown))
    else:
        print_data(shown, sys.stdout)


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="Answer this and exit; may be given several times.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Talk to the model of a run; without --prompt a conversation."""
    from launcher.run import find_run

    if as_json and not prompt:
        raise typer.BadParameter("--json needs --prompt")
    folder = find_run(run)
    from launcher.train.generate import Chat, quiet_libraries

    quiet_libraries()
    chat = Chat(folder, max_new_tokens=max_new_tokens, temperature=temperature)
    if not prompt:
        _converse(chat)
        return
    answers = []
    for text in prompt:
        chat.reset()
        answers.append({"prompt": text, "answer": chat.ask(text, stream=not as_json)})
    if as_json:
        _print_json(answers)


def _converse(chat: Chat) -> None:
    """Questions from the terminal until /quit or Ctrl-D. Ctrl-C ends an answer, not the conversation."""
    print("/reset starts over, /quit or Ctrl-D ends.")
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            chat.reset()
        elif text:
            _answer_once(chat, text)


def _answer_once(chat: Chat, text: str) -> None:
    from launcher.view import print_error

    try:
        chat.ask(text, stream=True)
    except KeyboardInterrupt:
        print(" ...")
    except DataError as error:
        print_error(error, sys.stdout)


@app.command()
def export(
    run: RunArgument,
    merge: Annotated[bool, typer.Option("--merge", help="Melt the adapter into its base: a plain transformers folder.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where to write it; RUN/merged unless told.", show_default=False)] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="What to write weights in; the run's dtype unless told.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say where a run's model is, or with --merge write it as one folder that needs no adapter."""
    from launcher.run import find_run
    from launcher.view import show_path

    folder = find_run(run)
    if not merge:
        if output or dtype:
            raise typer.BadParameter("--output and --dtype go with --merge")
        from launcher.train.generate import check_finished

        check_finished(folder)
        card = folder.model / "README.md"
        _print_json({"model": str(folder.model)}) if as_json else print(f"{show_path(folder.model)}\n{show_path(card)} says how to load it")
        return
    from launcher.train.generate import quiet_libraries
    from launcher.train.merge import merge_run

    quiet_libraries()
    merged = merge_run(folder, output or folder.path / "merged", dtype)
    usage = f'AutoModelForCausalLM.from_pretrained("{show_path(merged)}") loads it'
    _print_json({"model": str(merged)}) if as_json else print(f"{show_path(merged)}\n{usage}")


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list(as_json: JsonOption = False) -> None:
    """Name and first line of each recipe."""
    from launcher.gallery import list_recipes

    found = list_recipes()
    if as_json:
        _print_json(found)
        return
    width = max(map(len, found), default=0)
    for name, headline in found.items():
        print(f"{name:<{width}}  {headline}")


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """Print a recipe."""
    from launcher.gallery import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: str,
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", help="A folder, or a .yaml file to call the copy.", show_default=False)
    ] = Path("."),
) -> None:
    """Copy a recipe with the data it names, to change it and run it."""
    from launcher.gallery import copy_recipe
    from launcher.view import show_path

    copies = copy_recipe(name, destination)
    for path in copies:
        print(show_path(path.absolute()))
    print(f"run it: lepton-launch {show_path(copies[0].absolute())}")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from launcher.recipe import make_json_schema

    _print_json(make_json_schema())


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Look at versions, devices, memory, disks and networks, and say what works here and what does not."""
    from launcher.doctor import examine, list_abilities
    from launcher.view import print_findings

    findings, abilities = examine(), list_abilities()
    broken = [finding.name for finding in findings if finding.health == "broken"]
    if as_json:
        facts = {"findings": [dataclasses.asdict(f) for f in findings], "abilities": [dataclasses.asdict(a) for a in abilities]}
        _print_json({"ok": not broken} | facts)
    else:
        print_findings(findings, abilities, sys.stdout)
    raise typer.Exit(1 if broken else 0)


if __name__ == "__main__":
    main()
