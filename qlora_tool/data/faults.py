"""Faulty rows, gathered so that one run of the tool shows several of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from qlora_tool.errors import UserError, did_you_mean

FAULTS_SHOWN = 5


class RowFault(Exception):
    """What is wrong with one row, without its place: whoever reads the rows adds that."""


@dataclass
class RowFaults:
    """The faulty rows of one pass over the data, each a line `FILE, line N: what is wrong`."""

    lines: list[str] = field(default_factory=list)

    def add(self, where: str, message: object) -> None:
        self.lines.append(f"{where}: {message}")

    def raise_any(self) -> None:
        """Raise the first few together as a `UserError` that says how many more there are."""
        if not self.lines:
            return
        shown = self.lines[:FAULTS_SHOWN]
        if more := len(self.lines) - len(shown):
            shown.append(f"and {more} more faulty row{'s' if more > 1 else ''}")
        raise UserError(shown)


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
