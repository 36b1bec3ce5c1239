"""From what pydantic says of a value to what a user reads: `expected ..., found ...; did you mean ...`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_tool.config.schema import Schema, choices_of, expected, name_of, options_of
from qlora_tool.errors import did_you_mean, meant_share, printable
from qlora_tool.methods.keys import to_number

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_ENTRY_NAME: Schema = {"type": "string", "title": "a name or a regular expression"}


class Advised(ValueError):
    """A validator's refusal, with what to do about it: `; did you mean 24GB?`."""

    def __init__(self, advice: str):
        super().__init__()
        self.advice = advice


def found(value: Any) -> str:
    """How a message names a value that is not what was expected."""
    if isinstance(value, str):
        return f"the text '{shortened(value)}'" if value else "an empty text"
    if isinstance(value, bool | int | float | None):
        return name_of(value)
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return f"{value} (read as a {type(value).__name__})"


def shortened(value: str) -> str:
    """A text of a user's as a message shows it."""
    return printable(value, 200)


def message(errors: Sequence[ErrorDetails], schema: Schema, depth: int = 1) -> str:
    """What is wrong with the value of one key.

    Args:
        errors: pydantic's for this key, as `ValidationError.errors` gives them: one for each alternative of a union.
        schema: the key's JSON schema.
        depth: how much of each error's `loc` leads to the value that the schema describes.
    """
    if schema.get("type") == "object" and len(errors[0]["loc"]) > depth:
        names = dict.fromkeys(error["loc"][depth] for error in errors)
        return "; ".join(_of_entry(name, errors, schema, depth) for name in names)
    # The one that says why; or that of the item in a list, rather than that the list is not a text.
    error = max(errors, key=lambda error: (bool(_reason(error) or _advised(error)), len(error["loc"])))
    value, reason, advice = error["input"], _reason(error), _advised(error)
    is_name = isinstance(value, str) and any(isinstance(choice, str) for choice in choices_of(schema) or ())
    shown = f"'{shortened(value)}'" if is_name else found(value)
    advice = advice or _advice(value, schema)
    return f"expected {expected(schema)}, found {shown}{f' ({reason})' if reason else ''}{advice}"


def _of_entry(name: int | str, errors: Sequence[ErrorDetails], schema: Schema, depth: int) -> str:
    """What is wrong with the name and with the value of one entry of a mapping."""
    of_it = [error for error in errors if error["loc"][depth] == name]
    of_name = [error for error in of_it if error["loc"][-1] == "[key]"]
    of_value = [error for error in of_it if error["loc"][-1] != "[key]"]
    parts = ((of_name, _ENTRY_NAME), (of_value, schema["additionalProperties"]))
    return "; ".join(f"'{name}': {message(found, part, depth + 1)}" for found, part in parts if found)


def _reason(error: ErrorDetails) -> str:
    """Why a validator of ours refused a value, where that is not plain."""
    return str(error["ctx"]["error"]) if error["type"] == "value_error" else ""


def _advised(error: ErrorDetails) -> str:
    """What a validator of ours says to do about it."""
    raised = error["ctx"].get("error") if error["type"] == "value_error" else None
    return raised.advice if isinstance(raised, Advised) else ""


def _advice(value: Any, schema: Schema) -> str:
    """What to do about it, where that can be guessed."""
    kinds = list(options_of(schema))
    is_share = any(kind.get("exclusiveMaximum") == 1 for kind in kinds)
    is_number = is_share or (isinstance(value, str) and any(kind.get("type") == "number" for kind in kinds))
    if is_number and isinstance(value, str | int | float) and (share := meant_share(to_number(value))):
        return share
    names = [name_of(choice) for choice in choices_of(schema) or ()]
    if isinstance(value, str) and value in ("true", "false", "null") and re.search(rf"\b{value}\b", expected(schema)):
        return "; write it without quotes"
    if names:
        return did_you_mean(value.lower(), names, value) if isinstance(value, str) else ""
    most = [option["maximum"] for option in options_of(schema) if "maximum" in option]
    number = to_number(value)
    if isinstance(number, int | float) and not isinstance(number, bool) and most and number > max(most):
        return f"; {max(most)} at most"
    types = {option.get("type") for option in options_of(schema)}
    if isinstance(value, str) and "array" in types and "string" not in types:
        return f"; write [{value}]"
    texts = types | {option["items"].get("type") for option in options_of(schema) if "items" in option}
    if "string" in texts and not texts & {"number", "integer"} and not isinstance(value, str | dict | list | None):
        return "; put it in quotes if it is meant as text"
    return ""
