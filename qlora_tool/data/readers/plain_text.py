"""Text files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.readers.rows import Row
from qlora_tool.data.readers.streams import whole_text
from qlora_tool.errors import UserError


def read_text(file: Path, faults: RowFaults) -> Iterator[Row]:
    """One row: `text`, the whole file. None where it is blank."""
    text = whole_text(file, faults)
    if text.count("\0") > len(text) // 10:
        raise UserError(f"{file}: no text: one character in ten and more is null; expected a text file")
    if text.strip():
        yield Row({"text": text}, str(file))
