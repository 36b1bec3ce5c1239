"""From data sources to token ids and labels."""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.config.sources import DataSource, sources_of, told
from qlora_tool.data.blocks import Block
from qlora_tool.data.columns import LOOKED_AT, columns_there, find_layout
from qlora_tool.data.encoding import Encoder, refuse_without_end
from qlora_tool.data.examples import Example, ExampleList, Examples, Selection, as_examples
from qlora_tool.data.faults import RowFaults
from qlora_tool.data.fingerprint import fingerprint
from qlora_tool.data.layout import Layout
from qlora_tool.data.mixture import Share, mixture
from qlora_tool.data.readers.rows import Row
from qlora_tool.data.report import DataReport
from qlora_tool.data.sources import Part, skipped_files, source_parts
from qlora_tool.data.store import open_store, store_folder, write_store
from qlora_tool.data.template import install_chat_template, read_chat_template
from qlora_tool.data.workers import Chunk, encode_all, processes_for
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.config import DataConfig

__all__ = ["DataReport", "Dataset", "Example", "build_dataset", "build_evaluation_sets", "evaluation_sources"]

logger = logging.getLogger(__name__)

KEPT_FROM = 4 << 20  # bytes of a source: what is tokenized in a second or two is not kept on the disk
ROWS_AT_A_TIME = 500
SAID_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Dataset:
    """The examples of a source or a mixture, and the report on how they came about."""

    examples: Sequence[Example]
    report: DataReport

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of every example, as `batches.plan_epoch` takes them."""
        return as_examples(self.examples).lengths

    @property
    def trained(self) -> Sequence[int]:
        """Labels of every example that count in the loss."""
        return as_examples(self.examples).trained

    @property
    def highest_token(self) -> int:
        """The highest token id in any example."""
        return as_examples(self.examples).highest


def build_dataset(
    source: str | Sequence[Any],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "data.train",
    first: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Read, format and tokenize a data source, or several as a mixture.

    Args:
        source: a file, a folder or a hub id; or a list as `data.train` has it.
        data: how rows are read, rendered and cut; its `train` and `eval` are not looked at.
        tokenizer: for conversations it leaves with the chat template that was used as its own (see
            `template.install_chat_template`), so that saving it keeps that too.
        key: what errors call the source. Text in `data.train` contradicts a `train_on: completion` that somebody set;
            an option's source (`--data`) need not have the columns of `data.columns`, which are its run's.
        first: read no more rows of a source than this, unless all of them are kept already; `DataReport.more_rows` says
            whether there are more. Nothing is kept then, and files are not hashed.
        seed: draws the rows of a mixture's sources of which not all are taken.

    Raises:
        UserError: the source is missing or broken, rows do not have the format, the template refuses them, or nothing
            is left to learn from.
        MachineError: the hub cannot be reached.
    """
    sources = sources_of(source)
    strict = not key.startswith("--")
    built = [_Source(each, data, tokenizer, first, strict=strict).dataset() for each in sources]
    if key == "data.train" and all(dataset.report.format == "text" for dataset in built):
        refuse_answers_of_text(data, told(source))
    dataset = built[0] if len(built) == 1 and _is_whole(sources[0]) else _mixed(sources, built, seed)
    if not dataset.report.trained_tokens:
        raise UserError(
            f"{key}: nothing to learn from: {'; '.join(dataset.report.lines())}; each row needs an answer that begins "
            "within data.max_length"
        )
    return dataset


def refuse_answers_of_text(data: DataConfig, source: str) -> None:
    """Refuse a `train_on: completion` that somebody set where the training data are text.

    Evaluation files may be text beside a training set of conversations, so only the training set can contradict.
    """
    if data.train_on == "completion" and "train_on" in data.model_fields_set:
        raise UserError(
            f"data.train_on: completion cannot go with data.train {source}, which is text and so has no answers: every "
            "token is trained; leave data.train_on out, or set it to all"
        )


