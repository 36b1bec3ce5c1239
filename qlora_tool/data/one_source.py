"""One source, from its files to examples, in bounded memory: rows are read as they are needed, and what is made of many
of them goes to the disk.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.config.sources import DataSource
from qlora_tool.data.blocks import Block
from qlora_tool.data.columns import LOOKED_AT, columns_there, find_layout
from qlora_tool.data.encoding import Encoder, refuse_without_end
from qlora_tool.data.examples import ExampleList, Examples
from qlora_tool.data.faults import RowFaults
from qlora_tool.data.fingerprint import fingerprint
from qlora_tool.data.layout import Layout
from qlora_tool.data.readers.rows import Row
from qlora_tool.data.report import DataReport
from qlora_tool.data.sources import Part, skipped_files, source_parts
from qlora_tool.data.store import open_store, store_folder, write_store, write_temporary
from qlora_tool.data.template import install_chat_template, read_chat_template
from qlora_tool.data.workers import Chunk, encode_all, processes_for
from qlora_tool.errors import MachineError, UserError, printable
from qlora_tool.files.atomic import REFUSALS
from qlora_tool.files.cache import tell_unwritable
from qlora_tool.terminal import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.config import DataConfig

KEPT_FROM = 4 << 20  # bytes of a source: what is tokenized in a second or two is not kept on the disk
ROWS_AT_A_TIME = 500
HELD_OUT = re.compile(r"(test|eval|evaluation|valid|validation|val|dev)([._-]|$)", re.IGNORECASE)


class OneSource:
    """A file, a folder or a hub id on its way to examples.

    Args:
        source: with its own format and columns, where it has them.
        data: how rows are read, rendered and cut.
        tokenizer: gets the chat template that is used, where there are conversations.
        first: read no more rows than this.
        strict: whether the source must have the columns of `data.columns`.

    Attributes:
        report: complete when the examples are there.
    """

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
        self._begin()

    def _begin(self) -> None:
        data = self.data
        self.faults, self.read = RowFaults(skip=data.on_error == "skip"), RowFaults()
        self.report = DataReport(self.path, "", None, data.train_on, data.max_length)
        self.rows = 0

    def examples(self) -> Examples:
        """The examples: from the disk, or made and, where they are many, put there.

        Raises:
            UserError: the source is missing or broken, rows do not have the format, or the template refuses them.
            MachineError: the hub cannot be reached, or the disk is full.
        """
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
            try:
                stored = write_store(folder, self._blocks(size), self.report)
            except MachineError as error:
                if getattr(error.__cause__, "errno", None) not in REFUSALS:
                    raise
                tell_unwritable(error)  # full after the first blocks, say: once more, into another folder
                self._begin()
                stored = write_temporary(self._blocks(size), self.report)
        elif stored.report.template is not None:
            install_chat_template(self.tokenizer, path)
        self.report = stored.report
        self.report.files = files
        return stored

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

    def _in_memory(self) -> Examples:
        rows = []
        for chunk in self._chunks():
            rows += self._encoder.encode(chunk.rows, chunk.layout, self.report, self.faults)
        self._finish()
        if self.first is None:
            self.report.files = self._hashes()
        numbers = [number for number, examples in enumerate(rows) for _ in examples]
        return ExampleList(chain.from_iterable(rows), numbers)

    def _blocks(self, size: int) -> Iterator[Block]:
        """The examples as they are made, by several processes where there is enough to do."""
        chunks = self._chunks(ROWS_AT_A_TIME)
        first = next(chunks, None)  # finds the format, so that the template is installed before processes start
        given = [first] if first is not None else []
        blank = replace(self.report, unused_columns={}, columns={}, notes=Counter())
        with progress(f"tokenizing {printable(self.path, 60)}", size / 1e6, "MB") as bar:
            for encoded in encode_all(self._encoder, chain(given, chunks), blank, processes_for(size)):
                self.report.add(encoded.report)
                self.faults.take(encoded.faults)
                self.faults.raise_any()
                bar.reach(self.read.bytes_read / 1e6)
                yield encoded.block
        self._finish()

    def _finish(self) -> None:
        self.faults.take(self.read)
        self.faults.raise_any()
        self.faults.remarks = self.read.remarks
        self.report.take(self.faults)
        self.report.skipped_files = skipped_files(self.path)
        named = [part.name for part in self.parts if part.file is not None and _held_out(part.file, Path(self.path))]
        if named and len(named) < len(self.parts):
            self.report.remarks.append(
                f"{self.path}: {', '.join(named)} read with the others; where that is to be evaluated on, name the "
                "files apart in data.train and data.eval"
            )

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


def _held_out(file: Path, source: Path) -> bool:
    """Whether a file, or a folder of the source that it lies in, is named as what is not to be trained on."""
    inside = file.relative_to(source.expanduser()).parts if file.is_relative_to(source.expanduser()) else ()
    return any(map(HELD_OUT.match, inside or (file.name,)))

