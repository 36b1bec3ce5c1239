"""Parquet files, and Arrow files as `datasets` saves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.readers.damaged import decoded
from qlora_tool.data.readers.rows import Row

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_A_TIME = 256
_CURE = "get the file again, whole"


def read_parquet(file: Path, faults: RowFaults) -> Iterator[Row]:
    """The rows of a Parquet file."""
    yield from decoded(_parquet(file), file, "not a Parquet file", _CURE)


def read_arrow(file: Path, faults: RowFaults) -> Iterator[Row]:
    """The rows of an Arrow file: a stream, or one with an index (Feather)."""
    yield from decoded(_arrow(file), file, "not an Arrow file", _CURE)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        yield from _rows(file, table.iter_batches(ROWS_AT_A_TIME))


def _arrow(file: Path) -> Iterator[Row]:
    import pyarrow.ipc

    with pyarrow.memory_map(str(file)) as stream:
        indexed = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if not indexed:
            yield from _rows(file, pyarrow.ipc.open_stream(stream))
            return
        reader = pyarrow.ipc.open_file(stream)
        yield from _rows(file, map(reader.get_batch, range(reader.num_record_batches)))


def _rows(file: Path, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # of a damaged one the places of texts may lie outside the process's memory
        for begin in range(0, len(batch), ROWS_AT_A_TIME):
            for fields in batch.slice(begin, ROWS_AT_A_TIME).to_pylist():
                number += 1
                yield Row(fields, f"{file}, row {number}")
