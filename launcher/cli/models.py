"""generate and export: what a run left, put to use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launcher.cli.app import JsonOption, RunArgument, app, print_json
from launcher.errors import DataError

if TYPE_CHECKING:
    from launcher.train.generate import Chat


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
        print_json(answers)


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
        print_json({"model": str(folder.model)}) if as_json else print(f"{show_path(folder.model)}\n{show_path(card)} says how to load it")
        return
    from launcher.plan import load_plan
    from launcher.train.generate import quiet_libraries
    from launcher.train.merge import merge_run

    quiet_libraries()
    merged = merge_run(folder, output or folder.path / "merged", dtype)
    usage = f'{load_plan(folder.plan).shape.auto_class}.from_pretrained("{show_path(merged)}") loads it'
    print_json({"model": str(merged)}) if as_json else print(f"{show_path(merged)}\n{usage}")
