"""Faulty rows, gathered so that one run of the tool shows several of them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.sizes import counted

FAULTS_SHOWN = 5


class RowFault(Exception):
    """What is wrong with one row, without its place: whoever reads the rows adds that."""


@dataclass
class RowFaults:
    """The faulty rows of one pass over the data, each a line `FILE, line N: what is wrong`, and what else is to say.

    Attributes:
        skip: whether faulty rows are left out and counted (`data.on_error: skip`), not raised.
        lines: the first few of them.
        count: how many there are.
        remarks: what the user should know of files that were read all the same, a line each.
        bytes_read: of files of text, unpacked.
        row_at: how many of them had been read when the last row was made.
    """

    skip: bool = False
    lines: list[str] = field(default_factory=list)
    count: int = 0
    remarks: list[str] = field(default_factory=list)
    bytes_read: int = 0
    row_at: int = 0

    def add(self, where: str, message: object) -> None:
        """Note a faulty row."""
        self.count += 1
        if len(self.lines) < FAULTS_SHOWN:
            self.lines.append(f"{where}: {message}")

    def take(self, other: RowFaults) -> None:
        """Take over the faulty rows of `other`, which has none afterwards."""
        self.lines = [*self.lines, *other.lines][:FAULTS_SHOWN]
        self.count += other.count
        other.lines, other.count = [], 0

    def remark(self, line: str) -> None:
        """Note something that is no fault, once."""
        if line not in self.remarks:
            self.remarks.append(line)

    def raise_any(self) -> None:
        """Raise the first few together as a `UserError` that says how many more there are; nothing where they are
        skipped."""
        if self.lines and not self.skip:
            raise UserError(self.shown())

    def shown(self) -> list[str]:
        """The first few, and how many more there are."""
        more = self.count - len(self.lines)
        files = list(dict.fromkeys(_place(line)[0] for line in self.lines))
        lines = sorted(self.lines, key=lambda line: (files.index(_place(line)[0]), _place(line)[1]))
        return [*lines, *([f"and {counted(more, 'more faulty row')}"] if more else [])]


def _place(line: str) -> tuple[str, int]:
    """The file of a line, and which line or row of it. They may have been found out of order: some when the file was
    read, and some later."""
    found = re.match(r"(.*?), (?:line|row) (\d+)", line)
    return (found[1], int(found[2])) if found else (line, 0)


def kind_of(value: Any) -> str:
    """A value that was not expected, for a fault: its type and how it begins."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:39] + '…'}"


def hint(found: Iterable[str], expected: Collection[str]) -> str:
    """The closest expected name for the first found one that looks misspelt."""
    for name in found:
        if name not in expected and (close := did_you_mean(name, expected)):
            return f"; '{name}' is not read{close}"
    return ""
