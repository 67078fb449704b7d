"""recipes and data: what can be run, and what it would see."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.app import JsonOption, OverridesArgument, RecipeArgument, app, print_json
from launcher.cli.run import choose_cluster, locate_named_recipe, make_checked_plan

recipes_app = typer.Typer(
    help="List, show and copy the recipes that ship, or print the JSON Schema for editors.",
    no_args_is_help=False,
    invoke_without_command=True,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(recipes_app, name="recipes")


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show the examples as the model will see them, the tokens that carry loss marked, and how they fill the packs."""
    from launcher.recipe_file import load_recipe
    from launcher.train.inspect import inspect_data
    from launcher.view import print_data

    path = locate_named_recipe(recipe)
    loaded = load_recipe(path, tuple(overrides or ()))
    plan, _ = make_checked_plan(loaded, path, choose_cluster(None, None, None, None), Path(loaded.output_dir) / loaded.name)
    shown = inspect_data(plan, rows)
    if as_json:
        print_json(dataclasses.asdict(shown))
    else:
        print_data(shown, sys.stdout)


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
        print_json(found)
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

    print_json(make_json_schema())
