"""Tokenized examples on the disk, in Arrow files that `datasets` reads, mapped into memory and not read into it.

A folder of the cache holds one source, tokenized: `examples.arrow` has tokens, masks and places; `numbers.npz` the
lengths and what else is asked of all examples at once; `meta.json`, sealed, the report, and by what the rest is known
to be as it was written: all of it when the folder is opened, so that what has changed is made again, and a part once
more when it is first used. The folder gets its name when it is complete, and the name is a fingerprint of everything
that made it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import shutil
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.data.blocks import Block
from qlora_tool.data.examples import Example, Examples
from qlora_tool.data.labels import IGNORED
from qlora_tool.data.report import DataReport
from qlora_tool.errors import MachineError
from qlora_tool.files.atomic import disk_errors, replacing_folder
from qlora_tool.files.cache import cache_folder, forget, is_written, tell_unwritable
from qlora_tool.files.reading import why_no_file
from qlora_tool.files.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    import numpy
    import pyarrow

logger = logging.getLogger(__name__)

ARROW, NUMBERS, META = "examples.arrow", "numbers.npz", "meta.json"
VERSION = 2  # of the files
KEPT_BYTES = 20 * 10**9  # of all sources together; those used longest ago go first
GIVEN_BACK_AFTER = 64 << 20  # bytes mapped until they are given back
MAPPED_BY_EXAMPLE = 6 << 16  # bytes: Linux maps 64 KiB around what is touched, here in six places
TOKENS_OF_CHUNK = 1 << 21  # at least: opening the file touches the beginning of every chunk


class StoredExamples(Examples):
    """Examples of a folder that `write_store` wrote. Of the file there is in memory what is being read.

    Raises:
        ValueError: the folder is not whole, or not as it was written.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path):
        import datasets
        import numpy
        import pyarrow

        self.folder = folder
        meta = read_sealed(folder / META)
        if meta["version"] != VERSION:
            raise ValueError("of another version")
        arrow, numbers = folder / ARROW, folder / NUMBERS
        for file in (arrow, numbers):
            if reason := why_no_file(file):
                raise ValueError(reason)
            size, crc = meta["files"][file.name]
            if file.stat().st_size != size or _crc_of(file) != crc:
                raise ValueError(f"{file.name} is not as it was written")
        self.report = _report(meta["report"])
        self.highest = meta["highest"]
        self._crc, self._seen = meta["crc"], bytearray(len(meta["crc"]))
        with numpy.load(numbers) as stored:
            self.lengths, self.trained = (array("i", stored[name].tobytes()) for name in ("lengths", "trained"))
            self.answers, self.rows = stored["answers"], stored["rows"]
        with arrow.open("rb") as stream:
            self._mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._read = 0
        try:
            # With a fingerprint: `Dataset.from_buffer` would make one of all the bytes.
            table = datasets.table.InMemoryTable.from_buffer(pyarrow.py_buffer(self._mapped))
            self.dataset = datasets.Dataset(table, fingerprint=folder.name)
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from error
        self._give_back()
        self._chunks = [table.column(name).chunks for name in ("input_ids", "trained", "where")]
        self._begins = [0]
        for chunk in self._chunks[0]:
            self._begins.append(self._begins[-1] + len(chunk))
        if self._begins[-1] != len(self.lengths) or len(self._begins) != len(self._crc) + 1:
            raise ValueError("not whole")

    @property
    def digests(self) -> numpy.ndarray[Any, Any]:
        import numpy

        with numpy.load(self.folder / NUMBERS) as stored:
            found: numpy.ndarray[Any, Any] = stored["digests"]
            return found

    def example(self, index: int) -> Example:
        import numpy

        number = bisect_right(self._begins, index) - 1
        ids, trained, where = (chunks[number] for chunks in self._chunks)
        if not self._seen[number]:
            self._check(number, (ids, trained, where))
        place = index - self._begins[number]
        tokens = ids[place].values.to_numpy()
        labels = numpy.where(trained[place].values.to_numpy(zero_copy_only=False), tokens, IGNORED)
        example = Example(tokens.tolist(), labels.tolist(), where[place].as_py())
        self._read += MAPPED_BY_EXAMPLE + 4 * len(tokens)
        if self._read > GIVEN_BACK_AFTER:
            self._give_back()
        return example

    def _check(self, number: int, columns: Iterable[pyarrow.Array]) -> None:
        """Refuse a chunk that has changed since the file was opened, when it is first read. That ends the run; the next
        one makes the folder anew."""
        if _crc_of_columns(columns) != self._crc[number]:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise MachineError(f"{self.folder}: tokenized data were changed on the disk while they were used, and are "
                               "removed; start again to make them anew and go on from the last checkpoint")  # fmt: skip
        self._seen[number] = 1
        self._read += 6 * len(self._chunks[0][number].values)

    def _give_back(self) -> None:
        """Mapped pages count as the process's memory; the system has them still, and gives them again."""
        self._read = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


