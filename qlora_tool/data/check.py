"""What can be said of data without a tokenizer, and so before anything heavy is imported.

A missing file, a broken row or a column that is not there is told within seconds. What is told here is what reading for
training tells: the same functions look at the rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.config.sources import DataSource, sources_of, told
from qlora_tool.data.columns import columns_there, find_layout
from qlora_tool.data.faults import RowFault, RowFaults
from qlora_tool.data.sources import source_parts
from qlora_tool.data.template import read_chat_template
from qlora_tool.data.tokenize import evaluation_sources, refuse_answers_of_text
from qlora_tool.errors import UserError
from qlora_tool.run_folder import RunFolder

if TYPE_CHECKING:
    from qlora_tool.config import DataConfig

SECONDS = 2.0  # spent on the rows of one source; what stands further behind is told when all of it is read
ROWS_AT_A_TIME = 500
HEAD = 100  # rows by which a format is found


def check_data(data: DataConfig, seconds: float | None = None) -> None:
    """Check what a run reads: its chat template, its training rows and its evaluation rows.

    Args:
        seconds: spent on the rows of one source; by default `SECONDS`.

    Raises:
        UserError: a line for every fault found.
        MachineError: the hub cannot be reached.
    """
    faults: list[str] = []
    if data.chat_template is not None:
        with _gathering(faults):
            read_chat_template(Path(data.chat_template))
    formats = set()
    for source in sources_of(data.train):
        with _gathering(faults):
            formats.add(_check(source, data, seconds))
    with _gathering(faults):
        if formats == {"text"}:
            refuse_answers_of_text(data, told(data.train))
    for sources in evaluation_sources(data).values():
        for source in sources_of(sources):
            with _gathering(faults):
                _check(source, data, seconds)
    if faults:
        raise UserError(list(dict.fromkeys(faults)))


def _check(source: DataSource, data: DataConfig, seconds: float | None) -> str:
    columns = data.columns if source.columns is None else source.columns
    skip = data.on_error == "skip"
    return check_source(source.path, source.format or data.format, columns, skip=skip, seconds=seconds)


def check_sources(
    sources: Iterable[str],
    data_format: str = "auto",
    *,
    need_answers: bool = True,
    run: str | os.PathLike[str] | None = None,
) -> None:
    """`check_source` of each, the faults of all told together.

    Args:
        run: what is to be asked about them. Where it is a run's folder, its `data.columns` are taken where they fit.
    """
    folder = None if run is None else RunFolder(Path(run))
    columns = folder.config().data.columns if folder is not None and folder.holds_run() else {}
    faults: list[str] = []
    for source in sources:
        with _gathering(faults):
            check_source(source, data_format, columns, need_answers=need_answers, strict=False)
    if faults:
        raise UserError(list(dict.fromkeys(faults)))


def check_source(
    source: str,
    data_format: str = "auto",
    columns: Mapping[str, str] | None = None,
    *,
    need_answers: bool = True,
    strict: bool = True,
    skip: bool = False,
    seconds: float | None = None,
) -> str:
    """Read the rows of a source, as many as can be read in a time, and turn them into conversations.

    Args:
        source: a file, a folder or a hub id.
        data_format, columns: how its rows are read; see `find_layout`.
        need_answers: whether the columns with the answers must be there.
        strict: whether `columns` must be there.
        skip: whether faulty rows are no matter.
        seconds: the time; by default `SECONDS`.

    Returns:
        The format.

    Raises:
        UserError: the source is missing or broken, or rows do not have the format.
        MachineError: the hub cannot be reached.
    """
    faults = RowFaults(skip=skip)
    ends = time.monotonic() + (SECONDS if seconds is None else seconds)
    found = ""
    for part in source_parts(source):
        rows = part.rows(faults)
        head = list(islice(rows, HEAD))
        faults.raise_any()  # what cannot be read is told before anything is said of columns
        if not head:
            continue
        wanted = columns or {}
        layout = find_layout(
            head, data_format, wanted if strict else columns_there(head, wanted), need_answers=need_answers
        )
        found = found or layout.format
        for number, row in enumerate(chain(head, rows)):
            try:
                layout.document(row) if layout.format == "text" else layout.conversation(row)
            except RowFault as fault:
                faults.add(row.where, fault)
            if number % ROWS_AT_A_TIME == 0 and number and time.monotonic() > ends:
                break
    faults.raise_any()
    return found


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
