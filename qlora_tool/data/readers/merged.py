"""Merged cells of a sheet: the file holds their value in the first one only, and the others are empty."""

from __future__ import annotations

from typing import Any

from qlora_tool.errors import UserError


class MergedCells:
    """The merged ranges of a sheet, followed from row to row.

    Args:
        sheet: one that openpyxl reads row by row, which leaves out what is merged; its archive tells.
    """

    def __init__(self, sheet: Any):
        from openpyxl.utils import range_boundaries

        ranges = sheet.parent._archive.merged_cells(sheet._worksheet_path)
        self.count = len(ranges)
        self._ahead = sorted(((*range_boundaries(name), name) for name in ranges), key=lambda box: -box[1])
        self._here: list[tuple[int, int, int, int, str]] = []  # those with a value that reach the row
        self._row = 0

    def reach(self, row: int, texts: list[str]) -> None:
        """Go on to a row, counted from 1, with the texts of its cells."""
        self._row = row
        self._here = [box for box in self._here if box[3] >= row]
        while self._ahead and self._ahead[-1][1] <= row:
            box = self._ahead.pop()
            if box[1] == row and box[0] <= len(texts) and texts[box[0] - 1].strip():
                self._here.append(box)

    def refuse(self, where: str, names: list[str]) -> None:
        """Refuse a row of the table with a cell whose value stands in another one.

        Args:
            where: the row's place.
            names: of the columns; what lies in one without a name is not read.

        Raises:
            UserError: there is such a cell.
        """
        from openpyxl.utils import get_column_letter

        for left, top, right, _, name in self._here:
            first = left if self._row > top else left + 1
            for column in range(first, min(right, len(names)) + 1):
                if names[column - 1]:
                    others = f", one of {self.count:,} merged ranges" if self.count > 1 else ""
                    raise UserError(
                        f"{where}: the cell in column {get_column_letter(column)} is merged ({name}{others}), and the "
                        "file has the value of merged cells in the first one only; unmerge them in Excel, and fill the "
                        "value into every cell"
                    )