class _Source:
    """One source on its way to examples."""

    def __init__(
        self,
        source: DataSource,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        first: int | None,
        *,
        strict: bool = True,
    ):
        own = {"format": source.format, "columns": source.columns}
        self.data = data.model_copy(update={key: value for key, value in own.items() if value is not None})
        self.path, self.tokenizer, self.first, self.strict = source.path, tokenizer, first, strict
        self.parts = source_parts(self.path)
        self.faults, self.read = RowFaults(skip=data.on_error == "skip"), RowFaults()
        self.report = DataReport(self.path, "", None, data.train_on, data.max_length)
        self.rows = 0

    def dataset(self) -> Dataset:
        size = sum(part.nbytes for part in self.parts)
        files = None if size < KEPT_FROM else self._hashes() if self.first is None else self._kept_hashes()
        if files is None:
            return self._in_memory()
        path = self.data.chat_template
        template = None if path is None else read_chat_template(Path(path))
        folder = store_folder(fingerprint(files, self.data, self.tokenizer, template))
        stored = open_store(folder)
        if stored is None and self.first is not None:
            return self._in_memory()
        if stored is None:
            stored = write_store(folder, self._blocks(size), self.report)
        elif stored.report.template is not None:
            install_chat_template(self.tokenizer, path)
        stored.report.files = files
        return Dataset(stored, stored.report)

    def _hashes(self) -> dict[str, str]:
        return {name: digest for part in self.parts for name, digest in part.hashes().items()}

    def _kept_hashes(self) -> dict[str, str] | None:
        """Those that are known without reading large files; None where one is not."""
        files: dict[str, str] = {}
        for part in self.parts:
            if (found := part.kept_hashes()) is None:
                return None
            files |= found
        return files

    def _in_memory(self) -> Dataset:
        rows = []
        for chunk in self._chunks():
            rows += self._encoder.encode(chunk.rows, chunk.layout, self.report, self.faults)
        self._finish()
        if self.first is None:
            self.report.files = self._hashes()
        numbers = [number for number, examples in enumerate(rows) for _ in examples]
        return Dataset(ExampleList(chain.from_iterable(rows), numbers), self.report)

    def _blocks(self, size: int) -> Iterator[Block]:
        """The examples as they are made, by several processes where there is enough to do."""
        progress = _Progress(self.path, size, self.read)
        chunks = self._chunks(ROWS_AT_A_TIME)
        first = next(chunks, None)  # finds the format, so that the template is installed before processes start
        given = [first] if first is not None else []
        blank = replace(self.report, unused_columns={}, columns={}, notes=Counter())
        for encoded in encode_all(self._encoder, chain(given, chunks), blank, processes_for(size)):
            self.report.add(encoded.report)
            self.faults.take(encoded.faults)
            self.faults.raise_any()
            progress.say(self.report.rows)
            yield encoded.block
        self._finish()

    def _finish(self) -> None:
        self.faults.take(self.read)
        self.faults.raise_any()
        self.faults.remarks = self.read.remarks
        self.report.take(self.faults)
        self.report.skipped_files = skipped_files(self.path)

    @property
    def _encoder(self) -> Encoder:
        data = self.data
        return Encoder(self.tokenizer, data.train_on, data.max_length, data.multi_turn, data.chat_template_kwargs)

    def _chunks(self, size: int | None = None) -> Iterator[Chunk]:
        """The rows of every part under its layout, `size` at a time; None: a part at once."""
        for part in self.parts:
            rows = self._taken(part)
            head = list(islice(rows, LOOKED_AT if size else None))
            if size is None:  # what cannot be read is told before anything is said of columns
                self.faults.take(self.read)
                self.faults.raise_any()
            if not head:
                continue
            columns = self.data.columns if self.strict else columns_there(head, self.data.columns)
            layout = find_layout(head, self.data.format, columns)
            self._use(layout, part)
            size_now = size or len(head)
            chunks = [head[begin : begin + size_now] for begin in range(0, len(head), size_now)]
            for some in chunks[:-1]:
                yield Chunk(layout, some)
            some = chunks[-1]
            while some:
                read = RowFaults()
                read.take(self.read)
                yield Chunk(layout, some, read)
                some = list(islice(rows, size_now))

    def _taken(self, part: Part) -> Iterator[Row]:
        """The rows of a part, as far as they are wanted."""
        for row in part.rows(self.read):
            if self.first is not None and self.rows >= self.first:
                self.report.more_rows = True
                return
            self.rows += 1
            yield row

    def _use(self, layout: Layout, part: Part) -> None:
        """Take a layout into the report; get the tokenizer ready for it."""
        before, as_text = self.report.format, layout.format == "text"
        if before and as_text != (before == "text"):
            kind = "text" if as_text else "conversations"
            raise UserError(
                f"{part.name}: {kind}, and what comes before it in {self.path} is not; name the two apart in a list, "
                "data.train: [{path: …}, {path: …}]"
            )
        if layout.format not in before.split(" + "):
            self.report.format = f"{before} + {layout.format}" if before else layout.format
        self.report.columns.update({ours: theirs for ours, theirs in layout.columns.items() if ours != theirs})
        if as_text:
            self.report.train_on = "all"
            refuse_without_end(self.tokenizer, self.path)
        elif self.report.template is None:
            self.report.template = install_chat_template(self.tokenizer, self.data.chat_template)


class _Progress:
    """A line now and then, while rows are tokenized."""

    def __init__(self, name: str, size: int, faults: RowFaults):
        self.name, self.size, self.faults = name, size, faults
        self.began = self.said = time.monotonic()

    def say(self, rows: int) -> None:
        now = time.monotonic()
        if now - self.said < SAID_EVERY:
            return
        self.said = now
        share = f" ({min(self.faults.bytes_read / self.size, 1):.0%})" if self.faults.bytes_read else ""
        logger.info("tokenizing %s: %d rows%s, %d rows a second", self.name, rows, share, rows / (now - self.began))


