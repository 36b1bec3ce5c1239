"""`qlora-tool recipes`: list, show and copy the configurations that come with the project, and import others' own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_tool.cli import ExampleGroup
from qlora_tool.cli.completion import RECIPE

if TYPE_CHECKING:
    from qlora_tool.config.imports.converting import Imported

TOOLS = ("PEFT", "Axolotl", "Unsloth", "LLaMA-Factory")


class RecipesGroup(ExampleGroup):
    """Knows a recipe in the place of a command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands:
            from qlora_tool.config.recipes import recipe_names

            if args[0] in recipe_names():
                raise click.UsageError(f"no command '{args[0]}'; did you mean 'show {args[0]}'?", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=RecipesGroup,
    invoke_without_command=True,
    examples="""
    qlora-tool recipes
    qlora-tool recipes show smollm2-cpu
    qlora-tool recipes copy smollm2-cpu my.yaml
    qlora-tool train my.yaml
    qlora-tool recipes import axolotl.yml my.yaml
    """,
)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """Show, copy and import configurations; without a command, list those that come with the project.

    A recipe's name stands wherever a configuration file can.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_recipes)


@recipes.command("list", examples="qlora-tool recipes list")
def list_recipes() -> None:
    """List the recipes and what each is for."""
    from qlora_tool.config.recipes import all_recipes

    found = sorted(all_recipes(), key=lambda recipe: (recipe.card_gb or 0, recipe.name))
    width = max((len(recipe.name) for recipe in found), default=0)
    card: int | None = -1
    for recipe in found:
        if recipe.card_gb != card:
            card = recipe.card_gb
            click.echo(f"A card of {card} GB" if card else "A CPU")
        click.echo(f"  {recipe.name:<{width}}  {recipe.description}")


@recipes.command("show", examples="qlora-tool recipes show demo")
@click.argument("name", type=RECIPE)
def show_recipe(name: str) -> None:
    """Print a recipe."""
    from qlora_tool.config.recipes import recipe_called

    click.echo(recipe_called(name).text, nl=False)


@recipes.command("copy", examples="qlora-tool recipes copy llama-2-7b-24gb my.yaml")
@click.argument("name", type=RECIPE)
@click.argument("file", type=click.Path(path_type=Path))
def copy(name: str, file: Path) -> None:
    """Write a recipe to FILE, or into it.

    FILE is the file to write, or a folder. It is the start for a configuration of your own, and never overwritten.
    """
    from qlora_tool.config.recipes import copy_recipe

    click.echo(copy_recipe(name, file))


@recipes.command(
    "import",
    examples="""
    qlora-tool recipes import axolotl.yml my.yaml
    qlora-tool recipes import outputs/adapter my.yaml       # a PEFT adapter's folder
    qlora-tool recipes import notebook.ipynb                # onto the screen
    """,
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path), required=False)
@click.option("--from", "tool", type=click.Choice(TOOLS, case_sensitive=False),
              help="Whose it is; by default told by its keys.")  # fmt: skip
def import_file(file: Path, output: Path | None, tool: str | None) -> None:
    """Turn a configuration of PEFT, Axolotl, Unsloth or LLaMA-Factory into one of qlora-tool.

    FILE is its YAML or JSON, an adapter's folder, or a program or notebook, which is read and never run. OUTPUT is the
    file to write; without it the configuration goes to stdout. What has no counterpart is listed with the reason.
    """
    from qlora_tool.config.imports.converting import as_yaml, import_config
    from qlora_tool.config.recipes import write_new

    _refuse_no_configuration(file, output)
    output = output / f"{file.stem}.yaml" if output is not None and output.is_dir() else output
    made = import_config(file, output, tool)
    text = as_yaml(made, file.name, str(output or "my-run.yaml"))
    if output is None:
        click.echo(text, nl=False)
        for line in made.left_lines():
            click.echo(line, err=True)
        return
    write_new(output, text)
    _show_import(made, file, output)


def _refuse_no_configuration(file: Path, output: Path | None) -> None:
    """Refuse to import what is not there, or is plainly no configuration.

    Raises:
        UserError: in one line.
    """
    from qlora_tool.config.recipes import recipe_names
    from qlora_tool.errors import UserError
    from qlora_tool.files.kinds import kind_of

    expected = f"a configuration of {', '.join(TOOLS)}, or an adapter's folder"
    if not file.exists() and str(file) in recipe_names():
        command = f"copy {file} {output}" if output else f"show {file}"
        raise UserError(f"{file}: a recipe of qlora-tool's own; did you mean `qlora-tool recipes {command}`?")
    if not file.exists():
        raise UserError(f"{file}: no such file; name {expected}")
    if kind_of(str(file)) == "data":
        found = "a spreadsheet" if file.suffix.lower() in (".xlsx", ".csv", ".tsv") else "a data file"
        raise UserError(f"{file}: {found}, not a configuration; expected {expected}; to train on it: `qlora-tool train "
                        f"smollm2-cpu --set data.train={file}`")  # fmt: skip


def _show_import(made: Imported, file: Path, output: Path) -> None:
    """What became of every key."""
    from qlora_tool.config.imports.converting import shown

    click.echo(f"{output}: made from {file} ({made.tool}), {len(made.taken)} of its keys taken over")
    width = max((len(key) for key, _, _ in made.taken), default=0)
    for key, ours, value in made.taken:
        assumed = f"  ({made.tool}'s default)" if key in made.assumed else ""
        click.echo(f"  {key:<{width}}  {ours}: {shown(value)}{assumed}")
    for line in made.left_lines():
        click.echo(line)
    weights = (file if file.is_dir() else file.parent) / "adapter_model.safetensors"
    if weights.exists():
        click.echo(f"to go on from this adapter's weights: --set adapter.init_from={weights.parent}")
    click.echo(f"next: qlora-tool preview {output}")


@recipes.command("schema", examples="qlora-tool recipes schema > config.schema.json")
def print_schema() -> None:
    """Print the JSON schema of configurations.

    Editors check and complete a configuration with it.
    """
    import json

    from qlora_tool.config import config_schema

    click.echo(json.dumps(config_schema(), indent=2))
