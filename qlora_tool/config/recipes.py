"""The configurations that come with the project: found by name, described by their first line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.files.atomic import write_text


@dataclass(frozen=True)
class Recipe:
    """A shipped configuration.

    Args:
        name: what `qlora-tool train NAME` takes.
        path: its YAML file, which begins with comments: a line of description, then the commands that run it.
    """

    name: str
    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def description(self) -> str:
        """The first line's comment."""
        return self.text.split("\n", 1)[0].lstrip("#").strip()


def recipes_folder() -> Path:
    """`configs`: inside the installed package, or beside it in a checkout of the source."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def all_recipes() -> list[Recipe]:
    """Every shipped recipe, by name."""
    return [Recipe(path.stem, path) for path in sorted(recipes_folder().glob("*.yaml"))]


def recipe_names() -> list[str]:
    """The names of the shipped recipes."""
    return [recipe.name for recipe in all_recipes()]


def recipe_called(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        UserError: there is none.
    """
    known = {recipe.name: recipe for recipe in all_recipes()}
    if name not in known:
        raise UserError(f"no recipe '{name}' among {', '.join(known)}{did_you_mean(name, known)}")
    return known[name]


def copy_recipe(name: str, target: Path) -> Path:
    """Write a recipe to a file, or into a folder under its own name, and give the file.

    Raises:
        UserError: there is no such recipe, or the file exists.
    """
    recipe = recipe_called(name)
    file = target / f"{recipe.name}.yaml" if target.is_dir() else target
    if file.exists():
        raise UserError(f"{file}: exists already; choose another name, or delete it first")
    write_text(file, recipe.text)
    return file


def find_recipe(name: str) -> Path | None:
    """The file of the recipe called `name`, or None."""
    return next((recipe.path for recipe in all_recipes() if recipe.name == name), None)
