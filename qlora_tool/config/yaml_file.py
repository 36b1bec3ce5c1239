"""Reading a configuration's YAML: from a file or a shipped recipe, with the place of what is wrong in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qlora_tool.config.messages import found
from qlora_tool.config.recipes import find_recipe, recipe_names
from qlora_tool.errors import UserError, did_you_mean


def parse_file(source: str) -> tuple[dict[Any, Any], list[tuple[str, int]]]:
    """The sections of a YAML file or of a shipped recipe; and the keys that stand twice in it, with their lines."""
    path = Path(source) if Path(source).is_file() else find_recipe(source)
    if path is None:
        if Path(source).is_dir():
            inside = Path(source) / "config.yaml"
            hint = f"; a run's configuration is {inside}" if inside.exists() else ""
            raise UserError(f"{source}: expected a configuration file or the name of a recipe, found a folder{hint}")
        recipes = recipe_names()
        close = did_you_mean(Path(source).stem, recipes)
        raise UserError(f"{source}: neither a file nor a recipe ({', '.join(recipes)}){close}")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {yaml_problem(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: expected YAML in UTF-8: {yaml_problem(error)}") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        what = "an empty file" if content is None else found(content)
        raise UserError(f"{source}: expected a mapping of sections (model, adapter, data, training), found {what}")
    return content, loader.duplicates


def yaml_problem(error: Exception) -> str:
    """What a YAML error says, on one line."""
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    return ", ".join(part for part in parts if part) or " ".join(str(error).split())


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML comes without types
    """YAML that notes the keys that stand twice in a mapping, where the second silently replaces the first."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.duplicates: list[tuple[str, int]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    self.duplicates.append((key.value, key.start_mark.line + 1))
                seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made
