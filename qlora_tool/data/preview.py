"""Rows as a model will see them, and counts of the data that they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_tool.data.batches import counted_labels
from qlora_tool.data.examples import Examples, as_examples
from qlora_tool.data.labels import IGNORED
from qlora_tool.data.report import DataReport
from qlora_tool.data.spans import Span, in_short, spans_of
from qlora_tool.sizes import counted, noun_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.data.tokenize import Dataset, Example


@dataclass(frozen=True)
class PreviewExample:
    """One example of a row.

    Attributes:
        input_ids: its tokens.
        labels: as many: the id where a token is trained, else -100. The first is never trained.
        spans: its text, in stretches that are trained or not.
        where: file and line that it comes from.
    """

    input_ids: list[int]
    labels: list[int]
    spans: list[Span]
    where: str

    @classmethod
    def of(cls, example: Example, tokenizer: PreTrainedTokenizerBase) -> PreviewExample:
        """An example as training counts it."""
        ids, labels = list(example.input_ids), counted_labels(example)
        return cls(ids, labels, spans_of(tokenizer, ids, labels), example.where)

    @property
    def trained_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


@dataclass(frozen=True)
class PreviewRow:
    """One row of a batch: an example, or several that are packed and do not see one another."""

    examples: list[PreviewExample]

    @property
    def input_ids(self) -> list[int]:
        return [token for example in self.examples for token in example.input_ids]

    @property
    def labels(self) -> list[int]:
        return [label for example in self.examples for label in example.labels]

    @property
    def text(self) -> str:
        return "".join(example.text for example in self.examples)

    @property
    def where(self) -> list[str]:
        return [example.where for example in self.examples]

    @property
    def trained_tokens(self) -> int:
        return sum(example.trained_tokens for example in self.examples)

    def as_json(self) -> dict[str, Any]:
        """The row for `--json`; `lengths` are the tokens of each example, in the order of `where`."""
        lengths = [len(example.input_ids) for example in self.examples]
        return {"input_ids": self.input_ids, "labels": self.labels, "text": self.text, "where": self.where,
                "lengths": lengths}  # fmt: skip


@dataclass(frozen=True)
class PreviewCounts:
    """What became of the rows of one source.

    Attributes:
        report: rows, tokens, and what was dropped and why.
        answers: how many kept rows have so many answers, by the number of answers; empty where every token is trained.
    """

    report: DataReport
    answers: dict[int, int]

    @classmethod
    def of(cls, dataset: Dataset) -> PreviewCounts:
        """The counts of a data set."""
        report = dataset.report
        told_apart = report.train_on == "completion"
        answers = Counter(_answers(as_examples(dataset.examples))) if told_apart else {}
        return cls(report, dict(sorted(answers.items())))

    def lines(self) -> list[tuple[str, str]]:
        """The counts to read: what is counted, and the count."""
        report = self.report
        template = f"; chat template: {report.template_name()}" if report.template else ""
        part = f"{report.split_off:,} {noun_of(report.split_off, 'example')}"
        split = f", {part} of them split off for evaluation" if report.split_off else ""
        lines = [
            ("format", f"{report.read_as()}{template}; trained: {report.trained_part()}"),
            ("rows", f"{report.rows:,} read, {report.kept:,} kept{split}"),
            *(("", share.strip()) for share in report.shares()),
            *(("", warning) for warning in report.warnings()),
        ]
        if self.answers:
            lines.append(("answers a row", self._answers_in_words()))
        share = report.trained_tokens / report.tokens
        whole = f"{report.examples:,} {noun_of(report.examples, 'example')}"
        made = f" in {whole}" if report.examples + report.split_off != report.kept else ""
        longest = f"{report.longest:,} {noun_of(report.longest, 'token')}"
        return [
            *lines,
            ("tokens", f"{report.tokens:,}{made}, {report.trained_tokens:,} of them trained ({share:.1%})"),
            ("longest", f"{longest}; data.max_length is {report.max_length:,}"),
        ]

    def _answers_in_words(self) -> str:
        rows, total = sum(self.answers.values()), sum(count * number for count, number in self.answers.items())
        least, most = min(self.answers), max(self.answers)
        return f"{least}" if least == most else f"{least} to {most}, {total / rows:.2f} on average"

    @property
    def over(self) -> str:
        """Which rows these are counts of: `all 60 rows`, or `the first 2,000 rows`."""
        rows = f"{self.report.rows:,} {noun_of(self.report.rows, 'row')}"
        return f"the first {rows}" if self.report.more_rows else f"all {rows}"

    def as_json(self) -> dict[str, Any]:
        """The counts for `--json`."""
        facts = self.report.as_dict()
        facts.pop("files")
        return {"over": self.over, "answers_per_row": {str(k): v for k, v in self.answers.items()}, **facts}


def _answers(examples: Examples) -> list[int]:
    """Answers that are trained, of every row. A row may be several examples."""
    import numpy

    rows = numpy.asarray(examples.rows)
    begins = numpy.flatnonzero(numpy.diff(rows, prepend=-1))
    return numpy.add.reduceat(numpy.asarray(examples.answers), begins).tolist() if len(rows) else []


def preview_rows(
    dataset: Dataset, rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[PreviewRow]:
    """Rows of example indices, as `plan_epoch` gives them, to look at."""
    return [PreviewRow([PreviewExample.of(dataset.examples[index], tokenizer) for index in row]) for row in rows]


def first_row(dataset: Dataset, row: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The first example of a row in one line, for the log of a run."""
    example = PreviewExample.of(dataset.examples[row[0]], tokenizer)
    others = f" ({len(row) - 1} more in its row)" if len(row) > 1 else ""
    tokens = f"{counted(len(example.input_ids), 'token')}, {example.trained_tokens} of them trained"
    return f"first example{others}: {example.where}, {tokens}: {in_short(example.spans)}"
