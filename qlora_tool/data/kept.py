"""Whether what a row says is in the text that was made of it: templates leave out in silence what they do not know."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from qlora_tool.data.messages import Message

WORD = re.compile(r"\w+")
UNICODE = re.compile(r"\\u([0-9a-fA-F]{4})")


def is_written(content: str, text: str) -> bool:
    """Whether `text` has the content: as it is, as JSON, or at least all its words (some templates trim, indent or
    quote)."""
    content = content.strip()
    if content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
        return True
    words = _words(content)
    return words <= _words(text) if words else "".join(content.split()) in "".join(text.split())


@lru_cache(maxsize=8)
def _words(text: str) -> frozenset[str]:
    unescaped = UNICODE.sub(lambda found: chr(int(found[1], 16)), re.sub(r"\\[nrt]", " ", text))
    return frozenset(WORD.findall(text)) | frozenset(WORD.findall(unescaped))


def calls_written(turn: Message, text: str) -> bool:
    """Whether `text` has the names and arguments of a turn's tool calls."""
    return all(
        is_written(part, text)
        for call in turn.get("tool_calls") or ()
        for part in (call["function"]["name"], *_strings(call["function"]["arguments"]))
    )


def unwritten(messages: Sequence[Message], text: str) -> list[str]:
    """The roles of turns of a conversation that are not in its text, but for the answers."""
    lost = (turn["role"] for turn in messages
            if turn["role"] != "assistant" and not is_written(turn["content"], text))  # fmt: skip
    return list(dict.fromkeys(lost))


def tools_unwritten(tools: Sequence[Any], text: str, text_without: str | None) -> bool:
    """Whether a text has not all of its tools.

    Args:
        text_without: the same conversation rendered without them; None where the template refuses it. Names alone tell
            too little, for calls and questions have them too.
    """
    return text == text_without or any(not is_written(tool["function"]["name"], text) for tool in tools)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
