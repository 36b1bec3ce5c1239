"""The configurations that come with the project: found by name, described by their first line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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


def find_recipe(name: str) -> Path | None:
    """The file of the recipe called `name`, or None."""
    return next((recipe.path for recipe in all_recipes() if recipe.name == name), None)
