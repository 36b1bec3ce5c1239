"""What can be said of data without a tokenizer, and so before anything heavy is imported.

A missing file, a broken row or a column that is not there is told within seconds. What is told here is what reading for
training tells: the same functions look at the rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.data.faults import RowFaults
from qlora_tool.data.formats import find_format, read_conversations, read_documents
from qlora_tool.data.readers.rows import Row
from qlora_tool.data.sources import read_rows
from qlora_tool.data.template import read_chat_template
from qlora_tool.data.tokenize import evaluation_sources, refuse_answers_of_text
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from qlora_tool.config import DataConfig

SECONDS = 2.0  # spent on the rows of one source; what stands further behind is told when all of it is read
ROWS_AT_A_TIME = 500
HEAD = 100  # rows by which a format is found


def check_data(data: DataConfig) -> None:
    """Check what a run reads: its chat template, its training rows and its evaluation rows.

    Raises:
        UserError: a line for every fault found.
        MachineError: the hub cannot be reached.
    """
    faults: list[str] = []
    if data.chat_template is not None:
        with _gathering(faults):
            read_chat_template(Path(data.chat_template))
    with _gathering(faults):
        if check_source(data.train, data.format) == "text":
            refuse_answers_of_text(data, data.train)
    for source in evaluation_sources(data).values():
        with _gathering(faults):
            check_source(source, data.format)
    if faults:
        raise UserError(list(dict.fromkeys(faults)))


def check_sources(sources: Iterable[str], data_format: str = "auto", *, need_answers: bool = True) -> None:
    """`check_source` of each, the faults of all told together."""
    faults: list[str] = []
    for source in sources:
        with _gathering(faults):
            check_source(source, data_format, need_answers=need_answers)
    if faults:
        raise UserError(list(dict.fromkeys(faults)))


def check_source(source: str, data_format: str = "auto", *, need_answers: bool = True) -> str:
    """Read the rows of a source, as many as can be read in `SECONDS`, and turn them into conversations.

    Args:
        source: a file, a folder or a hub id.
        data_format: how its rows are read; see `find_format`.
        need_answers: whether the columns with the answers must be there.

    Returns:
        The format.

    Raises:
        UserError: the source is missing or broken, or rows do not have the format.
        MachineError: the hub cannot be reached.
    """
    faults = RowFaults()
    rows = iter(read_rows(source, faults))
    head = list(islice(rows, HEAD))
    if not head:
        faults.raise_any()
    form = find_format(head, data_format, need_answers=need_answers)
    started = time.monotonic()
    for some in _batches(chain(head, rows), ROWS_AT_A_TIME):
        if form == "text":
            read_documents(some)
        else:
            read_conversations(some, form, need_answers=need_answers)
        if time.monotonic() - started > SECONDS:
            break
    faults.raise_any()
    return form


def named_sources(sources: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """{name: source} of sources given as NAME=FILE, or as FILE, which is called by the file's name.

    Raises:
        UserError: two have one name.
    """
    named: dict[str, str] = {}
    for source in (os.fspath(source) for source in sources):
        name, equals, rest = source.partition("=")
        if not equals or Path(source).exists():
            name, rest = Path(source).stem or source, source
        if name in named:
            raise UserError(f"--data: two sets are called {name!r}; name them apart, as NAME=FILE")
        named[name] = rest
    return named


@contextmanager
def _gathering(faults: list[str]) -> Iterator[None]:
    """Add the lines of a user's mistake to `faults` and go on."""
    try:
        yield
    except UserError as error:
        faults += error.lines


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    rows = iter(rows)
    while some := list(islice(rows, size)):
        yield some
