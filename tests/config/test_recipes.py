"""The shipped recipes: each loads, says what it is for, and is found in a checkout and in an installed package."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from child_process import child_environment

import qlora_tool
from qlora_tool.cli import COMMANDS, main
from qlora_tool.config import load_config
from qlora_tool.config.recipes import all_recipes, find_recipe, recipes_folder

RECIPES = all_recipes()


def header(text: str) -> list[str]:
    """The comment lines that a recipe begins with."""
    lines = text.splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_loads_and_says_how_to_run_it(recipe):
    config = load_config(recipe.name)
    assert config.training.output_dir != load_config("demo").training.output_dir or recipe.name == "demo"
    assert 20 < len(recipe.description) < 120
    commands = [line for line in header(recipe.text) if line.startswith("qlora-tool ")]
    assert any(command.startswith(f"qlora-tool train {recipe.name}") for command in commands)
    assert any(config.training.output_dir in command for command in commands)


def commands_in_texts() -> list[list[str]]:
    """Every `qlora-tool …` line in the recipes' headers and in the help texts' examples, as words."""
    texts = [line for recipe in RECIPES for line in header(recipe.text)]
    context = click.Context(main)
    for group in (main, *(main.get_command(context, name) for name in COMMANDS)):
        texts += (group.examples or "").splitlines()
    lines = [text.strip() for text in texts if text.strip().startswith("qlora-tool ")]
    return [shlex.split(line.split(" > ")[0], comments=True)[1:] for line in lines]


def test_commands_in_recipes_and_help_texts_are_ones_that_parse():
    commands = commands_in_texts()
    assert len(commands) > 20
    for name, *arguments in commands:
        command = main.get_command(click.Context(main), name)
        assert command is not None, name
        command.make_context(name, arguments)  # raises a UsageError for an option or a value that does not exist


def test_no_recipe_promises_memory():
    for recipe in RECIPES:
        claims = re.findall(r"\b(?:needs?|takes?|peaks?)\b[^.]*\d+(?:\.\d+)? ?Gi?B", recipe.text)
        assert not claims, recipe.name


def test_an_unknown_recipe_is_none():
    assert find_recipe("nothing-of-the-kind") is None


def test_recipes_are_found_inside_an_installed_package(tmp_path: Path):
    """A wheel holds `configs` inside the package, and nothing beside it."""
    package = tmp_path / "site" / "qlora_tool"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(qlora_tool.__file__).parent, package, ignore=skip)
    shutil.copytree(recipes_folder(), package / "configs", dirs_exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", "from qlora_tool.cli import main; main()", "recipes", "show", "demo"],
        cwd=tmp_path,
        env=child_environment(tmp_path / "site"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == find_recipe("demo").read_text(encoding="utf-8")
