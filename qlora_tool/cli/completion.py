"""What a shell completes: names of recipes, configurations, keys of `--set`. Nothing heavy is imported for it.

eval "$(_QLORA_TOOL_COMPLETE=bash_source qlora-tool)"       # in ~/.bashrc
eval "$(_QLORA_TOOL_COMPLETE=zsh_source qlora-tool)"        # in ~/.zshrc
_QLORA_TOOL_COMPLETE=fish_source qlora-tool | source        # in ~/.config/fish/config.fish
"""

from __future__ import annotations

import json

import click
from click.shell_completion import CompletionItem


class RecipeName(click.ParamType):
    """A recipe, by name."""

    name = "recipe"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _recipes(incomplete)


class Configuration(click.ParamType):
    """A configuration: a file, or the name of a recipe."""

    name = "config"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [*_recipes(incomplete), CompletionItem(incomplete, type="file")]


class Setting(click.ParamType):
    """`KEY=VALUE` of a configuration: keys, then the values of those that have a choice."""

    name = "setting"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        key, equals, _ = incomplete.partition("=")
        keys = known_keys()
        if equals:
            found = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for value in keys.get(key, ())]
        else:
            found = [f"{name}=" for name in keys]
        return [CompletionItem(one) for one in found if one.startswith(incomplete)]


RECIPE, CONFIGURATION, SETTING = RecipeName(), Configuration(), Setting()


def _recipes(incomplete: str) -> list[CompletionItem]:
    from qlora_tool.config.recipes import all_recipes

    return [CompletionItem(recipe.name, help=recipe.description) for recipe in all_recipes()
            if recipe.name.startswith(incomplete)]  # fmt: skip


def known_keys() -> dict[str, list[object]]:
    """Every key as `section.key`, with its choices: from the schema that lies beside the recipes."""
    from qlora_tool.config.recipes import recipes_folder

    try:
        schema = json.loads((recipes_folder() / "config.schema.json").read_text(encoding="utf-8"))
        sections = {name: schema["$defs"][part["$ref"].rpartition("/")[2]]
                    for name, part in schema["properties"].items()}  # fmt: skip
        return {f"{name}.{key}": _choices(value) for name, section in sections.items()
                for key, value in section["properties"].items()}  # fmt: skip
    except (OSError, ValueError, KeyError):
        return {}


def _choices(schema: dict[str, object]) -> list[object]:
    """The values that a key's schema lists."""
    if schema.get("type") == "boolean":
        return [True, False]
    found = schema.get("enum", [schema["const"]] if "const" in schema else [])
    options = schema.get("anyOf", ())
    assert isinstance(found, list) and isinstance(options, list | tuple)
    return [*found, *(value for option in options for value in _choices(option))]