def store_folder(fingerprint: str) -> Path:
    """Where the source of a fingerprint is kept."""
    return cache_folder() / "datasets" / fingerprint


def open_store(folder: Path) -> StoredExamples | None:
    """The examples kept in a folder; None where there are none, or not all of them."""
    if not folder.is_dir():
        return None
    try:
        stored = StoredExamples(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: tokenized data that are not as they were written (%s); they are made again", folder, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)  # used last
    return stored


def write_store(folder: Path, blocks: Iterable[Block], report: DataReport) -> StoredExamples:
    """Write blocks as they come, and open what was written.

    Args:
        folder: gets its name when all is written. Where the cache cannot be written, a temporary folder takes its place
            for as long as this process lives, which is said.
        report: taken when the last block is there.

    Raises:
        MachineError: the disk is full.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        tell_unwritable(error)
        return write_temporary(blocks, report)
    with replacing_folder(folder) as new:
        _write(new, blocks, report)
    _forget_oldest(folder)
    return StoredExamples(folder)


def write_temporary(blocks: Iterable[Block], report: DataReport) -> StoredExamples:
    """`write_store` into a temporary folder, which goes with the process."""
    temporary = tempfile.TemporaryDirectory(prefix="qlora-tool-")
    logger.info("tokenized data go to %s", temporary.name)
    folder = Path(temporary.name) / "examples"
    with disk_errors(folder):
        _write(folder, blocks, report)
    stored = StoredExamples(folder)
    stored.temporary = temporary  # type: ignore[attr-defined]  # lives as long as they do
    return stored


def _write(folder: Path, blocks: Iterable[Block], report: DataReport) -> None:
    import numpy
    import pyarrow

    folder.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema(
        [("input_ids", pyarrow.list_(pyarrow.int32())), ("trained", pyarrow.list_(pyarrow.bool_())),
         ("where", pyarrow.string())]
    )  # fmt: skip
    numbers: dict[str, list[Any]] = {name: [] for name in ("lengths", "trained", "answers", "rows", "digests")}
    crc, rows, highest = [], 0, 0
    with pyarrow.OSFile(str(folder / ARROW), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for block in _larger(blocks):
            batch = _batch(block, schema)
            writer.write_batch(batch)
            crc.append(_crc_of_columns(batch.columns))
            for name in numbers:
                numbers[name].append(getattr(block, name) + rows if name == "rows" else getattr(block, name))
            rows += int(block.rows[-1]) + 1
            highest = max(highest, int(block.tokens.max()))
    kinds = {"digests": numpy.uint64}
    numpy.savez(folder / NUMBERS, **{
        name: numpy.concatenate(parts) if parts else numpy.zeros(0, kinds.get(name, numpy.int32))
        for name, parts in numbers.items()
    })  # fmt: skip
    files = {name: [(folder / name).stat().st_size, _crc_of(folder / name)] for name in (ARROW, NUMBERS)}
    write_sealed(folder / META, {"version": VERSION, "files": files, "crc": crc, "highest": highest,
                                 "report": {**vars(report), "parts": []}})  # fmt: skip


def _larger(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same examples in larger blocks, none of them empty."""
    waiting: list[Block] = []
    for block in blocks:
        waiting += [block] if len(block) else []
        if sum(len(each.tokens) for each in waiting) >= TOKENS_OF_CHUNK:
            yield Block.joined(waiting)
            waiting = []
    if waiting:
        yield Block.joined(waiting)


def _batch(block: Block, schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    import numpy
    import pyarrow

    offsets = numpy.zeros(len(block) + 1, dtype=numpy.int32)
    numpy.cumsum(block.lengths, out=offsets[1:])
    ids, trained = (pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
                    for values in (block.tokens, block.mask))  # fmt: skip
    return pyarrow.RecordBatch.from_arrays([ids, trained, pyarrow.array(block.where, pyarrow.string())], schema=schema)


def _crc_of_columns(columns: Iterable[pyarrow.Array]) -> int:
    crc = 0
    for column in columns:
        for buffer in column.buffers():
            crc = crc if buffer is None else zlib.crc32(buffer, crc)
    return crc


def _crc_of(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _report(kept: dict[str, Any]) -> DataReport:
    return DataReport(**{**kept, "notes": Counter(kept["notes"])})


def _forget_oldest(newest: Path) -> None:
    """Delete the sources used longest ago, as far as all of them take too much."""
    folders = sorted((entry for entry in _folders(newest.parent) if entry != newest), key=lambda entry: -_used(entry))
    total = _size(newest)
    for folder in folders:
        total += _size(folder)
        if total > KEPT_BYTES:
            logger.info("%s: tokenized data used longest ago, deleted to keep the cache below %d GB", folder,
                        KEPT_BYTES // 10**9)  # fmt: skip
            forget(folder)


def _folders(parent: Path) -> Iterator[Path]:
    yield from (entry for entry in parent.iterdir() if entry.is_dir() and is_written(entry))


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0
