"""The text of a file as lines or blocks: unpacked as it is read, its encoding found out.

A byte order mark decides; without one, bytes that are every other one zero are UTF-16, and all else is UTF-8. A file
whose first letters beyond ASCII are not UTF-8 is taken for Windows-1252, what spreadsheets write, and that is said.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.readers.rows import LONGEST
from qlora_tool.errors import UserError

BLOCK = 1 << 20  # bytes
UNPACKED = 20  # times its size: what a file may unpack to without a row where that is more than `LONGEST`
MOST_LINES = 600_000  # without a row
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # before UTF-16's, with which one begins
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip


class Line(NamedTuple):
    """A line of a file with its end, counted from 1. `fault` says which byte is no letter of the encoding."""

    number: int
    text: str
    fault: str | None = None


def lines(file: Path, faults: RowFaults) -> Iterator[Line]:
    """The lines of a file, split at line feeds alone: JSON strings may hold other characters that end lines elsewhere.

    Args:
        faults: is told of a file that is not UTF-8.

    Raises:
        UserError: the file cannot be read, its compressed form is broken, a line is longer than `LONGEST`, or there is
            no row in `MOST_LINES`, or in what a packed file unpacks to.
    """
    with _reading(file) as (stream, place):
        bound = _Bound(file, faults)
        encoding = _marked_encoding(stream)
        if encoding not in (None, "utf-8-sig"):
            text = io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="\n")
            for place[0], line in enumerate(iter(partial(text.readline, LONGEST + 1), ""), start=1):
                bound.line(place[0], len(line))
                yield Line(place[0], line, _undecoded(line, encoding))
            return
        if encoding:
            stream.read(len(codecs.BOM_UTF8))
        decoder = _EightBit(file, faults, decided=bool(encoding))
        for place[0], raw in enumerate(iter(partial(stream.readline, LONGEST + 1), b""), start=1):
            bound.line(place[0], len(raw))
            yield Line(place[0], *decoder.decode(raw, stream, place[0]))


def blocks(file: Path, faults: RowFaults) -> Iterator[str]:
    """The text of a file, a block at a time; a byte order mark is left out, line ends stay as they are.

    Raises:
        UserError: as `lines`; or a byte is no letter of the encoding.
    """
    with _reading(file) as (stream, place):
        bound = _Bound(file, faults)
        encoding = _marked_encoding(stream)
        decoder = None if encoding is None else codecs.getincrementaldecoder(encoding)()
        place[0] = 1
        block = b"-"
        while block:
            block = stream.read(BLOCK)
            bound.read(len(block))
            if decoder is None and not block.isascii():
                found = _eight_bit(block, stream)
                _say_windows(file, faults, found, block, place[0])
                decoder = codecs.getincrementaldecoder(found)()
            try:
                text = block.decode() if decoder is None else decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = place[0] + error.object.count(b"\n", 0, error.start)
                raise UserError(f"{file}, line {line}: {_not_utf8(error)}") from error
            place[0] += block.count(b"\n")
            if text:
                yield text


def whole_text(file: Path, faults: RowFaults) -> str:
    """All of a file's text; see `blocks`."""
    return "".join(blocks(file, faults))


class _Bound:
    """Counts what is read, and refuses what has no end in sight: a packed file of a megabyte may unpack to gigabytes of
    blanks."""

    def __init__(self, file: Path, faults: RowFaults):
        self.file, self.faults = file, faults
        self.size = file.stat().st_size
        self.most = max(LONGEST, UNPACKED * self.size)
        self.lines, self.row_at = 0, faults.row_at  # lines since the last row, and where that was

    def line(self, number: int, size: int) -> None:
        """A line was read."""
        faults = self.faults
        faults.bytes_read += size
        if faults.row_at != self.row_at:
            self.lines, self.row_at = 0, faults.row_at
        self.lines += 1
        if size > LONGEST:
            raise self._refusal(f"line {number} has more than {LONGEST >> 20} MiB; expected a row a line (a list of "
                                "rows in one line is read from a .json file)")  # fmt: skip
        if self.lines > MOST_LINES:
            raise self._refusal(f"{MOST_LINES:,} lines without a row up to line {number} (blank ones, or a quote left "
                                "open?); expected one sooner")  # fmt: skip
        if faults.bytes_read - faults.row_at > self.most:
            self.read(0)

    def read(self, size: int) -> None:
        """Some bytes were read."""
        self.faults.bytes_read += size
        if self.faults.bytes_read - self.faults.row_at > self.most:
            raise self._refusal(f"{self.most >> 20} MiB without a row, unpacked from {self.size:,} bytes; expected one "
                                "sooner, or the file unpacked")  # fmt: skip

    def _refusal(self, found: str) -> UserError:
        faulty = [] if self.faults.skip else self.faults.shown()
        return UserError([*faulty, f"{self.file}: {found}"])


