"""Parquet files, and Arrow files as `datasets` saves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.readers.rows import Row
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_A_TIME = 256


def read_parquet(file: Path, faults: RowFaults) -> Iterator[Row]:
    """The rows of a Parquet file."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from _rows(file, table.iter_batches(ROWS_AT_A_TIME))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from error


def read_arrow(file: Path, faults: RowFaults) -> Iterator[Row]:
    """The rows of an Arrow file: a stream, or one with an index (Feather)."""
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(file)) as stream:
            indexed = stream.read(6) == b"ARROW1"
            stream.seek(0)
            if not indexed:
                yield from _rows(file, pyarrow.ipc.open_stream(stream))
                return
            reader = pyarrow.ipc.open_file(stream)
            yield from _rows(file, map(reader.get_batch, range(reader.num_record_batches)))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not an Arrow file ({str(error).splitlines()[0]})") from error


def _rows(file: Path, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for begin in range(0, len(batch), ROWS_AT_A_TIME):
            for fields in batch.slice(begin, ROWS_AT_A_TIME).to_pylist():
                number += 1
                yield Row(fields, f"{file}, row {number}")
