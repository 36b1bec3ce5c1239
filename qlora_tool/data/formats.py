"""What the columns of a row mean: every format but `text` becomes a conversation of user and assistant turns.

| format            | columns                                                     |
|-------------------|-------------------------------------------------------------|
| messages          | `messages`: a list of {role, content}                       |
| sharegpt          | `conversations`: a list of {from, value}                    |
| prompt_completion | `prompt`, `completion`: strings, or lists of messages (TRL) |
| alpaca            | `instruction`, `output`, and perhaps `input`                |
| dolly             | `instruction`, `response`, and perhaps `context`            |
| text              | `text`, trained on every token                              |

A `system` column goes before the conversation; the first three formats pass a `tools` column to the chat template.
Columns by other names are brought to these by `columns.find_layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_tool.data.faults import RowFault, kind_of
from qlora_tool.data.messages import Conversation, Message, as_context, read_conversation, read_turns


@dataclass(frozen=True)
class Format:
    """A format: the columns that ask, the columns that answer, how its rows become messages, and what else it reads."""

    asks: tuple[str, ...]
    answers: tuple[str, ...]
    read: Callable[[dict[str, Any]], list[Message]]
    form: str
    optional: tuple[str, ...] = ("system", "tools")

    def columns(self, need_answers: bool) -> tuple[str, ...]:
        """The columns that have to be there."""
        return self.asks + self.answers if need_answers else self.asks


def conversation_of(fields: dict[str, Any], name: str, where: str) -> Conversation:
    """A row of a format as a conversation, without an answer too.

    Raises:
        RowFault: a column does not hold what the format says.
    """
    form = FORMATS[name]
    messages = form.read(fields)
    system = _string(fields, "system")
    if system.strip() and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    elif system.strip() and messages[0]["content"].strip() != system.strip():
        raise RowFault("the 'system' column and the system turn differ; leave one of them out")
    return read_conversation(messages, where, fields.get("tools") if "tools" in form.optional else None)


def document_of(fields: dict[str, Any]) -> str:
    """The text of a row of format text; an empty string where it has none."""
    return _string(fields, "text")


def _string(fields: dict[str, Any], column: str) -> str:
    """A column that holds text; empty where the column or its value is missing."""
    value = fields.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowFault(f"'{column}' is {kind_of(value)}, expected a string")
    return value


def _question_and_answer(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _joined(fields: dict[str, Any], *columns: str) -> str:
    """The columns that are not blank, an empty line between them."""
    return "\n\n".join(text for column in columns if (text := _string(fields, column)).strip())


def _read_alpaca(fields: dict[str, Any]) -> list[Message]:
    return _question_and_answer(_joined(fields, "instruction", "input"), _string(fields, "output"))


def _read_dolly(fields: dict[str, Any]) -> list[Message]:
    return _question_and_answer(_joined(fields, "instruction", "context"), _string(fields, "response"))


def _read_column(column: str) -> Callable[[dict[str, Any]], list[Message]]:
    return lambda fields: read_turns(fields[column], column)


def _read_prompt_completion(fields: dict[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(fields.get(column), list):
            turns = read_turns(fields[column], column)
            if column == "completion" and turns and turns[0]["role"] in ("system", "user"):
                raise RowFault(
                    f"'{column}' begins with a {turns[0]['role']} turn, so it has the prompt in it; name it as "
                    "messages, data.columns: {messages: …}"
                )
            messages += as_context(turns) if column == "prompt" else turns
        else:
            messages.append({"role": role, "content": _string(fields, column)})
    return messages


def _read_text(fields: dict[str, Any]) -> list[Message]:
    return [{"role": "user", "content": _string(fields, "text")}]


# In the order in which `auto` tries them: Alpaca's own file has a `text` column besides.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), (), _read_column("messages"), "messages (a list of {role, content})"),
    "sharegpt": Format(
        ("conversations",), (), _read_column("conversations"), "conversations (a list of {from, value})"
    ),
    "prompt_completion": Format(
        ("prompt",), ("completion",), _read_prompt_completion, "prompt and completion (or question and answer, …)"
    ),
    "alpaca": Format(
        ("instruction",), ("output",), _read_alpaca, "instruction and output, input where there is one",
        ("input", "system"),
    ),
    "dolly": Format(
        ("instruction",), ("response",), _read_dolly, "instruction and response, context where there is one",
        ("context", "system"),
    ),
    "text": Format(("text",), (), _read_text, "text", ()),
}  # fmt: skip
