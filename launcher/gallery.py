"""The recipes that ship with lepton-launch: find, list and copy them. No torch, no ray.

In a source checkout they lie in recipes/, in an installed wheel in launcher/_recipes/.
"""

from __future__ import annotations

import difflib
import filecmp
import glob
import shutil
from pathlib import Path

import launcher
from launcher.errors import Fault, RecipeError

PACKAGE_DIR = Path(launcher.__file__).parent


def find_gallery() -> Path | None:
    """The folder of the shipped recipes; None where the installation has none."""
    for folder in (PACKAGE_DIR / "_recipes", PACKAGE_DIR.parent / "recipes"):
        if any(folder.glob("*.yaml")):
            return folder
    return None


def list_recipes() -> dict[str, str]:
    """Name → first comment line of each shipped recipe."""
    gallery = find_gallery()
    paths = sorted(gallery.glob("*.yaml")) if gallery else []
    return {path.stem: _headline(path) for path in paths}


def _headline(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if line.startswith("#") and text and not text.startswith("yaml-language-server"):
            return text
    return ""


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe. Raises RecipeError that names the nearest."""
    gallery, names = find_gallery(), list_recipes()
    stem = name.removesuffix(".yaml")
    if gallery is not None and stem in names:
        return gallery / f"{stem}.yaml"
    near = difflib.get_close_matches(stem, names, 1)
    remedy = f"did you mean {near[0]}?" if near else f"shipped recipes: {', '.join(names) or 'none in this installation'}"
    raise RecipeError([Fault(name, "", "no such file, and no shipped recipe of this name", remedy)])


def locate_recipe(name_or_path: str) -> Path:
    """The file itself where there is one, else the shipped recipe of that name."""
    path = Path(name_or_path).expanduser()
    return path if path.exists() else find_recipe(name_or_path)


def copy_recipe(name: str, destination: Path) -> list[Path]:
    """Copy a shipped recipe, what it extends and the data it names, so that the copy runs; the files written.

    `destination` is a folder, or a .yaml file to call the copy. Nothing is written over: raises RecipeError.
    """
    source = find_recipe(name)
    target = destination if destination.suffix in (".yaml", ".yml") else destination / source.name
    pairs = [(source, target)] + [(path, target.parent / path.relative_to(source.parent)) for path in _companions(source)]
    taken = [copy for original, copy in pairs if copy.exists() and not filecmp.cmp(original, copy, shallow=False)]
    if taken:
        raise RecipeError([Fault(str(path), "", "is there already, and holds something else", "name another folder") for path in taken])
    for original, copy in pairs:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
    return [copy for _, copy in pairs]


def _companions(source: Path) -> list[Path]:
    """The files below the recipe's folder that it needs: bases it extends, data files, a chat template."""
    from ruamel.yaml import YAML

    from launcher.recipe_file import load_recipe

    needed: list[Path] = []
    base = source
    while isinstance(name := YAML(typ="safe").load(base).get("extends"), str):
        base = base.parent / name
        needed.append(base)
    data = load_recipe(source).data
    for pattern in [item.path for item in (*data.train, *data.eval)] + [data.chat_template or ""]:
        if pattern and "\n" not in pattern:
            needed += [Path(path) for path in sorted(glob.glob(str(source.parent / pattern), recursive=True))]
    return [path for path in dict.fromkeys(needed) if path.is_file() and path.resolve().is_relative_to(source.parent.resolve())]