class _EightBit:
    """Decodes lines of an encoding that has ASCII's bytes for its letters, which is known from the first line on that
    has others."""

    def __init__(self, file: Path, faults: RowFaults, *, decided: bool):
        self.file, self.faults = file, faults
        self.encoding = "utf-8" if decided else None

    def decode(self, raw: bytes, stream: io.BufferedReader, number: int) -> tuple[str, str | None]:
        if raw.isascii():
            return raw.decode("ascii"), None
        if self.encoding is None:
            self.encoding = _eight_bit(raw, stream)
            _say_windows(self.file, self.faults, self.encoding, raw, number)
        try:
            return raw.decode(self.encoding), None
        except UnicodeDecodeError as error:
            return raw.decode(self.encoding, "replace"), _not_utf8(error)


def _not_utf8(error: UnicodeDecodeError) -> str:
    tried = "neither UTF-8 nor Windows-1252" if error.encoding == "charmap" else f"not {error.encoding.upper()}"
    return f"{tried} (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"


def _undecoded(line: str, encoding: str) -> str | None:
    if line.isascii() or not (bad := [letter for letter in line if "\udc80" <= letter <= "\udcff"]):
        return None
    return f"not {encoding.upper()} (byte 0x{ord(bad[0]) - 0xDC00:02x}); save the file as UTF-8"


def _marked_encoding(stream: io.BufferedReader) -> str | None:
    """The encoding that a file's first bytes tell; None for UTF-8 and its like without a mark."""
    head = stream.peek(4096)[:4096]
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    even, odd = (part.count(0) / max(1, len(part)) for part in (head[0::2], head[1::2]))
    if max(even, odd) > 0.3 and min(even, odd) < 0.05:
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def _eight_bit(begun: bytes, stream: io.BufferedReader) -> str:
    """UTF-8 or Windows-1252, by what is beyond ASCII in what was read and what comes next. UTF-8 hardly ever comes
    about by chance."""
    following = stream.peek(BLOCK)
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text = decoder.decode(begun + following, final=not following)
    bad = sum("\udc80" <= letter <= "\udcff" for letter in text if letter > "\x7f")
    good = sum(letter > "\x7f" for letter in text) - bad
    return "utf-8" if good >= bad else "cp1252"


def _say_windows(file: Path, faults: RowFaults, encoding: str, block: bytes, number: int) -> None:
    if encoding == "cp1252":
        place = next(index for index, byte in enumerate(block) if byte > 0x7F)
        line = number + block.count(b"\n", 0, place)
        found = f"line {line}, byte 0x{block[place]:02x}"
        cure = "where letters come out wrong, save it as UTF-8"
        faults.remark(f"{file}: not UTF-8 ({found}): read as Windows-1252; {cure}")


def open_bytes(file: Path) -> Any:
    """A file's bytes, unpacked where its ending says that it is packed."""
    return COMPRESSIONS.get(file.suffix.lower(), open)(file, "rb")


def _zstandard(file: Path, mode: str) -> BinaryIO:
    import pyarrow

    stream: BinaryIO = pyarrow.input_stream(str(file), compression="zstd")
    return stream


COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".zst": _zstandard, ".bz2": bz2.open, ".xz": lzma.open,
}  # fmt: skip


# What files of other kinds begin with, and what to do with one by a text file's name.
_OTHER_KINDS = {
    b"\x1f\x8b": "packed by gzip; rename it to {name}.gz",
    b"\x28\xb5\x2f\xfd": "packed by zstd; rename it to {name}.zst",
    b"BZh": "packed by bzip2; rename it to {name}.bz2",
    b"\xfd7zXZ": "packed by xz; rename it to {name}.xz",
    b"PK\x03\x04": "a spreadsheet or a .zip file; rename it to {stem}.xlsx, or unpack it",
    b"PAR1": "a Parquet file; rename it to {stem}.parquet",
    b"\xd0\xcf\x11\xe0": "an old Excel file; save it as .xlsx or .csv",
    b"%PDF": "a PDF file; save its text as .txt",
}


def _refuse_other_kinds(file: Path, head: bytes) -> None:
    for begin, told in _OTHER_KINDS.items():
        if head.startswith(begin):
            raise UserError(f"{file}: no text, but {told.format(name=file.name, stem=file.stem)}")


@contextmanager
def _reading(file: Path) -> Iterator[tuple[io.BufferedReader, list[int]]]:
    """A file's bytes and a place for the number of the line that was read last; faults of the disk and of the
    compressed form as one line."""
    place = [0]
    try:
        with open_bytes(file) as stream, io.BufferedReader(stream, BLOCK) as buffered:
            _refuse_other_kinds(file, buffered.peek(8)[:8])
            yield buffered, place
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of a decompressor: whatever it came upon
        packed = file.suffix.lower() in COMPRESSIONS
        if not packed and not isinstance(error, OSError):
            raise
        if not packed or getattr(error, "errno", None):
            raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        after = f" after line {place[0]}" if place[0] else ""
        cut = isinstance(error, EOFError) or "runcated" in str(error)
        reason = f"cut short{after}" if cut else f"not a {file.suffix.lower()} file, or broken{after} ({error})"
        raise UserError(f"{file}: {reason}; get the file again, whole") from error
