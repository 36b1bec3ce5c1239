"""Tables as text: .csv and .tsv, their delimiter and quoting found out from their first records."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.names import is_known
from qlora_tool.data.readers.rows import MOST_COLUMNS, Row, name_index, refuse_title
from qlora_tool.data.readers.streams import Line, lines
from qlora_tool.errors import UserError
from qlora_tool.sizes import counted

DELIMITERS = ",;\t|"
SAMPLE = 200  # lines that are looked at
LONGEST_CELL = 64 << 20  # characters; a quote that is left open makes a cell of all that follows

_QUOTED: dict[str, Any] = {"quotechar": '"', "doublequote": True}  # as spreadsheets write it
_OTHERWISE: tuple[dict[str, Any], ...] = (
    {"quotechar": '"', "doublequote": False, "escapechar": "\\"},  # as databases do
    {"quotechar": "'", "doublequote": True},
    {"quoting": csv.QUOTE_NONE, "quotechar": None},  # as in most .tsv
)


def read_delimited(file: Path, faults: RowFaults) -> Iterator[Row]:
    """Rows by the names in the first record. Quoted cells may span lines; a row's line is the one it begins on."""
    csv.field_size_limit(LONGEST_CELL)  # the module's default refuses cells over 128 KiB
    given = _line_by_line(lines(file, faults))
    head = list(islice(given, SAMPLE))
    if head and (wide := max(map(head[0].text.count, DELIMITERS))) >= MOST_COLUMNS:
        raise UserError(f"{file}, line 1: {wide + 1:,} columns, expected {MOST_COLUMNS:,} at most; leave out those "
                        "that are not trained on")  # fmt: skip
    ended = len(head) < SAMPLE
    separator, head = _separator_line(head)
    sample = [_parsable(line.text) for line in head]
    _refuse_title(file, head, sample, separator or DELIMITERS, ended=ended)
    form = _form(sample, separator or DELIMITERS, ended=ended)
    if form["quotechar"] != '"' and (opened := [line.number for line in head if _opens_a_quote(line.text, form)]):
        faults.remark(f"{file}: quotes are read as part of the text, for one is left open (line {opened[0]})")
    table = _Table(file, faults)
    for begin, cells in _records(file, chain(head, given), form, faults):
        if row := table.row(begin, cells):
            yield row


class _Table:
    """The columns of a table, and its rows by them."""

    def __init__(self, file: Path, faults: RowFaults):
        self.file, self.faults = file, faults
        self.names: list[str] = []
        self.unnamed: list[int] = []  # columns without a name, which have to be empty
        self.head = ""  # where the names stand, until a record below them is seen

    def row(self, line: int, cells: list[str]) -> Row | None:
        where = f"{self.file}, line {line}"
        if not any(cell.strip() for cell in cells):
            return None
        if not self.names:
            self._head(where, cells)
            return None
        if self.head:
            refuse_title(self.head, self.names, cells)
            self.head = ""
        width = len(self.names)
        while len(cells) > width and not cells[-1].strip():
            cells.pop()
        if len(cells) != width:
            named = ", ".join(name for name in self.names if name)
            self.faults.add(where, f"{counted(len(cells), 'cell')}, expected {width} ({named})")
        elif filled := [index for index in self.unnamed if cells[index].strip()]:
            column = f"column {filled[0] + 1}"
            self.faults.add(where, f"a cell in {column}, which has no name in the first line; give it one")
        else:
            return Row({name: cell for name, cell in zip(self.names, cells, strict=True) if name}, where)
        return None

    def _head(self, where: str, cells: list[str]) -> None:
        while not cells[-1].strip():
            cells.pop()
        self.names, self.head = name_index(cells), where
        cells = self.names
        self.unnamed = [index for index, name in enumerate(cells) if not name.strip()]
        given = [name for name in cells if name.strip()]
        if twice := sorted(name for name, count in Counter(given).items() if count > 1):
            raise UserError(f"{where}: the column '{twice[0]}' stands twice; give each a name of its own")


def _records(
    file: Path, given: Iterable[Line], form: dict[str, Any], faults: RowFaults
) -> Iterator[tuple[int, list[str]]]:
    """Every record that can be read, with the line that it begins on."""
    undecoded: list[tuple[int, str]] = []
    first: list[int] = []
    nulls: list[int] = []

    def texts() -> Iterator[str]:
        for line in given:
            first[:] = first or [line.number]
            if line.fault:
                undecoded.append((line.number, line.fault))
            if "\0" in line.text and not nulls:
                nulls.append(line.number)
                faults.remark(f"{file}: null characters (line {line.number} is the first with one) read as \ufffd")
            yield _parsable(line.text)

    reader = csv.reader(texts(), strict=True, **form)
    done = 0
    while True:
        fault, cells = None, []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = _reason(error)
        begin, done = (first[0] if first else 1) + done, reader.line_num
        if undecoded:
            faults.add(f"{file}, line {undecoded[0][0]}", undecoded[0][1])
            undecoded.clear()
        elif fault:
            faults.add(f"{file}, line {begin}", fault)
        else:
            yield begin, cells


