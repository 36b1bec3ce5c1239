"""`qlora-tool recipes`: list, show and copy the configurations that come with the project."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_tool.cli import ExampleGroup


@click.group(
    cls=ExampleGroup,
    invoke_without_command=True,
    examples="""
    qlora-tool recipes
    qlora-tool recipes show smollm2-cpu
    qlora-tool recipes copy smollm2-cpu my.yaml
    qlora-tool train my.yaml
    """,
)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """Show and copy the configurations that come with the project; without a command, list them.

    A recipe's name stands wherever a configuration file can.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_recipes)


@recipes.command("list", examples="qlora-tool recipes list")
def list_recipes() -> None:
    """List the recipes and what each is for."""
    from qlora_tool.config.recipes import all_recipes

    found = all_recipes()
    width = max((len(recipe.name) for recipe in found), default=0)
    for recipe in found:
        click.echo(f"{recipe.name:<{width}}  {recipe.description}")


@recipes.command("show", examples="qlora-tool recipes show demo")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print a recipe."""
    from qlora_tool.config.recipes import recipe_called

    click.echo(recipe_called(name).text, nl=False)


@recipes.command("copy", examples="qlora-tool recipes copy llama-2-7b-24gb my.yaml")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
def copy(name: str, file: Path) -> None:
    """Write a recipe to FILE, or into it.

    FILE is the file to write, or a folder. It is the start for a configuration of your own, and never overwritten.
    """
    from qlora_tool.config.recipes import copy_recipe

    click.echo(copy_recipe(name, file))


@recipes.command("schema", examples="qlora-tool recipes schema > config.schema.json")
def print_schema() -> None:
    """Print the JSON schema of configurations.

    Editors check and complete a configuration with it.
    """
    import json

    from qlora_tool.config import config_schema

    click.echo(json.dumps(config_schema(), indent=2))
