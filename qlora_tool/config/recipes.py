"""The configurations that come with the project: found by name, described by their first line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.files.atomic import write_text

_CARD = re.compile(r"-(\d+)gb$")


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

    @property
    def data_commands(self) -> list[str]:
        """Of its first comments' commands those that make its data."""
        return re.findall(r"(?m)^#   (tools/make .*-data .*\S)", self.text)

    @property
    def card_gb(self) -> int | None:
        """The card that it is for, by the GB that it is sold with, as its name ends; None: a CPU."""
        found = _CARD.search(self.name)
        return int(found[1]) if found else None


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
        close = did_you_mean(name, known) or "; `qlora-tool recipes` lists those that there are"
        raise UserError(f"no recipe '{name}'{close}")
    return known[name]


def copy_recipe(name: str, target: Path) -> Path:
    """Write a recipe to a file, or into a folder under its own name, and give the file.

    The commands in its comments are those for the copy, and the run's folder is called by it.

    Raises:
        UserError: there is no such recipe, the two are swapped, or the file exists.
    """
    if str(target) in recipe_names() and name not in recipe_names():
        raise UserError(f"no recipe '{name}'; did you mean `qlora-tool recipes copy {target} {name}`?")
    recipe = recipe_called(name)
    file = target / f"{recipe.name}.yaml" if target.is_dir() else target
    return write_new(file, recipe_for(recipe, file))


def recipe_for(recipe: Recipe, file: Path) -> str:
    """A recipe's text as it stands in a copy of it: `train NAME` is `train FILE`, `runs/NAME` `runs/` and the copy's
    name."""
    name = re.escape(recipe.name)
    text = re.sub(rf"(?m)^(#   qlora-tool (?:train|preview|profile-memory)) {name}(?!\S)",
                  lambda found: f"{found[1]} {_word(str(file))}", recipe.text)  # fmt: skip
    return re.sub(rf"\b(runs|merged)/{name}(?![\w.-])", lambda found: f"{found[1]}/{_word(file.stem)}", text)


def _word(text: str) -> str:
    """One word of a command line, and of YAML."""
    return text if re.fullmatch(r"[\w./+@~-]+", text) else f"'{text}'"


def write_new(file: Path, text: str) -> Path:
    """Write a configuration to a file that is not there yet.

    Raises:
        UserError: it is.
    """
    if file.exists():
        raise UserError(f"{file}: exists already; choose another name, or delete it first")
    write_text(file, text)
    return file


def find_recipe(name: str) -> Path | None:
    """The file of the recipe called `name`, or None."""
    return next((recipe.path for recipe in all_recipes() if recipe.name == name), None)


def refuse_no_data(name: str, given: Mapping[str, str]) -> None:
    """Refuse a recipe whose own data are not there, with what to type. A data set on the hub is looked for later.

    Args:
        name: what was given as a configuration; a file that is called so goes before the recipe.
        given: of `data.train` and `data.eval` what the configuration has, as far as each is one source.

    Raises:
        UserError: in one line.
    """
    if Path(name).is_file() or (path := find_recipe(name)) is None:
        return
    recipe = Recipe(name, path)
    gone = {key: source for key, source in given.items()
            if re.search(rf"(?m)^  {key}: {re.escape(source)}(\s|$)", recipe.text)
            and Path(source).suffix and not Path(source).exists()}  # fmt: skip
    if not gone:
        return
    own = " ".join(f"--set data.{key}={'YOUR_FILE' if key == 'train' else 'null'}" for key in gone)
    made = " and ".join(f"`{line}`" for line in recipe.data_commands
                         if any(line.endswith(f" {source}") for source in gone.values()))  # fmt: skip
    instead = f", or make them in a checkout of the source with {made}" if made else ""
    raise UserError(f"{', '.join(gone.values())}: no such file, and the recipe {name} brings no data; name yours: "
                    f"{own}{instead}")  # fmt: skip
