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
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qlora_tool.data.faults import RowFault, RowFaults, hint, kind_of
from qlora_tool.data.messages import Conversation, Message, as_context, read_conversation, read_turns
from qlora_tool.data.readers.rows import Row
from qlora_tool.errors import UserError


@dataclass(frozen=True)
class Format:
    """A format: the columns that ask, the columns that answer, and how its rows become messages."""

    asks: tuple[str, ...]
    answers: tuple[str, ...]
    read: Callable[[dict[str, Any]], list[Message]]
    form: str
    takes_tools: bool = True

    def columns(self, need_answers: bool) -> tuple[str, ...]:
        return self.asks + self.answers if need_answers else self.asks


def find_format(rows: Iterable[Row], wanted: str = "auto", *, need_answers: bool = True) -> str:
    """The format of the rows: `wanted`, or with `auto` the first one in the table above whose columns a row has.

    Args:
        rows: iterated more than once, as far as need be.
        need_answers: whether the columns with the answers must be there (they need not be to generate).

    Raises:
        UserError: no row has the columns; says which columns there are and what every format needs.
    """
    candidates = FORMATS if wanted == "auto" else {wanted: FORMATS[wanted]}
    # Columns with answers first, even where they may be missing: they tell Dolly from Alpaca.
    for with_answers in (True,) if need_answers else (True, False):
        for row in rows:
            for name, form in candidates.items():
                if all(column in row.fields for column in form.columns(with_answers)):
                    return name
    found = list(dict.fromkeys(str(column) for row in rows for column in row.fields))
    known = {column for form in candidates.values() for column in form.columns(True)}
    columns = ", ".join(found[:20]) + (", …" if len(found) > 20 else "") or "none"
    needs = "; ".join(f"{name}: {form.form}" for name, form in candidates.items())
    reason = "are those of no format" if wanted == "auto" else f"are not those of the format {wanted}"
    where = next(iter(rows)).where
    raise UserError(f"{where}: the columns ({columns}) {reason}; needed are {needs}{hint(found, known)}")


def read_conversations(rows: Iterable[Row], name: str, *, need_answers: bool = True) -> list[Conversation]:
    """Every row as a conversation, those without an answer too.

    Raises:
        UserError: rows that do not have the format; the first few are named.
    """
    form = FORMATS[name]
    conversations, faults = [], RowFaults()
    for row in rows:
        try:
            _require_columns(row, form.columns(need_answers), name)
            messages = form.read(row.fields)
            system = _string(row.fields, "system")
            if system.strip() and (not messages or messages[0]["role"] != "system"):
                messages = [{"role": "system", "content": system}, *messages]
            elif system.strip() and messages[0]["content"].strip() != system.strip():
                raise RowFault("the 'system' column and the system turn differ; leave one of them out")
            tools = row.fields.get("tools") if form.takes_tools else None
            conversations.append(read_conversation(messages, row.where, tools))
        except RowFault as fault:
            faults.add(row.where, fault)
    faults.raise_any()
    return conversations


def read_documents(rows: Iterable[Row]) -> list[str]:
    """The text of every row, in order; an empty string where a row has none."""
    documents, faults = [], RowFaults()
    for row in rows:
        try:
            _require_columns(row, ("text",), "text")
            documents.append(_string(row.fields, "text"))
        except RowFault as fault:
            faults.add(row.where, fault)
    faults.raise_any()
    return documents


def _require_columns(row: Row, columns: tuple[str, ...], name: str) -> None:
    missing = [column for column in columns if column not in row.fields]
    if missing:
        there = ", ".join(map(str, row.fields)) or "none at all"
        close = hint(map(str, row.fields), columns)
        raise RowFault(f"no column '{missing[0]}', which the format {name} needs (found {there}){close}")


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
    "prompt_completion": Format(("prompt",), ("completion",), _read_prompt_completion, "prompt and completion"),
    "alpaca": Format(
        ("instruction",), ("output",), _read_alpaca, "instruction and output, input where there is one", False
    ),
    "dolly": Format(
        ("instruction",), ("response",), _read_dolly, "instruction and response, context where there is one", False
    ),
    "text": Format(("text",), (), _read_text, "text", False),
}
