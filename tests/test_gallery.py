"""The recipes that ship: found, listed, copied so that the copy runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import gallery
from launcher.errors import RecipeError
from launcher.recipe_file import load_recipe


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two recipes, one laid over the other."""
    package = tmp_path / "site" / "launcher"
    recipes = package / "_recipes"
    (recipes / "data" / "little").mkdir(parents=True)
    (recipes / "data" / "little" / "train.jsonl").write_text('{"text": "a"}\n')
    (recipes / "data" / "little" / "unused.jsonl").write_text('{"text": "b"}\n')
    (recipes / "base.yaml").write_text("# The base.\nname: base\nmodel: {name_or_path: x}\ndata: {train: data/little/t*.jsonl}\n")
    (recipes / "over.yaml").write_text("\n# yaml-language-server: $schema=x\n# Laid over.\nextends: base.yaml\nname: over\n")
    monkeypatch.setattr(gallery, "PACKAGE_DIR", package)
    return recipes


def test_recipes_of_the_source_checkout_are_found() -> None:
    found = gallery.find_gallery()
    assert found is not None and (found / "quickstart.yaml").is_file()
    assert all(gallery.list_recipes().values()), "each shipped recipe is headed by a comment that says what it is"


def test_every_shipped_recipe_reads() -> None:
    for name in gallery.list_recipes():
        assert load_recipe(gallery.find_recipe(name)).name


def test_a_wheel_carries_its_recipes_inside(shelf: Path) -> None:
    assert gallery.find_gallery() == shelf
    assert gallery.list_recipes() == {"base": "The base.", "over": "Laid over."}


def test_an_installation_without_recipes_says_so(shelf: Path) -> None:
    for path in shelf.glob("*.yaml"):
        path.unlink()
    with pytest.raises(RecipeError, match="none in this installation"):
        gallery.find_recipe("quickstart")


def test_a_name_nearly_right_is_told_the_right_one() -> None:
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        gallery.find_recipe("quikstart")


def test_a_path_goes_before_a_name(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert gallery.locate_recipe("base") == shelf / "base.yaml"
    (tmp_path / "base").write_text("mine")
    assert gallery.locate_recipe("base") == Path("base")


def test_a_copy_has_all_it_needs_and_no_more(shelf: Path, tmp_path: Path) -> None:
    copies = gallery.copy_recipe("over", tmp_path / "mine")
    names = sorted(str(path.relative_to(tmp_path / "mine")) for path in copies)
    assert names == ["base.yaml", "data/little/train.jsonl", "over.yaml"]
    assert load_recipe(tmp_path / "mine" / "over.yaml") == load_recipe(shelf / "over.yaml")


def test_a_copy_may_have_another_name(shelf: Path, tmp_path: Path) -> None:
    assert gallery.copy_recipe("base", tmp_path / "mine" / "first.yaml")[0] == tmp_path / "mine" / "first.yaml"


def test_copying_again_is_fine_until_the_copy_was_changed(shelf: Path, tmp_path: Path) -> None:
    gallery.copy_recipe("base", tmp_path / "mine")
    gallery.copy_recipe("base", tmp_path / "mine")
    (tmp_path / "mine" / "base.yaml").write_text("name: changed\n")
    with pytest.raises(RecipeError, match="holds something else"):
        gallery.copy_recipe("base", tmp_path / "mine")
    assert (tmp_path / "mine" / "base.yaml").read_text() == "name: changed\n"
