"""Turns of a conversation, as data files write them and as chat templates take them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qlora_tool.data.faults import RowFault, hint, kind_of
from qlora_tool.errors import did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# What others call the roles that chat templates know.
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """The turns of one row, as chat templates take them."""

    messages: list[Message]
    where: str
    tools: list[Any] | None = None

    @property
    def has_answer(self) -> bool:
        """Whether an assistant turn says something (or calls a tool)."""
        return any(turn["role"] == "assistant" and says_something(turn) for turn in self.messages)


def read_list(value: Any, column: str) -> list[Any]:
    """A column that holds a list; where cells can only be strings (.csv), one written as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowFault(f"'{column}' is a string that is not JSON ({error.msg}), expected a list") from error
    if not isinstance(value, list):
        raise RowFault(f"'{column}' is {kind_of(value)}, expected a list")
    return value


def read_turns(value: Any, column: str) -> list[Message]:
    """The messages of a cell, in order; none where it is empty (None).

    Args:
        value: a list of {role, content} or {from, value}, or one written as JSON.
        column: what faults call it.

    Raises:
        RowFault: something else, or a turn without role or content.
    """
    turns = read_list(value, column) if value is not None else []
    return [_turn(turn, f"{column}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, name: str) -> Message:
    """One message: {role, content} or {from, value}, with what else a template may read (tool_calls, …)."""
    if not isinstance(turn, dict):
        raise RowFault(f"{name} is {kind_of(turn)}, expected an object such as {{role, content}} or {{from, value}}")
    role_key, content_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    if role_key not in turn:
        raise RowFault(f"{name} has no 'role' (found {', '.join(map(str, turn)) or 'nothing'})")
    if content_key not in turn and not turn.get("tool_calls"):
        close = hint(map(str, turn), (role_key, content_key))
        raise RowFault(f"{name} has no '{content_key}' (found {', '.join(map(str, turn))}){close}")
    rest = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    return {"role": _role(turn[role_key], name), "content": _content(turn.get(content_key), name), **rest}


def _role(role: Any, name: str) -> str:
    """The role's usual name. Roles that only some templates know pass, misspelt ones do not."""
    if not isinstance(role, str):
        raise RowFault(f"{name}: the role is {kind_of(role)}, expected one of {', '.join(ROLES)}")
    role = ROLE_ALIASES.get(role, role)
    if role not in ROLES and (close := did_you_mean(role, ROLES)):
        raise RowFault(f"{name}: the role is '{role}'{close}")
    return role


def _content(content: Any, name: str) -> str:
    """A turn's text. A list of text parts is joined: many templates take nothing but strings."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        other = [part for part in content if not isinstance(part.get("text"), str)]
        if other:
            raise RowFault(f"{name} holds {kind_of(other[0])}, expected text alone")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowFault(f"{name}: the content is {kind_of(content)}, expected a string")
    return content


def says_something(turn: Message) -> bool:
    """Whether a turn has content or calls a tool."""
    return bool(turn["content"].strip() or turn.get("tool_calls"))
