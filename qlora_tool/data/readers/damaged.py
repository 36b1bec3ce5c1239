"""What libraries raise while they decode a file, as one line.

They are written for whole files: on a damaged one they raise whatever the place that broke raises, from `struct.error`
to `IndexError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from qlora_tool.errors import ToolError, UserError

T = TypeVar("T")


@contextmanager
def decoding(file: Path, found: str, cure: str) -> Iterator[None]:
    """Nothing but a library's work on a file may stand inside.

    Args:
        found: what a file is that it cannot decode: `not a Parquet file`.
        cure: what to do about it, for the end of the line.

    Raises:
        UserError: it raised something.
    """
    try:
        yield
    except ToolError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the disk's
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: {found} ({reason}); {cure}") from error


def decoded(items: Iterable[T], file: Path, found: str, cure: str) -> Iterator[T]:
    """What a library decodes, one after the other; see `decoding`."""
    with decoding(file, found, cure):
        yield from items
