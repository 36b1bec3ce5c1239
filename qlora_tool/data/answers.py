"""What the model has to write for one assistant turn: the prompt as a server renders it, and what follows.

    the turns before it, with the generation prompt    <user>2 + 2?<end><assistant>
    and with the turn itself                           <user>2 + 2?<end><assistant>4<end>

The second begins with the first, and what it adds is the answer, all that a template writes for the turn included.
Where it does not, the template writes the turns before otherwise once they are answered, or its generation prompt says
something that it does not write before an answer: it opens a block of thoughts, or closes one. The answer goes on from
the prompt all the same, for that is what the model sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qlora_tool.data.faults import RowFault
from qlora_tool.data.kept import is_written
from qlora_tool.data.messages import REASONING, Message, reasoning
from qlora_tool.data.thoughts import (
    TAIL,
    closed_block,
    empty_block,
    inline_thought,
    opened_block,
    speech_of,
    thought_apart,
    thought_of,
    without_thought,
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
    search = _Search(write, messages[:turn], messages[turn], closes)
    return (
        search.written()
        or search.unopened()
        or search.continued()
        or search.spaced_otherwise()
        or search.joined()
        or search.silent()
        or search.refuse()
    )


class _Search:
    """The ways to find the answer to `before`, each a method that gives None where it is not the one."""

    def __init__(self, write: Write, before: Sequence[Message], said: Message, closes: Callable[[str], bool]):
        self.write, self.before, self.said = write, before, said
        self.prompt = write(before, add_generation_prompt=True)
        self.through = write([*before, said])
        self.opened = opened_block(self.prompt, closes)

    def written(self) -> Answer | None:
        """Where the template writes the answer after the prompt, as it should."""
        target = self._after_prompt(self.through)
        if target is None:
            return None
        inline = inline_thought(self.said)
        doubled = inline and not reasoning(self.said) and self._closed_again(target)  # an empty thought before it
        if doubled and (answer := self._apart()):
            return answer
        if thought_of(self.said) and empty_block(target) and (answer := self._into_empty_block()):
            return answer
        thought = inline["thought"].strip() if inline else ""
        if inline and thought and not is_written(thought, self.prompt[-TAIL:] + target):
            rest = inline["rest"]
            gap = rest[: len(rest) - len(rest.lstrip())]
            before = self.said["content"].removesuffix(rest) + ("" if target.startswith(gap) else gap)
            note = "answer: reasoning that the chat template leaves out was put back, as the data has it"
            return self._answer(before + target, note)
        return self._answer(target, *self._filled(target))

    def unopened(self) -> Answer | None:
        """Where the prompt opens a block that the template does not write before an answer."""
        if self.opened is None or not self.through.startswith(self.prompt[: self.opened[0]]):
            return None
        place, opening, closing = self.opened
        thought, rest = thought_of(self.said), self.through[place:]
        if thought and is_written(thought, rest):
            return self._apart()
        if thought:
            note = f"answer: reasoning that the chat template leaves out was put after {opening}"
            return self._answer(f"{thought}\n{closing}\n\n{rest.lstrip()}", note)
        target = rest if rest.lstrip().startswith(closing) else self._after_no_thought(rest)
        return self._answer(target, *self._filled(target))

    def _after_no_thought(self, rest: str) -> str:
        """What follows an opened block that stays empty: as the template closes others, where it does."""
        assert self.opened is not None
        thought = "w7thought"
        target = self._after_prompt(self.write([*self.before, {**self.said, REASONING[0]: thought}]))
        if target is not None and target.lstrip().startswith(thought):
            return target.replace(thought, "", 1)
        return f"\n{self.opened[2]}\n\n{rest.lstrip()}"

    def continued(self) -> Answer | None:
        """Where what the template writes goes on from the prompt, though it does not begin with it."""
        target = self._continuation(self.through)
        return None if target is None else self._answer(target)

    def spaced_otherwise(self) -> Answer | None:
        """Where the two differ in white space alone, wherever it stands."""
        bare = "".join(self.prompt.split())
        if not "".join(self.through.split()).startswith(bare):
            return None
        solid = [place for place, character in enumerate(self.through) if not character.isspace()]
        rest, end = self.through[solid[len(bare) - 1] + 1 :], self.prompt[len(self.prompt.rstrip()) :]
        target = rest.removeprefix(end) if rest.startswith(end) else rest.lstrip()
        note = "answer: the chat template has other white space in the turns before it than in its generation prompt"
        return self._answer(target, note)

    def joined(self) -> Answer | None:
        """Where the template writes the answer into the turn before, whose end the generation prompt has already (as
        Gemma 4's does behind a call that has content)."""
        speech = speech_of(self.said).strip()
        letters = enumerate(zip(self.prompt, self.through, strict=False))
        same = next((place for place, (one, other) in letters if one != other), len(self.prompt))
        rest, ended = self.through[same:], self.prompt[same:]
        end = rest.removeprefix(speech)
        if not speech or not end or end == rest or not ended.startswith(end):
            return None
        note = "answer: the chat template joins it to the turn before, which has ended in its generation prompt"
        return self._answer(rest, note)

    def silent(self) -> Answer | None:
        """Where the prompt says that there is no reasoning, and the turn has some."""
        if not thought_of(self.said):
            return None
        through = self.write([*self.before, without_thought(self.said)])
        target = self._after_prompt(through)
        if target is None:
            target = self._continuation(through)
        note = (
            "answer: trained without the reasoning that the data has, for which the generation prompt has no room; "
            "data.chat_template_kwargs sets a template's switch (often enable_thinking: true)"
        )
        return self._apart() if target is None else self._answer(target, note)

    def refuse(self) -> Answer:
        """Say why there is no answer."""
        raise RowFault(
            f"the chat template begins the answer of turn {len(self.before) + 1} differently from its own generation "
            f"prompt ({self.prompt[-40:]!r}); set what it opens with data.chat_template_kwargs (often enable_thinking: "
            "false), or name another template with data.chat_template"
        )

    def _answer(self, target: str, *notes: str) -> Answer:
        through = self.through if self.through == self.prompt + target else None
        return Answer(len(self.before), self.prompt, target, through, notes)

    def _after_prompt(self, through: str) -> str | None:
        """What follows the prompt in a text that begins with it, white space at the prompt's end aside."""
        if through.startswith(self.prompt):
            return through[len(self.prompt) :]
        bare = self.prompt.rstrip()
        return through[len(bare) :].lstrip() if through.startswith(bare) else None

    def _continuation(self, through: str) -> str | None:
        """What the template writes for the turn in a text that does not begin with the prompt."""
        closed = closed_block(self.prompt)
        if closed and through.startswith(self.prompt[: closed[0]]):
            rest = through[closed[0] :]
            return None if rest.lstrip().startswith(closed[1]) else rest
        speech = speech_of(self.said).strip()
        asked = self.write(self.before)
        if speech and self.prompt.startswith(asked) and through.startswith(asked):  # the prompt's header is left out
            rest = through[len(asked) :]
            if rest.lstrip().startswith(speech):
                return rest
        # The turns before are written otherwise (the system prompt moves, say): what stands behind the last of them.
        last = str(self.before[-1]["content"]).strip()
        behind = self.prompt[self.prompt.rfind(last) :] if last and last in self.prompt else ""
        return through[through.rindex(behind) + len(behind) :] if behind and behind in through else None

    def _apart(self) -> Answer | None:
        """With the reasoning of the content given to the template by itself."""
        target = self._after_prompt(self.write([*self.before, thought_apart(self.said)]))
        if target is None or self._closed_again(target):
            return None
        note = (
            "answer: reasoning was taken out of the content and given to the template by itself, as reasoning_content, "
            "for it writes a block of its own before the content"
        )
        return self._answer(target, note)

    def _into_empty_block(self) -> Answer | None:
        """With the reasoning in the empty block that the template begins the answer with (as Kimi K2's does)."""
        thought = thought_of(self.said)
        target = self._after_prompt(self.write([*self.before, thought_apart(self.said)]))
        block = None if target is None else empty_block(target)
        if target is None or block is None:
            return self._apart()
        note = "answer: reasoning was put into the empty block that the chat template begins the answer with"
        return self._answer(f"{target[: block[0]]}{thought}{target[block[1] :]}", note)

    def _closed_again(self, target: str) -> bool:
        """Whether a target begins with the end of the block that the prompt opens."""
        return self.opened is not None and target.lstrip().startswith(self.opened[2])

    def _filled(self, target: str) -> tuple[str, ...]:
        if self.opened is None or not self._closed_again(target):
            return ()
        closing = self.opened[2]
        return (
            f"answer: the generation prompt opens a block of thoughts, and the data has none: {closing} comes first",
        )
