"""Turns of a conversation, as data files write them and as chat templates take them.

Roles go by many names, content may come in parts, and some turns are not to be trained: `weight: 0` (OpenAI, Mistral),
`train: false` (axolotl) and `loss: false` (ms-swift) mark an answer as context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_tool.data.faults import RowFault, hint, kind_of
from qlora_tool.data.tool_calls import Message, calls_in_text, parse_list, plain_calls, plain_tools, tool_calls
from qlora_tool.errors import did_you_mean

__all__ = ["ROLES", "Conversation", "Message", "as_context", "read_conversation", "read_list", "read_turns"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# What others call the roles that chat templates know.
ROLE_ALIASES = {
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "agent": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
MOST_TURNS = 2000
REASONING = ("reasoning_content", "reasoning", "thinking")  # the names that templates read it by
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of parts of a content that are text
THOUGHT_PARTS = ("thinking", "reasoning")  # and of those that are reasoning
CALLERS = ("function_call", "tool_call")  # LLaMA-Factory's roles: the content is the call, as JSON
CALL_TEXT = "call_text"  # that content, for templates that know no calls
# Turns marked as context; templates do not get to see these keys.
MARKS = ("weight", "train", "loss")
TRAIN = "train"
# What templates or this package may read of a turn; and what data sets note beside it.
READ_KEYS = frozenset(("role", "content", TRAIN, CALL_TEXT, "tool_calls", "tool_call_id", *REASONING))


@dataclass(frozen=True)
class Conversation:
    """The turns of one row.

    Args:
        messages: {role, content} with what else a template may read; `train: False` marks an answer as context.
        where: the row it comes from.
        tools: JSON schemas of the functions that may be called.
    """

    messages: list[Message]
    where: str
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[int]:
        """The assistant turns that are trained: those that say something, or call a tool, and are not context."""
        return [
            place
            for place, turn in enumerate(self.messages)
            if turn["role"] == "assistant" and says_something(turn) and turn.get(TRAIN) is not False
        ]

    @property
    def has_answer(self) -> bool:
        """Whether there is an answer to train."""
        return bool(self.answers)

    @property
    def context(self) -> list[int]:
        """The assistant turns that would be answers, were they not marked as context."""
        return [
            place
            for place, turn in enumerate(self.messages)
            if turn["role"] == "assistant" and says_something(turn) and turn.get(TRAIN) is False
        ]

    @property
    def empty_answers(self) -> list[int]:
        """The assistant turns that say nothing."""
        return [
            place
            for place, turn in enumerate(self.messages)
            if turn["role"] == "assistant" and not says_something(turn)
        ]


def read_conversation(messages: Sequence[Message], where: str, tools: Any = None) -> Conversation:
    """The conversation of one row: its tools and tool calls in the form that templates take, however they were written.

    Args:
        messages: turns, as `read_turns` gives them.
        where: the row they come from.
        tools: what the row's `tools` column holds: a list, one written as JSON, or nothing.

    Raises:
        RowFault: tools or calls that cannot be read.
    """
    schemas = plain_tools(tools)
    return Conversation(plain_calls(messages, schemas), where, schemas)


def read_list(value: Any, column: str) -> list[Any]:
    """A cell that holds a list; where cells can only be strings (.csv), one written as JSON.

    Raises:
        RowFault: something else.
    """
    return parse_list(value, f"'{column}'")


def read_turns(value: Any, column: str) -> list[Message]:
    """The messages of a cell, in order; none where it is empty (None).

    Args:
        value: a list of {role, content} or {from, value}, or one written as JSON.
        column: what faults call it.

    Raises:
        RowFault: something else, or a turn without role or content.
    """
    turns = read_list(value, column) if value is not None else []
    if len(turns) > MOST_TURNS:
        raise RowFault(f"{column} has {len(turns):,} turns, expected {MOST_TURNS:,} at most, as each answer is written "
                       "anew with all turns before it; split the conversation")  # fmt: skip
    return [_turn(turn, f"{column}[{index}]") for index, turn in enumerate(turns)]


def as_context(messages: Sequence[Message]) -> list[Message]:
    """The same turns, their answers marked as context: a conversational `prompt` is not trained."""
    return [{**turn, TRAIN: False} if turn["role"] == "assistant" else turn for turn in messages]


def says_something(turn: Message) -> bool:
    """Whether a turn has content, calls a tool or thinks."""
    return bool(turn["content"].strip() or turn.get("tool_calls") or reasoning(turn).strip())


def unread_keys(turn: Message) -> list[str]:
    """The keys of a turn that say something, and that nothing but a template may read."""
    read = READ_KEYS | {"name"} if turn["role"] in ("tool", "function") else READ_KEYS
    return [key for key, value in turn.items() if key not in read and value not in (None, "", [], {})]


def reasoning(turn: Message) -> str:
    """What stands under the first of the names that reasoning goes by; empty where there is none."""
    return next((turn[name] for name in REASONING if isinstance(turn.get(name), str) and turn[name]), "")


def _turn(turn: Any, name: str) -> Message:
    """One message: {role, content} or {from, value}, with what else a template may read (tool_calls, …)."""
    if not isinstance(turn, dict):
        raise RowFault(f"{name} is {kind_of(turn)}, expected an object such as {{role, content}} or {{from, value}}")
    role_key = "from" if "from" in turn and turn.get("role") is None else "role"
    content_key = "value" if "value" in turn and turn.get("content") is None else "content"
    if turn.get(role_key) is None:
        raise RowFault(f"{name} has no 'role' (found {', '.join(map(str, turn)) or 'nothing'})")
    calls = tool_calls(turn, name)
    if content_key not in turn and not calls:
        close = hint(map(str, turn), (role_key, content_key))
        raise RowFault(f"{name} has no '{content_key}' (found {', '.join(map(str, turn))}){close}")
    told = {role_key, content_key, "function_call", "tool_calls", *MARKS}
    rest = {key: value for key, value in turn.items() if key not in told and value is not None}
    message = {"role": _role(turn[role_key], name), "content": _content(turn.get(content_key), name), **rest}
    if (thought := _thought_parts(turn.get(content_key))) and message["role"] != "assistant":
        raise RowFault(f"{name}: a {message['role']} turn with a part of reasoning, expected text alone")
    if thought and reasoning(message) not in ("", thought):
        raise RowFault(f"{name}: its part of reasoning and its '{REASONING[0]}' differ; leave one of them out")
    if thought:
        message[REASONING[0]] = thought
    if not calls and str(turn[role_key]).strip().lower() in CALLERS and (calls := calls_in_text(message["content"])):
        message.update({"content": "", CALL_TEXT: message["content"]})
    if calls:
        message["tool_calls"] = calls
    if (trained := _mark(turn, name)) is not None:
        message[TRAIN] = trained
    return message


def _mark(turn: Message, name: str) -> bool | None:
    """What a turn says of whether it is trained; None where it says nothing."""
    trained = None
    for key in MARKS:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # False and True are among them
            raise RowFault(f"{name}: '{key}' is {kind_of(value)}, expected 0 or 1 (false or true): 0 is not trained")
        trained = bool(value) and trained is not False
    return trained


def _role(role: Any, name: str) -> str:
    """The role's usual name. Roles that only some templates know pass, misspelt ones do not."""
    if not isinstance(role, str):
        raise RowFault(f"{name}: the role is {kind_of(role)}, expected one of {', '.join(ROLES)}")
    known = role.strip().lower()
    known = ROLE_ALIASES.get(known, known)
    if known in ROLES:
        return known
    if close := did_you_mean(known, ROLES):
        raise RowFault(f"{name}: the role is '{role}'{close}")
    return role


def _content(content: Any, name: str) -> str:
    """A turn's text. Text parts are joined: many templates take nothing but strings, and `dialect` parts them again."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        said = [part for part in content if _thought_of_part(part) is None]
        other = [part for part in said if not isinstance(part.get("text"), str) or part.get("type") not in TEXT_PARTS]
        if other:
            raise RowFault(f"{name} holds {kind_of(other[0])}, expected text alone")
        return "".join(part["text"] for part in said)
    if not isinstance(content, str):
        raise RowFault(f"{name}: the content is {kind_of(content)}, expected a string")
    return content


def _thought_parts(content: Any) -> str:
    """The reasoning among the parts of a content (`{"type": "thinking", "thinking": …}`); empty where there is none."""
    parts = content if isinstance(content, list) else []
    return "".join(thought for part in parts if isinstance(part, dict) and (thought := _thought_of_part(part)))


def _thought_of_part(part: Message) -> str | None:
    """The reasoning that a part holds; None where it is another part, or holds it in no way that is known."""
    if part.get("type") not in THOUGHT_PARTS:
        return None
    return next((part[key] for key in (*THOUGHT_PARTS, "text") if isinstance(part.get(key), str)), None)
