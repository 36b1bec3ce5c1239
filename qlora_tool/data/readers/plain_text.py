"""Text files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.readers.rows import Row
from qlora_tool.data.readers.streams import whole_text


def read_text(file: Path, faults: RowFaults) -> Iterator[Row]:
    """One row: `text`, the whole file. None where it is blank."""
    text = whole_text(file, faults)
    if text.strip():
        yield Row({"text": text}, str(file))