def _is_whole(source: DataSource) -> bool:
    return source.weight is None and source.rows is None and source.repeat is None


def _mixed(sources: Sequence[DataSource], built: Sequence[Dataset], seed: int) -> Dataset:
    """Several data sets as one, in the shares that are asked for; one after the other where none are."""
    parts = [as_examples(dataset.examples) for dataset in built]
    if all(map(_is_whole, sources)):
        examples, counts = Selection(parts), [dataset.report.kept for dataset in built]
    else:
        shares = [Share(source.weight, source.rows, source.repeat) for source in sources]
        indices, counts = mixture([part.rows for part in parts], shares, seed)
        examples = Selection(parts, indices)
    report = _total(", ".join(map(str, sources)), [dataset.report for dataset in built], counts)
    _count_tokens(report, examples)
    return Dataset(examples, report)


def _total(source: str, reports: Sequence[DataReport], counts: Sequence[int]) -> DataReport:
    """The report on a mixture."""
    formats = " + ".join(dict.fromkeys(report.format for report in reports))
    template = next((report.template for report in reports if report.template is not None), None)
    train_on = "all" if all(report.format == "text" for report in reports) else reports[-1].train_on
    for report in reports:
        if report.format != "text":
            train_on = report.train_on
    total = DataReport(source, formats, template, train_on, reports[0].max_length)
    for report in reports:
        total.add(replace(report, remarks=[], faulty_lines=[], skipped_files=[], columns={}, unused_columns={}))
    total.kept = sum(counts)
    total.parts = list(zip(reports, counts, strict=True))
    return total


def evaluation_sources(data: DataConfig) -> dict[str, str | list[Any]]:
    """The sources that `data.eval` names, by name; none where it is a fraction of the training data."""
    if isinstance(data.eval, str | list):
        return {"eval": data.eval}
    return dict(data.eval) if isinstance(data.eval, dict) else {}


def build_evaluation_sets(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    *,
    first: int | None = None,
    seed: int = 0,
) -> tuple[Dataset, dict[str, Dataset]]:
    """The evaluation sets that `data.eval` asks for, by name, and what is left to train on.

    A source by itself is named `eval`, as is a fraction split off the training set. Which examples a fraction takes
    depends on their tokens alone, not on their order or `data.shuffle`: equal examples never part, so none that is
    evaluated is trained on as well.

    Args:
        first, seed: see `build_dataset`.

    Returns:
        The training set, smaller where a fraction was split off it, and the evaluation sets.
    """
    if data.eval is None:
        return train, {}
    if sources := evaluation_sources(data):
        prefix = "data.eval." if isinstance(data.eval, dict) else "data."
        return train, {
            name: build_dataset(source, data, tokenizer, key=f"{prefix}{name}", first=first, seed=seed)
            for name, source in sources.items()
        }
    rest, evaluation = _split(train, float(data.eval))
    return rest, {"eval": evaluation}


def _split(train: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    import numpy

    examples = as_examples(train.examples)
    digests = examples.digests
    different = numpy.arange(len(digests))
    if isinstance(examples, Selection):  # what a mixture has several times is evaluated once
        different = numpy.unique(numpy.asarray(examples.indices), return_index=True)[1]
    wanted = max(1, round(fraction * len(different)))
    last = numpy.sort(digests[different])[wanted - 1]
    chosen = numpy.sort(different[digests[different] <= last])
    rest = numpy.flatnonzero(digests > last)
    if not len(rest):
        raise UserError(
            f"data.eval: a fraction of {fraction} takes all of the {len(digests)} examples of {train.report.source}; "
            "give a smaller one, or a file"
        )
    report = train.report
    evaluation = DataReport(
        f"{report.source} ({fraction:g} of it)", report.format, report.template, report.train_on, report.max_length,
        rows=len(chosen), kept=len(chosen), more_rows=report.more_rows, files=report.files, columns=report.columns,
    )  # fmt: skip
    remaining = replace(report, split_off=len(chosen))
    parts = [Selection([examples], array("i", indices.astype("int32").tobytes())) for indices in (rest, chosen)]
    for each, selection in zip((remaining, evaluation), parts, strict=True):
        _count_tokens(each, selection)
        each.answers = 0 if report.format == "text" else int(sum(selection.answers))
    return Dataset(parts[0], remaining), Dataset(parts[1], evaluation)


def _count_tokens(report: DataReport, examples: Examples) -> None:
    report.examples = len(examples)
    report.tokens = sum(examples.lengths)
    report.trained_tokens = sum(examples.trained)
    report.longest = max(examples.lengths, default=0)
