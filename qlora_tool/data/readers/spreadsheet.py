"""Excel's .xlsx files, a row at a time. A sheet is named as `FILE.xlsx:SHEET`, unless only one has rows."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.readers.damaged import decoded, decoding
from qlora_tool.data.readers.merged import MergedCells
from qlora_tool.data.readers.rows import Row, name_index, refuse_title
from qlora_tool.data.readers.spreadsheet_archive import Archive
from qlora_tool.errors import UserError, did_you_mean

_DAMAGED = "damaged", "open it in Excel and save it again, or as .csv"


def read_spreadsheet(file: Path, faults: RowFaults, sheet: str | None = None) -> Iterator[Row]:
    """Rows by the names in the first row that is not empty; cells as text, those of formulas as Excel last computed.

    Args:
        sheet: the sheet to read; None: the only one that has rows.

    Raises:
        UserError: no .xlsx file, several sheets with rows, two columns of one name, a title above the names, or a value
            in merged cells.
    """
    with contextlib.ExitStack() as opened:
        with decoding(file, "not an .xlsx file, or one with a password", "save it as .xlsx without one, or as .csv"):
            computed, written = (opened.enter_context(_open(file, data_only=only)) for only in (True, False))
        name = _sheet(file, computed, sheet)
        # The formulas are there in the second one only, their results in the first.
        both = zip(_cells(file, computed[name]), _cells(file, written[name]), strict=False)
        with decoding(file, *_DAMAGED):
            merged = MergedCells(computed[name])
        yield from _rows(file, name if len(computed.sheetnames) > 1 else None, both, merged, faults)


@contextlib.contextmanager
def _open(file: Path, *, data_only: bool) -> Iterator[Any]:
    """What `openpyxl.load_workbook` gives, out of an archive that is watched."""
    from openpyxl.reader.excel import ExcelReader

    with Archive(file) as archive:
        reader = ExcelReader(file, read_only=True, data_only=data_only)
        reader.archive.close()
        reader.archive = archive
        reader.read()
        for sheet in reader.wb.worksheets:
            sheet.reset_dimensions()  # what a file says of its size may be wrong, and rows beyond it would be left out
        yield reader.wb


def _cells(file: Path, sheet: Any) -> Iterator[Any]:
    return decoded(sheet.iter_rows(), file, *_DAMAGED)


def _sheet(file: Path, book: Any, wanted: str | None) -> str:
    names = [sheet.title for sheet in book.worksheets]
    if wanted is not None:
        if wanted not in names:
            close = did_you_mean(wanted, names) or f"; its sheets are {', '.join(names)}"
            raise UserError(f"{file}: no sheet '{wanted}'{close}")
        return wanted
    if not names:
        raise UserError(f"{file}: no sheet in it; expected one with rows")
    filled = [name for name in names if _has_rows(file, book[name])]
    if len(filled) > 1:
        raise UserError(
            f"{file}: rows on {len(filled)} sheets ({', '.join(filled)}); name one as {file}:{filled[0]}, or list "
            "several in data.train"
        )
    return filled[0] if filled else names[0]


def _has_rows(file: Path, sheet: Any) -> bool:
    filled = (row for row in _cells(file, sheet) if any(_text(cell.value).strip() for cell in row))
    next(filled, None)
    return next(filled, None) is not None


def _rows(
    file: Path, sheet: str | None, pairs: Iterable[tuple[Any, Any]], merged: MergedCells, faults: RowFaults
) -> Iterator[Row]:
    place = f"{file}, sheet '{sheet}'" if sheet else str(file)
    names: list[str] = []
    head = ""  # where the names stand, until a row below them is seen
    formulas = 0
    for number, (cells, sources) in enumerate(pairs, start=1):
        texts = [_text(cell.value) for cell in cells]
        where = f"{place}, row {number}"
        merged.reach(number, texts)
        computed = [index for index, cell in enumerate(sources) if cell.data_type == "f"]
        if not any(text.strip() for text in texts) and not computed:
            continue
        if not names:
            names, head = _names(where, texts), where
            continue
        if head:
            refuse_title(head, names, texts)
            head = ""
        merged.refuse(where, names)
        texts += [""] * (len(names) - len(texts))
        if fault := _fault(names, texts, cells, computed):
            faults.add(where, fault)
            continue
        formulas += len(computed)
        yield Row({name: text for name, text in zip(names, texts, strict=False) if name}, where)
    if formulas:
        cells_hold = "cells hold formulas" if formulas > 1 else "cell holds a formula"
        faults.remark(f"{place}: {formulas} {cells_hold}; read as Excel computed them last")


def _names(where: str, texts: list[str]) -> list[str]:
    given = [text for text in texts if text.strip()]
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise UserError(f"{where}: the column '{twice[0]}' stands twice; give each a name of its own")
    return [text if text.strip() else "" for text in name_index(texts)]


def _fault(names: list[str], texts: list[str], cells: Any, computed: list[int]) -> str | None:
    for index in computed:
        if not texts[index]:
            return (
                f"the formula in column {_letter(index)} has no result; open the file in Excel and save it, or paste "
                "the values"
            )
    for index, cell in enumerate(cells):
        if getattr(cell, "data_type", None) == "e":
            return f"column {_letter(index)} has an error of Excel's ({cell.value}); mend it, or empty the cell"
        if texts[index].strip() and (index >= len(names) or not names[index]):
            return f"a cell in column {_letter(index)}, which has no name in the first row; give it one"
    return None


def _letter(index: int) -> str:
    from openpyxl.utils import get_column_letter

    return str(get_column_letter(index + 1))


def _text(value: Any) -> str:
    """A cell as text: whole numbers without a point, dates as 2026-01-31."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ")
    return str(value)
