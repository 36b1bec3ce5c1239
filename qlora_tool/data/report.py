"""What became of the rows of a data source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from qlora_tool.data.examples import Example
from qlora_tool.data.faults import RowFaults
from qlora_tool.sizes import counted

LIMIT = "data.max_length"


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
        columns: the source's columns by what they are read as, where their names differ.
        unused_columns: those that are not read, in order.
        faulty: rows that were left out because they are faulty (`data.on_error: skip`).
        faulty_lines: the first few of them.
        remarks: what else is to be said of the files.
        skipped_files: files of a folder that are not read.
        parts: of a mixture, what became of each source, and the rows that the mixture has of it.
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
    columns: dict[str, str] = field(default_factory=dict)
    unused_columns: dict[str, None] = field(default_factory=dict)
    faulty: int = 0
    faulty_lines: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    skipped_files: list[str] = field(default_factory=list)
    parts: list[tuple[DataReport, int]] = field(default_factory=list)

    def count(self, examples: Iterable[Example]) -> None:
        """Count the tokens of examples that were made."""
        for example in examples:
            length = len(example.input_ids)
            self.examples += 1
            self.tokens += length
            self.trained_tokens += example.trained_tokens
            self.longest = max(self.longest, length)

    def add(self, other: DataReport) -> None:
        """Add the counts of another part of the same source, or of another source of the same mixture."""
        for each in fields(self):
            own, new = getattr(self, each.name), getattr(other, each.name)
            if each.name in ("longest", "max_length"):
                setattr(self, each.name, max(own, new))
            elif isinstance(own, bool):
                setattr(self, each.name, own or new)
            elif isinstance(own, int):
                setattr(self, each.name, own + new)
            elif isinstance(own, dict):  # counters add up
                own.update(new)
            elif isinstance(own, list):
                own += [item for item in new if item not in own]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = {each.name: getattr(self, each.name) for each in fields(self)}
        parts = [{**part.as_dict(), "taken": taken} for part, taken in self.parts]
        return {**facts, "notes": dict(self.notes), "unused_columns": list(self.unused_columns), "parts": parts}

    def take(self, faults: RowFaults) -> None:
        """Take in what was said of the files, and the faulty rows that were skipped."""
        self.faulty, self.faulty_lines = faults.count, faults.shown()[: len(faults.lines)]
        self.remarks = list(faults.remarks)

    def lines(self, limit: str = LIMIT) -> list[str]:
        """The report in sentences, warnings last.

        Args:
            limit: what `data.max_length` is called, where an option stands in its place.
        """
        unit = "document" if self.format == "text" else "row"
        examples = self.examples + self.split_off
        made = f", {counted(examples, 'example')} made of them" if examples != self.kept else ""
        split = f", {self.split_off} of these split off for evaluation" if self.split_off else ""
        lines = [
            f"{self.source}: {counted(self.rows, unit)} ({self.read_as()}), {self.kept} kept{made}{split}; "
            f"{counted(self.tokens, 'token')}, {self.trained_tokens} of them trained; the longest has {self.longest}",
            *self.shares(),
        ]
        if self.template is not None:
            lines.append(f"chat template: {self.template_name()}; trained: {self.trained_part()}")
        return [line.replace(LIMIT, limit) for line in lines + self.warnings()]

    def read_as(self) -> str:
        """The format, and which columns are read under other names: `prompt_completion: Question as prompt, …`."""
        renamed = ", ".join(f"{theirs} as {ours}" for ours, theirs in self.columns.items())
        return f"{self.format}: {renamed}" if renamed else self.format

    def shares(self) -> list[str]:
        """What a mixture has of each of its sources, in sentences; empty where there is one."""
        total = sum(taken for _, taken in self.parts)
        return [
            f"  {taken / total:.1%} {part.source}: {counted(taken, 'row')} out of {part.kept} ({part.read_as()})"
            for part, taken in self.parts
        ]

    def warnings(self) -> list[str]:
        """What was dropped, cut or added, in sentences; empty where all is as it was."""
        lines = [f"{part.source}: {line}" for part, _ in self.parts for line in part.warnings()]
        if self.parts:
            return lines + self.remarks
        lines = self._file_warnings()
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
            lines.append(f"{counted(self.truncated, 'row')} cut at data.max_length {self.max_length}")
        if self.rewritten:
            made = counted(self.rewritten_examples, "example")
            lines.append(
                f"{counted(self.rewritten, 'row')} became {made}, one an answer: "
                "the chat template writes earlier turns otherwise once others follow, and each is trained as it is at "
                "inference"
            )
        if self.context_answers:
            lines.append(f"{counted(self.context_answers, 'answer')} not trained: marked as context")
        if self.empty_answers:
            lines.append(f"{counted(self.empty_answers, 'answer')} not trained: empty")
        for note, number in sorted(self.notes.items()):
            noun, _, sentence = note.partition(": ")
            lines.append(f"{counted(number, noun)}: {sentence}")
        if self.ends_added:
            lines.append(
                f"the chat template ends answers with no special token: an end-of-text token was put after "
                f"{counted(self.ends_added, 'answer')}"
            )
        return lines

    def _file_warnings(self) -> list[str]:
        """What was not read, in sentences."""
        lines = list(self.remarks)
        if self.skipped_files:
            lines.append(f"files not read, as they are no data files: {_some(self.skipped_files)}")
        if self.unused_columns:
            lines.append(f"columns not used: {_some(self.unused_columns)}")
        if self.faulty:
            more = f", and {self.faulty - len(self.faulty_lines)} more" if self.faulty > len(self.faulty_lines) else ""
            lines.append(f"{counted(self.faulty, 'faulty row')} skipped: {'; '.join(self.faulty_lines)}{more}")
        return lines

    def template_name(self) -> str:
        """The chat template's name as a person would say it."""
        return "a plain one, as the tokenizer has none" if self.template == "plain" else str(self.template)

    def trained_part(self) -> str:
        """Which tokens are trained."""
        return "the answers" if self.train_on == "completion" else "every token"


def _some(names: Collection[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{', '.join(list(names)[:10])}{more}"


def _dropped(number: int) -> str:
    return f"{counted(number, 'row')} dropped"
