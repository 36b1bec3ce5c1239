"""The inside of an .xlsx file, a zip of XML, watched while it is unpacked: what it holds between two rows has bounds,
and nothing in it stands for something else (`<!DOCTYPE`), as it may in XML."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from xml.parsers import expat

from qlora_tool.data.readers.rows import LONGEST, MOST_COLUMNS
from qlora_tool.errors import UserError

MOST_ROWS = 1 << 20  # what Excel has
MOST_STRINGS = 10_000_000
MOST_ELEMENTS = 1_000_000  # of XML between two rows, or in a part without rows


class Archive(zipfile.ZipFile):
    """An .xlsx file whose parts are read within bounds."""

    def __init__(self, file: Path):
        super().__init__(file)
        self.file = file

    def open(self, name: Any, *args: Any, **options: Any) -> Any:
        """A part, to be read."""
        return _Part(super().open(name, *args, **options), self.file)

    def merged_cells(self, name: str) -> list[str]:
        """The ranges of a sheet that are merged, such as A2:A4. They stand behind its rows, so all of it is read."""
        with self.open(name) as part:
            while part.read(1 << 20):
                pass
            return list(part.merged)


class _Part(io.RawIOBase):
    """The bytes of a part of XML, each looked at before it is given out."""

    def __init__(self, stream: Any, file: Path):
        self.stream: BinaryIO = stream
        self.file = file
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._element
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.rows = self.strings = 0
        self.nbytes = self.elements = self.cells = 0  # since the last row
        self.merged: list[str] = []

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.stream.read(len(buffer))
        self.nbytes += len(block)
        self.parser.Parse(block)
        if self.nbytes > LONGEST:
            self._refuse(f"more than {LONGEST >> 20} MiB without a row")
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self.stream.close()
        super().close()

    def _element(self, name: str, attributes: dict[str, str]) -> None:
        kind = name.rpartition(":")[2]
        self.elements += 1
        if kind == "c":
            self.cells += 1
            if self.cells > MOST_COLUMNS:
                self._refuse(f"row {max(1, self.rows)}: more than {MOST_COLUMNS:,} cells")
        elif kind == "row":
            number = attributes.get("r", "")
            self.rows = max(self.rows + 1, int(number) if number.isdecimal() and len(number) < 20 else 0)
            if self.rows > MOST_ROWS or len(number) >= 20:
                self._refuse(f"more than {MOST_ROWS:,} rows")
            self.nbytes = self.elements = self.cells = 0
        elif kind == "si":
            self.strings += 1
            if self.strings > MOST_STRINGS:
                self._refuse(f"more than {MOST_STRINGS:,} texts")
            self.nbytes = self.elements = 0
        elif kind == "mergeCell":
            self.merged.append(attributes.get("ref", ""))
        if self.elements > MOST_ELEMENTS:
            self._refuse(f"more than {MOST_ELEMENTS:,} elements without a row")

    def _doctype(self, *_: Any) -> NoReturn:
        self._refuse("a document type (<!DOCTYPE), which no spreadsheet has")

    def _refuse(self, found: str) -> NoReturn:
        raise UserError(f"{self.file}: {found}; leave out what is not trained on, or save it as .csv")
