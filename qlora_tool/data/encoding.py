"""From rows to token ids and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_tool.data.chat import ConversationRenderer, MultiTurn, Rendered, RenderedRow
from qlora_tool.data.examples import Example
from qlora_tool.data.faults import RowFault, RowFaults
from qlora_tool.data.labels import IGNORED, check_characters, label_answers, token_ids
from qlora_tool.data.layout import Layout
from qlora_tool.data.messages import Conversation
from qlora_tool.data.readers.rows import Row
from qlora_tool.data.report import DataReport
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a longer text the beginning is tokenized alone, where that has more than twice max_length tokens: at a megabyte a
# second the rest would only cost time.
SURELY_TOKENIZED, CHARACTERS_A_TOKEN = 1 << 18, 32


@dataclass(frozen=True)
class Encoder:
    """Makes examples of rows, each row by itself: what comes of it depends on no other.

    Attributes:
        tokenizer: with the chat template that conversations are written with.
        train_on: `completion` or `all`, of conversations.
        max_length: tokens of an example at most.
        multi_turn, kwargs: see `ConversationRenderer`.
    """

    tokenizer: PreTrainedTokenizerBase
    train_on: str
    max_length: int
    multi_turn: MultiTurn = "auto"
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def encode(
        self, rows: Iterable[Row], layout: Layout, report: DataReport, faults: RowFaults
    ) -> list[list[Example]]:
        """The examples of each row of which something is trained.

        Args:
            report: counts what becomes of the rows.
            faults: is told of rows that do not have the format, or that the chat template refuses.

        Raises:
            UserError: what no row can be trained with.
        """
        make = self._document if layout.format == "text" else self._conversation
        columns: dict[str, None] = {}
        found = []
        for row in rows:
            report.rows += 1
            columns.update(dict.fromkeys(map(str, row.fields)))
            try:
                examples = make(row, layout, report)
            except RowFault as fault:
                faults.add(row.where, fault)
                continue
            if examples:
                report.count(examples)
                found.append(examples)
        report.unused_columns.update(dict.fromkeys(layout.unused(columns)))
        return found

    @cached_property
    def _renderer(self) -> ConversationRenderer:
        return ConversationRenderer.of(
            self.tokenizer, every_answer=self.train_on == "completion", multi_turn=self.multi_turn, kwargs=self.kwargs
        )

    def _conversation(self, row: Row, layout: Layout, report: DataReport) -> list[Example]:
        conversation = layout.conversation(row)
        if not conversation.has_answer:
            report.dropped_context += bool(conversation.context)
            report.dropped_no_answer += not conversation.context
            return []
        rendered = self._renderer.rows(conversation)
        made = [(row, self._example(row, report)) for row in rendered.rows]
        examples = [example for _, example in made if example]
        lost = sum(_answers_cut(row, example, self.max_length) for row, example in made)
        if lost and examples:
            report.notes[f"answer: not trained, for data.max_length {self.max_length} leaves nothing of it"] += lost
        _count_conversation(report, conversation, rendered, len(examples), lost)
        return examples

    def _example(self, row: RenderedRow, report: DataReport) -> Example | None:
        """The row's tokens, within max_length; None where nothing is left to train."""
        check_characters(row.text)
        ids, labels = [], []
        if len(row.text) > (enough := max(SURELY_TOKENIZED, CHARACTERS_A_TOKEN * self.max_length)):
            cut = _beginning(row, enough)
            ids, labels = label_answers(self.tokenizer, cut, self._renderer.special, self.max_length)
            row = cut if len(ids) > 2 * self.max_length else row  # what lies far behind max_length changes nothing
        if len(ids) <= 2 * self.max_length:
            ids, labels = label_answers(self.tokenizer, row, self._renderer.special, self.max_length)
        if not self._renderer.every_answer:
            labels = list(ids)
        if row.not_trained:
            skipped = replace(row, answers=row.not_trained)
            ids, marks = label_answers(self.tokenizer, skipped, self._renderer.special, self.max_length)
            labels = [token if mark == IGNORED else IGNORED for token, mark in zip(ids, marks, strict=True)]
        example = Example(ids[: self.max_length], labels[: self.max_length], row.where)
        if example.trained_tokens < 1:
            return None
        report.ends_added += row.ends_added
        report.truncated += len(ids) > self.max_length
        return example

    def _document(self, row: Row, layout: Layout, report: DataReport) -> list[Example]:
        """A document whole, an end-of-text token after it, cut into examples of max_length: nothing is thrown away."""
        text = layout.document(row)
        check_characters(text)
        if not text.strip():
            report.dropped_no_answer += 1
            return []
        ids = _document_ids(self.tokenizer, text)
        report.kept += 1
        cuts = _cuts(len(ids), self.max_length)
        places = [row.where if end - begin == len(ids) else f"{row.where}, tokens {begin + 1}-{end}"
                  for begin, end in cuts]  # fmt: skip
        return [Example(ids[begin:end], ids[begin:end], where)
                for (begin, end), where in zip(cuts, places, strict=True)]  # fmt: skip


def _beginning(row: RenderedRow, end: int) -> RenderedRow:
    """The first characters of a row, with its answers as far as they lie in them."""
    answers, not_trained = ([(begin, min(stop, end)) for begin, stop in spans if begin < end]
                            for spans in (row.answers, row.not_trained))  # fmt: skip
    return replace(row, text=row.text[:end], answers=answers, not_trained=not_trained)


def refuse_without_end(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse text where the tokenizer has no token that ends it."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{source}: text needs an end-of-text token after each document, and the tokenizer has none "
            "(eos_token); set one in the model's tokenizer_config.json"
        )


def _answers_cut(row: RenderedRow, example: Example | None, max_length: int) -> int:
    """How many answers of a row lie behind max_length, so that nothing of them is trained."""
    if example is None:
        return len(row.answers)
    return max(0, len(row.answers) - example.answers) if len(example.input_ids) == max_length else 0


def _count_conversation(
    report: DataReport, conversation: Conversation, rendered: Rendered, made: int, lost: int
) -> None:
    report.notes.update(rendered.notes)
    if not made:
        report.dropped_truncated += bool(rendered.rows)
        report.dropped_unwritten += not rendered.rows
        return
    report.kept += 1
    report.answers += sum(len(row.answers) for row in rendered.rows) - lost
    report.context_answers += len(conversation.context)
    report.empty_answers += len(conversation.empty_answers)
    if rendered.rewritten:
        report.rewritten += 1
        report.rewritten_examples += made


def _document_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The document's ids: with the beginning-of-text token where the tokenizer puts one, once, and one end-of-text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = token_ids(tokenizer, text, add_special_tokens=True)
    if bos is not None and ids[:2] == [bos, bos]:  # the text has its own
        ids = ids[1:]
    if ids[-1:] != [eos]:  # some tokenizers write it by themselves
        ids = [*ids, eos]
    return ids


def _cuts(length: int, max_length: int) -> Sequence[tuple[int, int]]:
    """Begin and end of the pieces of a document. A lone last token, which by itself would train nothing, takes the one
    before it along."""
    ends = [*range(max_length, length, max_length), length]
    if len(ends) > 1 and length - ends[-2] == 1 and max_length > 2:
        ends[-2] -= 1
    return list(zip([0, *ends], ends, strict=False))
