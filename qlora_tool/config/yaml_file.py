"""Reading a configuration's YAML: from a file, a shipped recipe or `--set`, with the place of what is wrong in it.

YAML is a language in which little makes much: names for parts that repeat, lists in themselves, and words that are
read as numbers. All of it is checked before a value is made.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from qlora_tool.config.messages import found, shortened
from qlora_tool.config.places import missing_config, refuse_as_config
from qlora_tool.config.recipes import find_recipe
from qlora_tool.config.schema import name_of
from qlora_tool.errors import UserError
from qlora_tool.files.reading import has_half, read_text

LARGEST = 4 << 20  # bytes of a file
MOST = 100_000  # values, those that a name repeats counted each time
DEEPEST = 32  # lists and mappings in one another

_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def parse_file(source: str) -> tuple[dict[Any, Any], list[tuple[str, int]]]:
    """The sections of a YAML file or of a shipped recipe; and the keys that stand twice in it, with their lines."""
    path = _file(source)
    text = read_text(path, "expected a configuration in YAML, in UTF-8", LARGEST)
    return parse_mapping(source, text, "expected a mapping of sections (model, adapter, data, training)")


def parse_mapping(source: str, text: str, expected: str) -> tuple[dict[Any, Any], list[tuple[str, int]]]:
    """The mapping that a YAML text is; and the keys that stand twice in it, with their lines.

    Args:
        source: whose text it is, for the start of a line.
        expected: what it should be, for its end.

    Raises:
        UserError: it is none.
    """
    try:
        content, duplicates = parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {yaml_problem(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: expected YAML in UTF-8: {yaml_problem(error)}") from None
    if not isinstance(content, dict):
        what = "an empty file" if content is None else found(content)
        raise UserError(f"{source}: {expected}, found {what}")
    return content, duplicates


def _file(source: str) -> Path:
    try:
        path = Path(source)
        if path.exists() and not path.is_dir():
            refuse_as_config(source)
            return path
        recipe = find_recipe(source)
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{shortened(source)}: neither a file nor a recipe: {reason}") from error
    if recipe is not None:
        return recipe
    refuse_as_config(source)
    if path.is_dir():
        raise UserError(f"{source}: expected a configuration file or the name of a recipe, found a folder")
    raise UserError(missing_config(source))


def parse(text: str) -> tuple[Any, list[tuple[str, int]]]:
    """What a YAML text says; and the keys that stand twice in it, with their lines.

    Raises:
        yaml.YAMLError: it is not valid, too much, too deep, or holds a word that YAML reads as another number.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        _Check().size(node)
        return loader.construct_document(node), loader.duplicates
    except RecursionError:
        raise yaml.YAMLError(f"lists and mappings in one another more than {DEEPEST} deep") from None
    finally:
        loader.dispose()


def yaml_problem(error: Exception) -> str:
    """What a YAML error says, on one line."""
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    return shortened(", ".join(part for part in parts if part) or " ".join(str(error).split()))


class _Check:
    """Counts what a text makes, repeated parts as often as they are repeated."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.above: set[int] = set()

    def size(self, node: yaml.Node) -> int:
        """How many values a node makes.

        Raises:
            yaml.MarkedYAMLError: too many, too deep, or one that contains itself.
        """
        if isinstance(node, yaml.ScalarNode):
            if has_half(node.value):
                raise _fault(node, "half of a character (a lone surrogate) in a text; write the whole character")
            return 1
        key = id(node)
        if key in self.above:
            raise _fault(node, "a list or a mapping that contains itself; write out what is meant")
        if len(self.above) >= DEEPEST:
            raise _fault(node, f"lists and mappings in one another more than {DEEPEST} deep")
        if key not in self.sizes:
            self.above.add(key)
            parts = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
            self.sizes[key] = 1 + sum(map(self.size, parts))
            self.above.discard(key)
        if self.sizes[key] > MOST:
            raise _fault(node, f"more than {MOST:,} values, those counted that names (*name) repeat")
        return self.sizes[key]


def _fault(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


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
                    self.duplicates.append((shortened(key.value), key.start_mark.line + 1))
                seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        try:
            made = super().construct_object(node, deep)
        except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError) as error:
            shown = shortened(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            reason = " ".join(str(error).split())
            raise _fault(node, f"{shown!r} is read as a {kind} by YAML, and is none ({reason}); put it in quotes if it "
                               "is meant as text") from error  # fmt: skip
        if kind in ("int", "float") and isinstance(node, yaml.ScalarNode) and (said := _another(node.value, made)):
            raise _fault(node, f"{shortened(node.value)!r} is read by YAML as {said}; write the number that is meant, "
                               "or put it in quotes if it is meant as text")  # fmt: skip
        return made


def _another(written: str, made: float) -> str:
    """What number YAML makes of a word that people read otherwise; empty where there is none."""
    if _BASE_60.fullmatch(written):
        return f"{made:g} (base 60)" if abs(made) < 1e300 else "a number in base 60"
    if "__" in written or written.endswith("_"):
        return name_of(made) if abs(made) < 1e300 else "a number of many digits"
    if _OCTAL.fullmatch(written) and made not in (0, 0.0):
        return f"{made:g} (base 8)" if abs(made) < 1e300 else "a number in base 8"
    if isinstance(made, float) and math.isinf(made) and "inf" not in written.lower():
        return "infinite"
    return "a number of too many digits" if isinstance(made, int) and abs(made) > 10**4000 else ""