def _reason(error: csv.Error) -> str:
    if "field larger" in str(error):
        return f"a cell of more than {LONGEST_CELL >> 20} million characters; is a quote left open?"
    return f"not CSV ({error})"


def _line_by_line(given: Iterable[Line]) -> Iterator[Line]:
    """The lines of a file in which carriage returns alone end them, as on old Macs; others as they are."""
    number = 0
    for line in given:
        begin, returns, _ = line.text.rstrip("\r\n").partition("\r")
        old = bool(returns) and (number > 0 or line.number == 1) and '"' not in begin
        for text in line.text.splitlines(keepends=True) if old else [line.text]:
            number = number + 1 if old else line.number
            yield Line(number, text, line.fault)


def _opens_a_quote(text: str, form: dict[str, Any]) -> bool:
    """Whether a cell of a line begins with a double quote that does not end it."""
    cells = text.rstrip("\r\n").split(form["delimiter"])
    return any(cell.startswith('"') and not _enclosed(cell) for cell in cells)


def _parsable(text: str) -> str:
    """Without null characters, which the module refuses."""
    return text.replace("\0", "\ufffd")


def _separator_line(head: list[Line]) -> tuple[str, list[Line]]:
    """The delimiter that Excel wrote into the first line (`sep=;`), and the lines behind it."""
    text = head[0].text.strip("\r\n") if head else ""
    if text[:4].lower() == "sep=" and len(text) == 5:
        return text[4], head[1:]
    return "", head


def _refuse_title(file: Path, head: list[Line], sample: list[str], delimiters: str, *, ended: bool) -> None:
    """See `refuse_title`. A title alone on its line has no delimiter, and what is below would be read as one column."""
    filled = [index for index, text in enumerate(sample) if text.strip()][:2]
    if len(filled) < 2 or any(map(sample[filled[0]].count, delimiters)):
        return
    below = sample[filled[1] :]
    form = _form(below, delimiters, ended=ended)
    if all(_merit(below, form, ended=ended)[:2]):  # known names, and several cells
        title = sample[filled[0]].strip().strip('"')
        refuse_title(f"{file}, line {head[filled[0]].number}", [title], next(csv.reader(below, **form)))


def _form(sample: list[str], delimiters: str, *, ended: bool) -> dict[str, Any]:
    """How a table is written: the delimiter by which its first records have the most known names and equally many
    cells; quoted as spreadsheets do, unless another way explains every record and this one does not."""
    tried = [{"delimiter": delimiter, **_QUOTED} for delimiter in delimiters]
    best = max(tried, key=lambda form: _merit(sample, form, ended=ended))
    known, wide, even, width = _merit(sample, best, ended=ended)
    escaped = any('\\"' in line for line in sample)
    ways = [quoting for quoting in _OTHERWISE if escaped or "escapechar" not in quoting]
    for form in ({"delimiter": delimiter, **quoting} for quoting in ways for delimiter in delimiters):
        other = _merit(sample, form, ended=ended)
        if other[2] == 1 and other > (known, wide, even, width) and (len(sample) > 2 or other[0] > known):
            return form
    return best


def _merit(sample: list[str], form: dict[str, Any], *, ended: bool) -> tuple[int, bool, float, int]:
    """How well a form explains a sample: known names in its head, whether that has several cells, the share of records
    as wide as the head, and its width."""
    records: list[list[str]] = []
    broken = 0
    reader = csv.reader(sample, strict=True, **form)
    while True:
        try:
            if cells := next(reader):
                records.append(cells)
        except StopIteration:
            break
        except csv.Error:
            broken += ended or reader.line_num < len(sample)  # a cell may go on behind the sample
    if not records:
        return 0, False, 0.0, 0
    head = records[0]
    even = sum(len(cells) == len(head) for cells in records)
    # Where double quotes are not read, a cell that they enclose says that they should be.
    stray = form["quotechar"] != '"' and any(_enclosed(cell) for cells in records for cell in cells)
    share = 0.0 if stray else even / (len(records) + broken)
    return sum(map(is_known, head)), len(head) > 1, share, len(head)


def _enclosed(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'
