"""From a conversation to the rows it is trained as: what the model sees, and which parts of it are answers.

Most templates write a turn once and for all, so a conversation is one row with all its answers. Others write earlier
turns anew once later ones follow (they take out the reasoning, move the tools or the end of text): there each answer
gets a row of its own, which is what the model sees when it has to write that answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

from qlora_tool.data.answers import Answer, Write, find_answer
from qlora_tool.data.dialect import Dialect
from qlora_tool.data.ends import Ends
from qlora_tool.data.faults import RowFault
from qlora_tool.data.kept import calls_written, is_written, tools_unwritten, unwritten
from qlora_tool.data.messages import Conversation, Message, says_something, unread_keys
from qlora_tool.data.template import SpecialTokens, check_template_kwargs, render, template_sources
from qlora_tool.data.thoughts import TAIL, speech_of, thought_of
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = ", answer "
MultiTurn = Literal["auto", "together", "one_per_answer"]


@dataclass(frozen=True)
class RenderedRow:
    """One row as the model sees it.

    Args:
        text: all of it.
        answers: begin and end of every answer that is trained, as positions in `text`.
        where: the row it comes from, and which answer of it where it has one alone (`FILE, line N, answer 2`).
        not_trained: assistant turns that are context or empty, likewise; where all else is trained they are not.
        ends_added: answers that got an end-of-text token because the template ends them with no special token.
    """

    text: str
    answers: list[tuple[int, int]]
    where: str
    ends_added: int = 0
    not_trained: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Rendered:
    """The rows of one conversation.

    Args:
        rows: none where the template writes none of its answers.
        rewritten: whether each answer has a row of its own because the template writes earlier turns anew.
        notes: what has to be said of it, `noun: sentence`, and how often.
    """

    rows: list[RenderedRow]
    rewritten: bool = False
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ConversationRenderer:
    """Turns conversations into the rows they are trained as, and into prompts.

    Args:
        tokenizer: with the chat template to render with; see `template.install_chat_template`.
        special: its special tokens.
        every_answer: whether the answers must be told apart (to train on them alone).
        multi_turn: `together`: a conversation is one row; `one_per_answer`: each answer has one; `auto`: one row where
            every answer in it stands as it would at inference.
        kwargs: what the template is given besides (`data.chat_template_kwargs`).
    """

    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    every_answer: bool = True
    multi_turn: MultiTurn = "auto"
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        every_answer: bool = True,
        multi_turn: MultiTurn = "auto",
        kwargs: Mapping[str, Any] | None = None,
    ) -> ConversationRenderer:
        """One for a tokenizer.

        Raises:
            UserError: the template does not read one of `kwargs`.
        """
        check_template_kwargs(tokenizer, kwargs or {})
        return cls(tokenizer, SpecialTokens.of(tokenizer), every_answer, multi_turn, kwargs or {})

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """What the model sees when it has to write the next turn.

        Raises:
            RowFault: the template refuses these turns.
        """
        return self._writer(tools)(messages, add_generation_prompt=True)

    def answer(self, conversation: Conversation, turn: int) -> Answer:
        """The prompt and the target of an assistant turn.

        Raises:
            RowFault: the template refuses the conversation, or begins the answer otherwise than the generation prompt.
        """
        answer = find_answer(self._writer(conversation.tools), conversation.messages, turn, self._closes)
        header = self._ends.header(answer)
        through = answer.through[: -len(header)] if header and answer.through else answer.through
        return replace(answer, target=answer.target.removesuffix(header), through=through)

    def rows(self, conversation: Conversation) -> Rendered:
        """The rows that a conversation is trained as, each rendered as at inference.

        Raises:
            RowFault: the template refuses the conversation, or an answer cannot be told apart.
            UserError: what no row of this data set can be trained with.
        """
        if self._dialect.writes_answers is False:
            raise UserError(
                "the chat template does not write what the assistant says, so there is nothing to train; name another "
                "with data.chat_template"
            )
        if not self.every_answer and self.multi_turn != "one_per_answer":
            return self._whole(conversation)
        notes: Counter[str] = Counter()
        answers = []
        for turn in conversation.answers:
            answer = self.answer(conversation, turn)
            if self._is_trained(answer, conversation.messages[turn], notes):
                notes.update(answer.notes)
                answers.append(answer)
        if not answers:
            return Rendered([], notes=notes)
        rendered = self._together(conversation, answers) or self._apart(conversation, answers)
        said_before = conversation.messages[: answers[-1].turn]
        notes.update(self._left_out(said_before, conversation.tools, rendered.rows[-1].text, answers[-1].prompt))
        notes.update(self._context_left_out(conversation, answers[-1].turn, rendered.rows[-1].text))
        notes.update(_said_of_turns(conversation, [answer.turn for answer in answers], self._dialect))
        if self._dialect.asks_the_date:
            notes["row: the chat template writes the date of the day, so rows that are made on another day differ"] += 1
        return replace(rendered, notes=notes)

    def _is_trained(self, answer: Answer, said: Message, notes: Counter[str]) -> bool:
        """Whether what a turn says is in its target; notes what is not."""
        seen = answer.prompt[-TAIL:] + answer.target
        speech = speech_of(said)
        if speech.strip() and not is_written(speech, answer.target):
            begins = " ".join(speech.split())[:40]
            raise RowFault(
                f"the chat template does not write the answer of turn {answer.turn + 1} ({begins!r}) as the data has "
                "it; name another template with data.chat_template"
            )
        calls = said.get("tool_calls") and not calls_written(said, answer.target)
        some = calls and any(is_written(call["function"]["name"], answer.target) for call in said["tool_calls"])
        thought = thought_of(said) and not is_written(thought_of(said), seen)
        if not speech.strip() and (calls or not said.get("tool_calls")) and (thought or not thought_of(said)):
            what = "tool calls" if calls else "thoughts"
            reason = f"does not write {what}, and the data has only these"
            reason = "writes some of its tool calls, and not all" if some else reason
            notes[f"answer: not trained, for the chat template {reason}"] += 1
            return False
        if some:
            notes["answer: trained without some of its tool calls, for the chat template does not write all"] += 1
        elif calls:
            notes["answer: trained without the tool calls that the data has, for the chat template writes none"] += 1
        if said["content"].lstrip().startswith("<think>") and "</think>" not in said["content"]:
            notes["answer: trained with a <think> that nothing closes"] += 1
        if thought and not any("without the reasoning" in note for note in answer.notes):
            notes["answer: trained without the reasoning that the data has, for the chat template writes none"] += 1
        return True

    def _together(self, conversation: Conversation, answers: Sequence[Answer]) -> Rendered | None:
        """All answers in one row; None where they would not stand in it as they do at inference."""
        if self.multi_turn == "one_per_answer" or (self.multi_turn == "auto" and len(answers) == 1):
            return None
        text = self._writer(conversation.tools)(conversation.messages)
        for answer in answers:
            if answer.through is None or not text.startswith(answer.through):
                if self.multi_turn == "auto" or len(conversation.answers) == 1:
                    return None
                raise UserError(
                    f"{conversation.where}: data.multi_turn: together cannot go with this chat template, which writes "
                    f"turn {answer.turn + 1} otherwise than at inference once others follow: the model would train "
                    "on what it never sees; set data.multi_turn: one_per_answer (or leave it at auto)"
                )
        row = _RowInParts(text, conversation.where)
        for answer in answers:
            end = self._ends.missing(answer, conversation.messages)
            begin, stop = len(answer.prompt), len(answer.prompt) + len(answer.target)
            in_place = text.startswith(end, stop)
            if not in_place and stop < len(text) and self.multi_turn == "auto":
                return None  # at inference there is no such token between the turns
            row.add(begin, stop + (len(end) if in_place else 0), "" if in_place else end)
        return Rendered([row.done()])

    def _apart(self, conversation: Conversation, answers: Sequence[Answer]) -> Rendered:
        """Each answer in a row of its own."""
        spoken = [turn for turn, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        rows = []
        for answer in answers:
            number = f"{ANSWER}{spoken.index(answer.turn) + 1}" if len(answers) > 1 else ""
            end = self._ends.missing(answer, conversation.messages)
            text = answer.prompt + answer.target + end
            skipped = {} if self.every_answer else self._not_trained(conversation, text, answer.turn)
            rows.append(RenderedRow(
                text, [(len(answer.prompt), len(text))], conversation.where + number, int(bool(end)),
                list(skipped.values()),
            ))  # fmt: skip
        return Rendered(rows, rewritten=len(rows) > 1)

    def _whole(self, conversation: Conversation) -> Rendered:
        """The conversation as the template writes it, to train on all of it."""
        text = self._writer(conversation.tools)(conversation.messages)
        row = _RowInParts(text, conversation.where)
        skipped = self._not_trained(conversation, text, len(conversation.messages))
        for turn in sorted({*conversation.answers, *skipped}):
            if turn in skipped:
                row.skip(*skipped[turn])
                continue
            try:
                answer = self.answer(conversation, turn)
            except RowFault:
                continue
            if answer.through is not None and text.startswith(answer.through):
                end = self._ends.missing(answer, conversation.messages)
                stop = len(answer.through)
                in_place = text.startswith(end, stop)
                row.add(len(answer.prompt), stop + (len(end) if in_place else 0), "" if in_place else end)
        prompt = self.prompt(conversation.messages, conversation.tools) if conversation.tools else ""
        notes = Counter(self._left_out(conversation.messages, conversation.tools, text, prompt))
        notes.update(_said_of_turns(conversation, conversation.answers, self._dialect, whole=True))
        for turn in conversation.answers:
            said = conversation.messages[turn]
            if not is_written(said["content"], text) or not calls_written(said, text):
                notes["answer: the chat template does not write all of it"] += 1
        return Rendered([row.done()], notes=notes)

    def _not_trained(self, conversation: Conversation, text: str, before: int) -> dict[int, tuple[int, int]]:
        """Where in a text, of which all else is trained, the answers before a turn stand that are context or empty, by
        their turns.

        Raises:
            RowFault: the template writes one otherwise once others follow.
        """
        spans = {}
        for turn in sorted({*conversation.context, *conversation.empty_answers}):
            if turn >= before:
                break
            answer = self.answer(conversation, turn)
            if answer.through is None or not text.startswith(answer.through):
                raise RowFault(
                    f"turn {turn + 1} is not to be trained, but the chat template writes it otherwise once others "
                    "follow, so that it cannot be told apart; set data.train_on: completion"
                )
            spans[turn] = len(answer.prompt), len(answer.through)
        return spans

    def _context_left_out(self, conversation: Conversation, last: int, text: str) -> Iterator[str]:
        """What earlier answers that are context say, and the template does not write: notes."""
        for turn in conversation.context:
            said = conversation.messages[turn]
            if turn < last and not (is_written(speech_of(said), text) and calls_written(said, text)):
                yield "answer: context of which the chat template does not write all"

    def _left_out(
        self, messages: Sequence[Message], tools: list[Any] | None, text: str, prompt: str
    ) -> Iterator[str]:
        """What of these turns and tools the template leaves out of `text`, and of the prompt behind them: notes."""
        roles = dict.fromkeys(unwritten(messages, text)) | dict.fromkeys(self._dialect.leaves_out(messages, tools))
        yield from (f"row: the chat template does not write its {role} turns" for role in roles)
        if tools:
            try:
                without = self.prompt(messages)
            except RowFault:
                without = None
            if tools_unwritten(tools, prompt, without):
                yield "row: the chat template does not write its tools"

    def _writer(self, tools: list[Any] | None) -> Write:
        return partial(self._write, tools)

    def _write(
        self, tools: list[Any] | None, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> str:
        return render(
            self.tokenizer, self._dialect.messages(messages), tools=tools,
            add_generation_prompt=add_generation_prompt, kwargs=self.kwargs,
        )  # fmt: skip

    def _closes(self, tag: str) -> bool:
        return tag in self.special.texts or any(tag in source for source in template_sources(self.tokenizer))

    @cached_property
    def _dialect(self) -> Dialect:
        return Dialect(self.tokenizer, self.kwargs)

    @cached_property
    def _ends(self) -> Ends:
        return Ends(self.tokenizer, self.special, self._writer(None))


def _said_of_turns(
    conversation: Conversation, trained: Sequence[int], dialect: Dialect, *, whole: bool = False
) -> Iterator[str]:
    """What is to be said of the turns themselves, those before and behind the answers that are trained: notes.

    Args:
        whole: whether every token of the conversation is trained.
    """
    messages = conversation.messages
    keys = dict.fromkeys(key for turn in messages for key in unread_keys(turn) if not dialect.reads(key))
    if keys:
        yield f"row: nothing reads these keys of its turns: {', '.join(sorted(keys))}"
    if any(messages[turn - 1]["role"] == "user" and not says_something(messages[turn - 1]) for turn in trained if turn):
        yield "row: trained with an empty question"
    if not whole and messages[-1]["role"] != "assistant":
        yield "row: nothing is trained of the turns after its last answer"


def row_of(where: str) -> str:
    """The row of data of a place, which may be one answer of it."""
    row, found, number = where.rpartition(ANSWER)
    return row if found and number.isdigit() else where


class _RowInParts:
    """A row in the making: a text, into which ends are put, and its answers, from left to right."""

    def __init__(self, text: str, where: str):
        self.text, self.where = text, where
        self.parts: list[str] = []
        self.answers: list[tuple[int, int]] = []
        self.not_trained: list[tuple[int, int]] = []
        self.copied = self.shift = self.ends_added = 0

    def add(self, begin: int, stop: int, end: str) -> None:
        """An answer from `begin` to `stop` of the text as it was, with `end` put behind it."""
        self.parts += [self.text[self.copied : stop], end]
        self.answers.append((begin + self.shift, stop + self.shift + len(end)))
        self.copied, self.shift = stop, self.shift + len(end)
        self.ends_added += bool(end)

    def skip(self, begin: int, stop: int) -> None:
        """A turn from `begin` to `stop` of the text as it was that is not to be trained."""
        self.not_trained.append((begin + self.shift, stop + self.shift))

    def done(self) -> RenderedRow:
        text = "".join([*self.parts, self.text[self.copied :]])
        return RenderedRow(text, self.answers, self.where, self.ends_added, self.not_trained)
