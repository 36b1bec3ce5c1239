"""Tools and tool calls, however they were written, in the one form that chat templates take.

    tools       {"type": "function", "function": {"name", "description", "parameters"}}
    tool_calls  {"type": "function", "function": {"name", "arguments": {…}}}

OpenAI's API writes the arguments as a JSON string, its old one `function_call`; others leave the outer object out.
Arrow gives every struct of a column the keys of all of them, so Parquet files are full of nulls that nobody wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_tool.data.faults import RowFault, kind_of
from qlora_tool.files.reading import json_value

Message = dict[str, Any]


def parse_list(value: Any, name: str) -> list[Any]:
    """A list, perhaps written as JSON.

    Raises:
        RowFault: something else.
    """
    found: list[Any] = _parsed(value, name, list, "a list")
    return found


def plain_tools(value: Any) -> list[Any] | None:
    """The schemas of a `tools` cell, or None where it is empty.

    Raises:
        RowFault: not a list of objects with a name.
    """
    if not value:
        return None
    tools = []
    for place, item in enumerate(parse_list(value, "'tools'")):
        tool = without_nulls(_object(item, f"tools[{place}]"))
        if not isinstance(tool.get("function"), dict):
            tool = {"type": "function", "function": {key: part for key, part in tool.items() if key != "type"}}
        if not isinstance(tool["function"].get("name"), str):
            raise RowFault(f"tools[{place}] has no 'name' (found {', '.join(map(str, tool['function'])) or 'nothing'})")
        tools.append(tool)
    return tools or None


def tool_calls(turn: Mapping[str, Any], name: str) -> list[Any]:
    """The calls of a turn, `function_call` among them, each as {"type", "function": {"name", "arguments"}}, the
    arguments still as they were written.

    Raises:
        RowFault: calls that are none.
    """
    calls = parse_list(turn["tool_calls"], f"{name}.tool_calls") if turn.get("tool_calls") else []
    if turn.get("function_call"):
        calls = [*calls, turn["function_call"]]
    return [_call(call, f"{name}.tool_calls[{place}]") for place, call in enumerate(calls)]


def calls_in_text(text: str) -> list[Any]:
    """The calls that a text consists of (an object with `name` and `arguments` as JSON, or a list of them); none where
    it is something else."""
    try:
        value = json_value(text)
    except json.JSONDecodeError:
        return []
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call for call in calls):
        return []
    return [_call(call, "the call") for call in calls]


def _call(value: Any, name: str) -> dict[str, Any]:
    call = {key: part for key, part in _object(value, name).items() if part is not None}
    if "function" in call:
        function, outer = _object(call["function"], f"{name}.function"), call
    else:
        function, outer = call, {"type": "function"}
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(function.get("name"), str):
        raise RowFault(f"{name} has no function's name (found {', '.join(map(str, function)) or 'nothing'})")
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}


def _object(value: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = _parsed(value, name, dict, "an object")
    return found


def _parsed(value: Any, name: str, kind: type, expected: str) -> Any:
    """A value of this kind, perhaps written as JSON."""
    if isinstance(value, str):
        try:
            value = json_value(value)
        except json.JSONDecodeError as error:
            raise RowFault(f"{name} is a string that is not JSON ({error.msg}), expected {expected}") from error
    if not isinstance(value, kind):
        raise RowFault(f"{name} is {kind_of(value)}, expected {expected}")
    return value


def plain_calls(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Message]:
    """The messages, the arguments of their tool calls as objects, without the nulls that Arrow puts there.

    An argument that is null stays where the function's schema has it, and where somebody wrote it into a JSON string.

    Args:
        messages: with calls as `tool_calls` gives them.
        tools: schemas, as `plain_tools` gives them.

    Raises:
        RowFault: arguments that are no object.
    """
    known = {tool["function"]["name"]: _properties(tool) for tool in tools or ()}
    return [
        {**turn, "tool_calls": [_with_arguments(call, known, place) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for place, turn in enumerate(messages)
    ]


def _properties(tool: Mapping[str, Any]) -> frozenset[str]:
    parameters = tool["function"].get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return frozenset(properties) if isinstance(properties, dict) else frozenset()


def _with_arguments(call: dict[str, Any], known: Mapping[str, frozenset[str]], turn: int) -> dict[str, Any]:
    function = call["function"]
    name, arguments = function["name"], function["arguments"]
    if isinstance(arguments, str):
        arguments = _object(arguments, f"turn {turn + 1}: the arguments of {name}") if arguments.strip() else {}
    elif arguments is not None:
        given = _object(arguments, f"turn {turn + 1}: the arguments of {name}")
        arguments = {key: without_nulls(value) for key, value in given.items()
                     if value is not None or key in known.get(name, ())}  # fmt: skip
    return {**call, "function": {**function, "arguments": arguments or {}}}


def without_nulls(value: Any) -> Any:
    """A value without the keys of objects that hold null; nulls in lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value
