"""Files that are read past the page cache, where the file system lets them be."""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path

from qlora_tool.errors import MachineError, UserError
from qlora_tool.sizes import counted

PAGE = 4096  # what direct reads start and end on, in the file and in memory


class DirectFile:
    """A file that is open for reads of pages.

    Args:
        file: its path.

    Attributes:
        direct: whether reads go past the page cache. Where not, what was read is dropped from there, if the system can.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, file: Path):
        self.file = file
        self._descriptor, self.direct = _opened(file)
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def close(self) -> None:
        """No more is read; otherwise once nothing refers to this."""
        self._close()

    def read_into(self, memory: memoryview, first: int, needed: int) -> int:
        """Fill memory from a byte on.

        Args:
            memory: whole pages, from where one begins.
            first: byte in the file, where a page begins.
            needed: bytes that the file must have from there on; what it has beyond, up to the end of memory, may come
                too.

        Returns:
            The bytes that were read.

        Raises:
            MachineError: the disk fails.
            UserError: the file ends early.
        """
        done = 0
        while done < needed:
            try:
                count = os.preadv(self._descriptor, [memory[done:]], first + done)
            except OSError as error:
                raise MachineError(f"{self.file}: cannot be read: {error.strerror}; the disk may be broken") from error
            if not count:
                raise UserError(
                    f"{self.file}: ends {counted(needed - done, 'byte')} early; remove it, and the next run makes it "
                    "anew"
                )
            done += count
        return done

    def drop(self, first: int, size: int) -> None:
        """Where reads go through the page cache: have it forget some bytes, which are not needed again before all
        others have been."""
        if not self.direct:
            with contextlib.suppress(OSError, AttributeError):
                os.posix_fadvise(self._descriptor, first, size, os.POSIX_FADV_DONTNEED)


def _opened(file: Path) -> tuple[int, bool]:
    """A file's descriptor, and whether reads go past the page cache."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(file, os.O_RDONLY | direct), bool(direct)
    except OSError as error:
        if error.errno != errno.EINVAL or not direct:  # a file system without it (tmpfs, say)
            raise
        return os.open(file, os.O_RDONLY), False
