"""What the model has to write for one assistant turn: the prompt as a server renders it, and what follows.

    the turns before it, with the generation prompt    <user>2 + 2?<end><assistant>
    and with the turn itself                           <user>2 + 2?<end><assistant>4<end>

The second begins with the first, and what it adds is the answer, all that a template writes for the turn included.
Where it does not, the generation prompt says something that the template does not write before an answer: it opens a
block of thoughts that the turn does not have, or closes one that it has. The answer goes on from the prompt all the
same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qlora_tool.data.faults import RowFault
from qlora_tool.data.kept import is_written
from qlora_tool.data.messages import REASONING, Message, reasoning

THOUGHT = re.compile(r"(?:\s*<think>)?(?P<thought>.*?)</think>(?P<rest>.*)", re.DOTALL)
# What a generation prompt may end in, and what closes it.
OPENINGS = (
    (re.compile(r"(<(\w+)>)\s*$"), "</{}>"),
    (re.compile(r"(<(\w+:\w+)>)\s*$"), "</{}>"),
    (re.compile(r"(\[([A-Z_]+)\])\s*$"), "[/{}]"),
    (re.compile(r"(◁(\w+)▷)\s*$"), "◁/{}▷"),
    (re.compile(r"(<\|START_(\w+)\|>)\s*$"), "<|END_{}|>"),
    (re.compile(r"(<\|begin_of_(\w+)\|>)\s*$"), "<|end_of_{}|>"),
)


class Write(Protocol):
    """Renders turns with the chat template."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str: ...


@dataclass(frozen=True)
class Answer:
    """An assistant turn as it is trained.

    Attributes:
        turn: its place in the conversation.
        prompt: what stands before it at inference.
        target: what follows.
        through: the conversation up to this turn as the template writes it; None where that is not prompt and target.
        notes: what has to be said of it, each `noun: sentence`.
    """

    turn: int
    prompt: str
    target: str
    through: str | None
    notes: tuple[str, ...] = ()


def find_answer(write: Write, messages: Sequence[Message], turn: int, closes: Callable[[str], bool]) -> Answer:
    """The prompt and the target of an assistant turn.

    Args:
        turn: its place in `messages`.
        closes: whether the model knows a closing tag, such as `</think>`.

    Raises:
        RowFault: the template refuses the turns, or begins the answer otherwise than the generation prompt.
    """
    if turn == 0:
        raise RowFault(
            "the conversation begins with an assistant turn, which answers nothing; begin with a user turn, or mark it "
            "as context (weight: 0)"
        )
    before, said = messages[:turn], messages[turn]
    prompt = write(before, add_generation_prompt=True)
    through = write([*before, said])
    opened, closing = _opened(prompt, closes)
    if through.startswith(prompt):
        return _written(write, before, said, prompt, through, closing)
    bare = prompt.rstrip()
    if through.startswith(bare):  # they differ in white space alone
        target = through[len(bare) :].lstrip()
        return Answer(turn, prompt, target, None, _filled(target, opened, closing))
    head = prompt[: opened.start()] if opened else None
    if opened and head is not None and closing and through.startswith(head):
        return _unopened(said, prompt, through[len(head) :], turn, opened[1], closing)
    if thought_of(said):
        silent = write([*before, without_thought(said)])
        if silent.startswith(prompt):
            note = (
                "answer: trained without the reasoning that the data has, for which the generation prompt has no room; "
                "data.chat_template_kwargs sets a template's switch (often enable_thinking: true)"
            )
            return Answer(turn, prompt, silent[len(prompt) :], None, (note,))
    raise RowFault(
        f"the chat template begins the answer of turn {turn + 1} differently from its own generation prompt "
        f"({prompt[-40:]!r}); set what it opens with data.chat_template_kwargs (often enable_thinking: false), or name "
        "another template with data.chat_template"
    )


def thought_of(said: Message) -> str:
    """The reasoning of a turn, in a field of its own or before `</think>` in its content; empty where it has none."""
    inline = _inline(said["content"])
    return (reasoning(said) or (inline["thought"] if inline else "")).strip()


def speech_of(said: Message) -> str:
    """The content of a turn without the reasoning that stands in it."""
    inline = _inline(said["content"])
    return inline["rest"] if inline else said["content"]


def _inline(content: str) -> re.Match[str] | None:
    return THOUGHT.fullmatch(content) if "</think>" in content else None


def without_thought(said: Message) -> Message:
    """The turn without its reasoning."""
    rest = {key: value for key, value in said.items() if key not in REASONING}
    return {**rest, "content": speech_of(said).lstrip("\n")}


def _opened(prompt: str, closes: Callable[[str], bool]) -> tuple[re.Match[str] | None, str]:
    """The tag that a prompt ends in, and what closes it."""
    for pattern, closing in OPENINGS:
        if (found := pattern.search(prompt[-200:])) and closes(closing.format(found[2])):
            return pattern.search(prompt), closing.format(found[2])
    return None, ""


def _written(
    write: Write, before: Sequence[Message], said: Message, prompt: str, through: str, closing: str
) -> Answer:
    """Where the template writes the answer after the prompt, as it should."""
    turn, target = len(before), through[len(prompt) :]
    inline = _inline(said["content"])
    empty = bool(closing) and target.lstrip().startswith(closing)
    if inline and empty and not reasoning(said):
        # The template writes an empty thought, and the thought in the content as if it were said.
        apart = {**said, "content": inline["rest"].lstrip("\n"), REASONING[0]: inline["thought"].strip()}
        again = write([*before, apart])
        if again.startswith(prompt) and not again[len(prompt) :].lstrip().startswith(closing):
            note = (
                "answer: reasoning was taken out of the content and given to the template by itself, as "
                f"{REASONING[0]}, for it opens and closes a block of its own before the content"
            )
            return Answer(turn, prompt, again[len(prompt) :], None, (note,))
    if inline and inline["thought"].strip() and not is_written(inline["thought"], prompt[-200:] + target):
        at = said["content"].rindex(inline["rest"]) if inline["rest"] else len(said["content"])
        note = "answer: reasoning that the chat template leaves out was put back, as the data has it"
        return Answer(turn, prompt, said["content"][:at] + target, None, (note,))
    return Answer(turn, prompt, target, through, _filled(target, closing, closing))


def _filled(target: str, opened: object, closing: str) -> tuple[str, ...]:
    if not opened or not target.lstrip().startswith(closing):
        return ()
    return (f"answer: the generation prompt opens a block of thoughts, and the data has none: {closing} comes first",)


def _unopened(said: Message, prompt: str, rest: str, turn: int, opening: str, closing: str) -> Answer:
    """Where the prompt opens a block that the template does not write before an answer."""
    thought = thought_of(said)
    if thought and is_written(thought, rest):
        raise RowFault(
            f"the chat template writes the reasoning of turn {turn + 1} elsewhere than after the {opening} that its "
            "generation prompt ends in; set data.chat_template_kwargs, or name another template with data.chat_template"
        )
    target = f"{thought}\n{closing}\n\n{rest.lstrip()}"
    if thought:
        note = f"answer: reasoning that the chat template leaves out was put after the prompt's {opening}"
    else:
        note = f"answer: the generation prompt opens a block of thoughts, and the data has none: {closing} comes first"
    return Answer(turn, prompt, target, None, (note,))
