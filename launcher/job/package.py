"""What travels to the cluster with a run: this code as it is now, the plan or recipe, small files beside the recipe.

Ray unpacks the folder on every node, puts it first on the path of driver and workers, and names it by its content.
So the code that runs is the code that planned, uncommitted work included, whatever the nodes' image holds.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from launcher.cluster import Cluster
from launcher.data.check import check_data
from launcher.errors import DataError
from launcher.plan import Plan, make_plan, read_plan
from launcher.plan.source import PACKAGE_SCHEME
from launcher.recipe import Recipe
from launcher.units import MIB, format_bytes

CODE, ORDER, GIVEN, SECRETS, FILES = "launcher", "order.json", "recipe.yaml", "secrets.json", "files"
LARGEST_FILES = 100 * MIB
"""Ray keeps packages in the head's memory; what is larger belongs on the storage."""


class GoingOn(TypedDict):
    """Where a run begins: --fresh, --resume, --allow-changed."""

    fresh: bool
    resume: str
    allow_changed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the driver is told: the recipe and the cluster, the plan where it could be made before, and how to go on.

    The recipe's output_dir is on the storage: there the driver finds the unfinished run of that name, or makes a folder.
    """

    recipe: dict[str, Any]
    cluster: dict[str, Any]
    base_dir: str
    plan: dict[str, Any] | None
    fresh: bool = False
    resume: str = ""
    allow_changed: tuple[str, ...] = ()
    dry_run: bool = False

    def load_recipe(self) -> Recipe:
        return Recipe.model_validate_json(json.dumps(self.recipe))

    def make_plan(self) -> Plan:
        """The plan, made here where it was not made before: the model may be where only the cluster reaches it."""
        if self.plan is not None:
            return read_plan(self.plan)
        recipe, cluster = self.load_recipe(), Cluster.model_validate_json(json.dumps(self.cluster))
        plan = make_plan(recipe, cluster, base_dir=self.base_dir, run_dir=str(Path(recipe.output_dir) / recipe.name))
        check_data(recipe.data, self.base_dir, has_chat_template=plan.shape.has_chat_template)
        return plan


def load_order(folder: Path) -> Order:
    facts = json.loads((folder / ORDER).read_text(encoding="utf-8"))
    return Order(**{**facts, "allow_changed": tuple(facts["allow_changed"])})


def load_secrets(folder: Path) -> dict[str, str]:
    """The secrets that came along; their file is removed once read."""
    path = folder / SECRETS
    if not path.exists():
        return {}
    secrets: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return secrets


def build_package(folder: Path, order: Order, given: str, recipe_dir: Path, secrets: dict[str, str]) -> None:
    """Fill an empty folder with what travels. Raises DataError where the recipe's own files are too large to."""
    import launcher

    shutil.copytree(Path(launcher.__file__).parent, folder / CODE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    _copy_files(order.load_recipe(), recipe_dir, folder / FILES)
    (folder / ORDER).write_text(json.dumps(asdict(order), indent=1), encoding="utf-8")
    (folder / GIVEN).write_text(given, encoding="utf-8")
    if secrets:
        handle = os.open(folder / SECRETS, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(secrets, file)


def _copy_files(recipe: Recipe, recipe_dir: Path, target: Path) -> None:
    """Copy what the recipe names by a path relative to itself: a laptop's files are on no node."""
    target.mkdir()
    total = 0
    for relative in find_own_files(recipe, recipe_dir):
        total += (recipe_dir / relative).stat().st_size
        if total > LARGEST_FILES:
            raise DataError(
                f"the files beside the recipe come to more than {format_bytes(LARGEST_FILES)}, too much to send with a run",
                "copy them to the cluster's storage, and name them there by their full path",
            )
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(recipe_dir / relative, target / relative)


def find_own_files(recipe: Recipe, recipe_dir: Path) -> list[Path]:
    """The files, relative to the recipe, that its data, model and template paths name."""
    named = [source.path for source in (*recipe.data.train, *recipe.data.eval) if "://" not in source.path]
    named += [recipe.data.chat_template or ""]
    named += [recipe.model.name_or_path] if not recipe.model.name_or_path.startswith(PACKAGE_SCHEME) else []
    found: set[Path] = set()
    for name in named:
        if not name or "\n" in name or len(name) > 1000 or name.startswith(("/", "~")):
            continue
        for path in recipe_dir.glob(name.removeprefix("./")) if ".." not in Path(name).parts else ():
            inside = path.rglob("*") if path.is_dir() else [path]
            found |= {file.relative_to(recipe_dir) for file in inside if file.is_file()}
    return sorted(found)


def read_secrets(names: tuple[str, ...]) -> dict[str, str]:
    """The values of secrets that are set here; the others are looked for on the nodes."""
    return {name: os.environ[name] for name in names if name in os.environ}
