"""What a key accepts, as its JSON schema says: in words, for messages, documents and the command line."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

Schema = dict[str, Any]
_NAMES = {True: "true", False: "false", None: "null"}


class _NoTitles(GenerateJsonSchema):
    """A title is there where one was written, not made of the key's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema(model: type[BaseModel]) -> Schema:
    """The JSON schema of a class of keys."""
    return model.model_json_schema(schema_generator=_NoTitles)


@functools.cache
def schemas_of(section: type[BaseModel]) -> dict[str, Schema]:
    """The schema of each key of a section, by its name."""
    properties: dict[str, Schema] = json_schema(section)["properties"]
    return properties


def choices_of(schema: Schema) -> list[Any] | None:
    """The values that a key may have, or a list of which it may hold; None where they cannot be listed."""
    values: dict[str, Any] = {}
    for option in options_of(schema):
        listed = _listed(option) if option.get("type") != "array" else choices_of(option["items"])
        if listed is None or "title" in option:
            return None
        values |= {name_of(value): value for value in listed}
    return list(values.values())


def takes_list(schema: Schema) -> bool:
    """Whether a list of values is right too."""
    return any(option.get("type") == "array" for option in options_of(schema))


def options_of(schema: Schema) -> Iterator[Schema]:
    """The schemas of which one must hold."""
    if "anyOf" not in schema or "title" in schema:
        yield schema
        return
    for option in schema["anyOf"]:
        yield from options_of(option)


def _listed(schema: Schema) -> list[Any] | None:
    if "enum" in schema:
        return list(schema["enum"])
    if "const" in schema:
        return [schema["const"]]
    if schema.get("type") == "boolean":
        return [True, False]
    return [None] if schema.get("type") == "null" else None


def name_of(value: Any) -> str:
    """A value as YAML has it."""
    return _NAMES[value] if isinstance(value, bool | None) else str(value)


def expected(schema: Schema) -> str:
    """What a key accepts, in words: `a whole number of at least 1 or null`."""
    values = choices_of(schema)
    if values is not None:
        if values == [True, False]:
            return "true or false"
        lists = ", or a list of them" if takes_list(schema) else ""
        return f"one of {', '.join(map(name_of, values))}{lists}"
    words = [word for option in options_of(schema) for word in _words(option)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _words(schema: Schema) -> list[str]:
    if "title" in schema:
        return [str(schema["title"])]
    listed = _listed(schema)
    if listed is not None:
        return [name_of(value) for value in listed]
    limits = {"minimum": "of at least", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    bounds = [f"{words} {schema[limit]:g}" for limit, words in limits.items() if limit in schema]
    kinds = {"integer": "a whole number", "number": "a number", "string": "a text", "array": "a list"}
    return [" ".join([kinds.get(schema["type"], "a mapping"), *[" and ".join(bounds)] * bool(bounds)])]
