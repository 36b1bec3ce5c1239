"""The reasoning of an assistant turn, and the blocks of thoughts that generation prompts open and close."""

from __future__ import annotations

import re
from collections.abc import Callable

from qlora_tool.data.messages import REASONING, Message, reasoning

INLINE = re.compile(r"(?:\s*<think>)?(?P<thought>.*?)</think>(?P<rest>.*)", re.DOTALL)
# What a generation prompt may end in, and what closes it.
OPENINGS = (
    (re.compile(r"(<(\w+(?::\w+)?)>)\s*$"), "</{}>"),
    (re.compile(r"(\[([A-Z_]+)\])\s*$"), "[/{}]"),
    (re.compile(r"(◁(\w+)▷)\s*$"), "◁/{}▷"),
    (re.compile(r"(<\|START_(\w+)\|>)\s*$"), "<|END_{}|>"),
    (re.compile(r"(<\|begin_of_(\w+)\|>)\s*$"), "<|end_of_{}|>"),
)
# An empty block at the end of a generation prompt: `<think>\n\n</think>`, Gemma 4's `<|channel>thought\n<channel|>`.
CLOSED = re.compile(
    r"(?:<(\w+(?::\w+)?)>\s*</\1>|\[([A-Z_]+)\]\s*\[/\2\]|◁(\w+)▷\s*◁/\3▷|<\|START_(\w+)\|>\s*<\|END_\4\|>"
    r"|<\|begin_of_(\w+)\|>\s*<\|end_of_\5\|>|<\|(\w+)>\w*\s*<\6\|>)\s*$"
)
EMPTY = re.compile(r"\s*<(\w+)>(\s*)</\1>")
TAIL = 200  # characters of a prompt in which such a tag is looked for


def thought_of(said: Message) -> str:
    """The reasoning of a turn, in a field of its own or before `</think>` in its content; empty where it has none."""
    inline = inline_thought(said)
    return (reasoning(said) or (inline["thought"] if inline else "")).strip()


def inline_thought(said: Message) -> re.Match[str] | None:
    """The parts `thought` and `rest` of a content that has its reasoning in it."""
    content = said["content"]
    return INLINE.fullmatch(content) if "</think>" in content else None


def speech_of(said: Message) -> str:
    """The content of a turn without the reasoning that stands in it."""
    inline = inline_thought(said)
    return inline["rest"] if inline else str(said["content"])


def without_thought(said: Message) -> Message:
    """The turn without its reasoning."""
    rest = {key: value for key, value in said.items() if key not in REASONING}
    return {**rest, "content": speech_of(said).lstrip("\n")}


def thought_apart(said: Message) -> Message:
    """The turn with the reasoning that stands in its content in a field of its own."""
    return {**without_thought(said), REASONING[0]: thought_of(said)}


def opened_block(prompt: str, closes: Callable[[str], bool]) -> tuple[int, str, str] | None:
    """The tag that a prompt ends in.

    Args:
        closes: whether the model knows a closing tag, such as `</think>`.

    Returns:
        Its place, itself, and what closes it; None where the prompt opens nothing.
    """
    start = max(0, len(prompt) - TAIL)
    for pattern, closing in OPENINGS:
        if (found := pattern.search(prompt, start)) and closes(closing.format(found[2])):
            return found.start(), found[1], closing.format(found[2])
    return None


def closed_block(prompt: str) -> tuple[int, str] | None:
    """The place of the empty block that a prompt ends in, and the tag that opens it; None where there is none."""
    found = CLOSED.search(prompt, max(0, len(prompt) - TAIL))
    if found is None:
        return None
    tag = re.match(r"[<\[◁][^>\]▷]*[>\]▷]", found[0])
    return (found.start(), tag[0]) if tag else None


def empty_block(target: str) -> tuple[int, int] | None:
    """Begin and end of the inside of the empty block that an answer begins with; None where there is none."""
    found = EMPTY.match(target)
    return found.span(2) if found else None
