"""The shipped recipes: each loads, says what it is for, and is found in a checkout and in an installed package."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from child_process import child_environment
from making.recipe_predictions import TABLE, cases, config_of, decided_by, line_of, predict

import qlora_tool
from qlora_tool.cli import COMMANDS, main
from qlora_tool.config import load_config
from qlora_tool.config.recipes import all_recipes, copy_recipe, find_recipe, recipes_folder
from qlora_tool.memory.allocator.available import CUDA_MARGIN, usable
from qlora_tool.memory.allocator.cards import parse_device_memory

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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipes_figure_is_that_of_its_prediction_and_fits_its_card(recipe, tmp_path: Path):
    """Where this fails because a recipe was changed: `tools/make recipe-predictions`."""
    table = json.loads(TABLE.read_text())
    assert "" in cases(recipe)
    for setting in cases(recipe):
        config = config_of(recipe, setting, tmp_path)
        entry = table[" ".join(filter(None, (recipe.name, setting)))]
        assert entry["decided_by"] == decided_by(config), "changed since it was predicted"
        everything = config.training.gradient_checkpointing is True
        assert line_of(setting, entry, recipe.card_gb, everything) in recipe.text.splitlines()
        if recipe.card_gb is not None:
            card = parse_device_memory(f"{recipe.card_gb}GB")
            assert entry["limit_bytes"] <= usable(card.bytes, CUDA_MARGIN)
            assert entry["needed_bytes"] < entry["limit_bytes"] - 150e6, "no room to speak of"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.card_gb], ids=lambda recipe: recipe.name)
def test_every_recipe_is_predicted_as_its_table_says(recipe, tmp_path: Path):
    table = json.loads(TABLE.read_text())
    for setting in cases(recipe):
        entry = table[" ".join(filter(None, (recipe.name, setting)))]
        found = predict(config_of(recipe, setting, tmp_path), recipe.card_gb)
        assert found["limit_bytes"] == entry["limit_bytes"]
        assert found["needed_bytes"] == pytest.approx(entry["needed_bytes"], rel=0.01)


def test_recipes_have_a_folder_and_a_name_of_their_own():
    for recipe in RECIPES:
        assert load_config(recipe.name).training.output_dir == f"runs/{recipe.name}"
    sizes = {(recipe.card_gb, recipe.name.rpartition("-")[0]) for recipe in RECIPES}
    assert {size for size, _ in sizes} >= {None, 6, 8, 12, 16, 24, 48}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_copys_commands_are_for_the_copy(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    copied = copy_recipe(recipe.name, Path("my-run.yaml")).read_text()
    assert load_config("my-run.yaml").training.output_dir == "runs/my-run"
    commands = [line.split() for line in header(copied) if line.startswith("qlora-tool ")]
    assert ["qlora-tool", "train", "my-run.yaml"] in [words[:3] for words in commands]
    assert not any(recipe.name in words or f"runs/{recipe.name}" in words for words in commands)


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
