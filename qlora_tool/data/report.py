"""What became of the rows of a data source."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class DataReport:
    """Counts and provenance of one data set, for logs, `qlora_tool.json` and errors.

    Attributes:
        source: what was read.
        format: the format found, e.g. `messages`.
        template: "the model's", "plain", a Jinja file, or None for text, which needs none.
        train_on: what is trained: `completion`, or `all` (always with text).
        rows: rows read.
        more_rows: whether there are more, which were not read.
        kept: rows of which something is trained.
        examples: sequences made of them and not split off; a text may be cut into several.
        dropped_no_answer: rows without an answer (or, for text, without text).
        dropped_context: rows whose every answer is marked as context (weight: 0, train: false).
        dropped_unwritten: rows of which the chat template writes no answer.
        dropped_truncated: rows of which nothing is left to train within max_length.
        truncated: kept rows that lost their end to max_length.
        split_off: examples that went to the evaluation set (a fraction in data.eval).
        answers: answers that are trained.
        context_answers: answers in kept rows that are marked as context.
        empty_answers: assistant turns in kept rows that say nothing, and are not trained.
        rewritten: kept rows of which each answer became an example, because the template writes earlier turns anew.
        rewritten_examples: the examples made of them.
        notes: what else has to be said, `noun: sentence`, and how often.
        ends_added: answers that got an end-of-text token because the chat template writes no end.
        tokens: tokens in all examples.
        trained_tokens: those that count in the loss (the first of an example never does).
        longest: tokens of the longest example.
        max_length: the limit that rows were cut at.
        files: SHA-256 by file.
    """

    source: str
    format: str
    template: str | None
    train_on: str
    max_length: int
    rows: int = 0
    more_rows: bool = False
    kept: int = 0
    examples: int = 0
    dropped_no_answer: int = 0
    dropped_context: int = 0
    dropped_unwritten: int = 0
    dropped_truncated: int = 0
    truncated: int = 0
    split_off: int = 0
    answers: int = 0
    context_answers: int = 0
    empty_answers: int = 0
    rewritten: int = 0
    rewritten_examples: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    ends_added: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    files: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in sentences, warnings last."""
        unit = "document" if self.format == "text" else "row"
        examples = self.examples + self.split_off
        made = f", {_count(examples, 'example')} made of them" if examples != self.kept else ""
        split = f", {self.split_off} of these split off for evaluation" if self.split_off else ""
        lines = [
            f"{self.source}: {_count(self.rows, unit)} ({self.format}), {self.kept} kept{made}{split}; "
            f"{_count(self.tokens, 'token')}, {self.trained_tokens} of them trained; the longest has {self.longest}"
        ]
        if self.template is not None:
            lines.append(f"chat template: {self.template_name()}; trained: {self.trained_part()}")
        return lines + self.warnings()

    def warnings(self) -> list[str]:
        """What was dropped, cut or added, in sentences; empty where all is as it was."""
        lines = []
        if self.dropped_no_answer:
            missing = "text" if self.format == "text" else "an answer"
            lines.append(f"{_dropped(self.dropped_no_answer)}: without {missing}")
        if self.dropped_context:
            lines.append(f"{_dropped(self.dropped_context)}: every answer is context (weight: 0, train: false)")
        if self.dropped_unwritten:
            lines.append(f"{_dropped(self.dropped_unwritten)}: the chat template writes no answer of them")
        if self.dropped_truncated:
            lines.append(
                f"{_dropped(self.dropped_truncated)}: data.max_length {self.max_length} leaves nothing of the answer"
            )
        if self.truncated:
            lines.append(f"{_count(self.truncated, 'row')} cut at data.max_length {self.max_length}")
        if self.rewritten:
            lines.append(
                f"{_count(self.rewritten, 'row')} became {self.rewritten_examples} examples, one an answer: the chat "
                "template writes earlier turns otherwise once others follow, and each is trained as it is at inference"
            )
        if self.context_answers:
            lines.append(f"{_count(self.context_answers, 'answer')} not trained: marked as context")
        if self.empty_answers:
            lines.append(f"{_count(self.empty_answers, 'answer')} not trained: empty")
        for note, number in sorted(self.notes.items()):
            noun, _, sentence = note.partition(": ")
            lines.append(f"{_count(number, noun)}: {sentence}")
        if self.ends_added:
            lines.append(
                f"the chat template ends answers with no special token: an end-of-text token was put after "
                f"{_count(self.ends_added, 'answer')}"
            )
        return lines

    def template_name(self) -> str:
        """The chat template's name as a person would say it."""
        return "a plain one, as the tokenizer has none" if self.template == "plain" else str(self.template)

    def trained_part(self) -> str:
        """Which tokens are trained."""
        return "the answers" if self.train_on == "completion" else "every token"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _dropped(number: int) -> str:
    return f"{_count(number, 'row')} dropped"
