"""How one value of a configuration is read: what it may be, and what is said where it is something else.

A `Rule` stands in the annotation of each key in `qlora_tool.config`. It turns what YAML gave into the value, or says
`expected …, found …`; and it carries the JSON schema of what it accepts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tool.errors import UserError, did_you_mean

# YAML 1.1 reads `2e-4`, which has no dot, as text.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _SIZE_UNITS[f"{_letter}B"] = 1000**_power
    _SIZE_UNITS[f"{_letter}IB"] = 1024**_power
SIZE_EXAMPLES = "a size such as 24GB (10^9 bytes each), 22GiB (2^30 bytes each) or a whole number of bytes"


@dataclass(frozen=True)
class Rule:
    """What one key accepts.

    Args:
        read: turns the value that YAML gave into the value kept, or raises ValueError with `expected …, found …`.
        schema: the JSON schema of what is accepted.
    """

    read: Callable[[Any], Any]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return dict(self.schema)


def found(value: Any) -> str:
    """How an error names a value of the wrong kind."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text '{value}'" if value else "an empty text"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"{value} (read as a {type(value).__name__})"


def _fail(expected: str, value: Any, advice: str = "") -> ValueError:
    return ValueError(f"expected {expected}, found {found(value)}{advice}")


def as_number(value: Any) -> int | float | None:
    """A finite number as YAML or text has it (`2e-4` too), else None. True and false are no numbers."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        text = value.strip()
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def number(
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
    fraction: bool = False,
    also: Sequence[Any] = (),
) -> Rule:
    """A number within bounds.

    Args:
        at_least: the least value. above: the value must be more than this. below: it must be less than this.
        whole: whole numbers only. `fraction`: from 1 on, whole numbers only (a share of something, or a count of it).
        also: values outside the bounds that mean something of their own, such as -1.
    """
    bounds = [
        *([f"of at least {at_least}"] if at_least is not None else []),
        *([f"above {above}"] if above is not None else []),
        *([f"below {below}"] if below is not None else []),
    ]
    expected = " ".join(["a whole number" if whole else "a number", " and ".join(bounds)]).strip()
    if also:
        expected += " or " + " or ".join("null" if value is None else str(value) for value in also)
    if fraction:
        expected += " (below 1 a share, from 1 on a whole number)"

    def read(value: Any) -> int | float | None:
        if value is None and None in also:
            return None
        result = as_number(value)
        if result is None:
            raise _fail(expected, value)
        if whole or (fraction and result >= 1):
            if result != int(result):
                raise _fail(expected, value)
            result = int(result)
        if result in also:
            return result
        too_low = (at_least is not None and result < at_least) or (above is not None and result <= above)
        if too_low or (below is not None and result >= below):
            raise _fail(expected, value)
        return result

    schema: dict[str, Any] = {"type": "integer" if whole else "number"}
    limits = {"minimum": at_least, "exclusiveMinimum": above, "exclusiveMaximum": below}
    schema |= {name: limit for name, limit in limits.items() if limit is not None}
    return Rule(read, {"anyOf": [schema, *({"const": value} for value in also)]} if also else schema)


def one_of(names: Sequence[str], also: dict[Any, Any] | None = None) -> Rule:
    """One of `names`; or one of the other values in `also`, each read as the name (or value) beside it."""
    others = {(type(value), value): meant for value, meant in (also or {}).items()}
    shown = [*names, *(found(value) for _, value in others)]

    def read(value: Any) -> Any:
        if isinstance(value, str) and value in names:
            return value
        if (type(value), value if isinstance(value, str | bool | int) else None) in others:
            return others[type(value), value]
        close = did_you_mean(value.lower(), names) if isinstance(value, str) else ""
        shown_value = f"'{value}'" if isinstance(value, str) else found(value)
        raise ValueError(f"expected one of {', '.join(shown)}, found {shown_value}{close}")

    return Rule(read, {"enum": [*names, *(value for _, value in others)]})


def flag() -> Rule:
    """True or false."""

    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise _fail("true or false", value)
        return value

    return Rule(read, {"type": "boolean"})


def _read_text(value: Any, expected: str) -> str:
    if not isinstance(value, str):
        quotes = "" if value is None or isinstance(value, dict | list) else "; put it in quotes if it is meant as text"
        raise _fail(expected, value, quotes)
    if not value.strip():
        raise _fail(expected, value)
    return value


def text(expected: str, *, optional: bool = False) -> Rule:
    """Text that is not empty. A path that begins with `~/` gets the home folder in its place."""

    def read(value: Any) -> str | None:
        if value is None and optional:
            return None
        value = _read_text(value, expected)
        return str(Path(value).expanduser()) if value.startswith("~/") else value

    return Rule(read, {"anyOf": [{"type": "string"}, {"type": "null"}]} if optional else {"type": "string"})


def names(expected: str) -> Rule:
    """A list of names, empty or not."""

    def read(value: Any) -> list[str]:
        if not isinstance(value, list | tuple):
            advice = f"; write [{value}]" if isinstance(value, str) else ""
            raise _fail(f"a list of {expected}", value, advice)
        return [_read_text(item, f"a list of {expected}") for item in value]

    return Rule(read, {"type": "array", "items": {"type": "string"}})


def names_from(allowed: Sequence[str]) -> Rule:
    """A list of names out of `allowed`, or one such name; `none` is the empty list."""
    single = one_of(allowed)

    def read(value: Any) -> list[str]:
        if value is None or value == "none":
            return []
        return [single.read(item) for item in (value if isinstance(value, list | tuple) else [value])]

    return Rule(read, {"anyOf": [{"type": "array", "items": {"enum": list(allowed)}}, {"enum": [*allowed, "none"]}]})


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected a regular expression, found '{pattern}' ({error})") from None
    return pattern


def patterns(value: Rule) -> Rule:
    """A mapping from module names (or regular expressions that match their ends) to what `value` accepts."""

    def read(mapping: Any) -> dict[str, Any]:
        if not isinstance(mapping, dict):
            raise _fail("a mapping from module names to numbers", mapping)
        result, faults = {}, []
        for key, item in mapping.items():
            try:
                result[_check_pattern(_read_text(key, "a module name"))] = value.read(item)
            except ValueError as error:
                faults.append(f"'{key}': {error}")
        if faults:
            raise ValueError("; ".join(faults))
        return result

    return Rule(read, {"type": "object", "additionalProperties": value.schema})


def modules(*, optional: bool = False) -> Rule:
    """A list of module names (their last parts do), or one regular expression that matches whole names.

    Args:
        optional: an empty list is right too; else it is not, and `all-linear` is read as a name of its own.
    """
    expected = f"{'' if optional else 'all-linear, '}a list of module names or one regular expression"

    def read(value: Any) -> str | list[str]:
        if isinstance(value, list | tuple):
            if not value and not optional:
                raise ValueError(f"expected {expected}, found an empty list")
            return [_read_text(item, expected) for item in value]
        return _check_pattern(_read_text(value, expected))

    items = {"type": "array", "items": {"type": "string"}} | ({} if optional else {"minItems": 1})
    return Rule(read, {"anyOf": [*([] if optional else [{"const": "all-linear"}]), items, {"type": "string"}]})


def evaluation() -> Rule:
    """Null, a fraction of the training data, a file, folder or hub id, or a mapping from names to such files."""
    expected = "null, a fraction above 0 and below 1, a file, or a mapping from names to files"

    def read(value: Any) -> float | str | dict[str, str] | None:
        if value is None:
            return None
        if isinstance(value, dict):
            if not value:
                raise ValueError(f"expected {expected}, found an empty mapping")
            pairs = value.items()
            return {_read_text(name, "a name"): _expanded(_read_text(file, expected)) for name, file in pairs}
        share = as_number(value)
        if share is not None:
            if not 0 < share < 1:
                raise _fail(expected, value)
            return float(share)
        return _expanded(_read_text(value, expected))

    def _expanded(path: str) -> str:
        return str(Path(path).expanduser()) if path.startswith("~/") else path

    files = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
    share = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    return Rule(read, {"anyOf": [{"type": "null"}, share, {"type": "string"}, files]})


def parse_size(value: str | int) -> int:
    """A size in bytes: `24GB` is 24·10⁹, `22GiB` 22·2³⁰, `512MB`, `800MiB`; a whole number is bytes.

    Raises:
        UserError: `value` is none of these, or is not more than zero.
    """
    size = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = int(float(match[1]) * _SIZE_UNITS[(match[2] or "").upper()])
    if size <= 0:
        raise UserError(f"expected {SIZE_EXAMPLES}, found {found(value)}")
    return size


def memory_size() -> Rule:
    """Null or a size, kept as it was written; `parse_size` gives its bytes."""

    def read(value: Any) -> str | int | None:
        if value is None:
            return None
        try:
            parse_size(value)
        except UserError as error:
            raise ValueError(str(error)) from None
        return value

    return Rule(read, {"anyOf": [{"type": "null"}, {"type": "string"}, {"type": "integer", "exclusiveMinimum": 0}]})
