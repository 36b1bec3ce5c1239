"""Where data come from: one source, or a list of several that are mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from qlora_tool.choices import DataFormat
from qlora_tool.errors import did_you_mean
from qlora_tool.files.reading import why_no_path
from qlora_tool.methods.keys import MOST, to_number

# What a column of a file may be read as; see `data.formats`.
COLUMNS = (
    "prompt", "completion", "system", "messages", "conversations", "instruction", "input", "output", "context",
    "response", "text", "tools",
)  # fmt: skip
_KEYS = ("path", "weight", "rows", "repeat", "format", "columns")
_SHARES = ("weight", "rows", "repeat")
MOST_ROWS, MOST_TIMES = 10**8, 10**4  # rows that a file may give, and times that each may come


@dataclass(frozen=True)
class DataSource:
    """One entry of `data.train` or `data.eval`.

    Attributes:
        path: a file, a folder or a hub id.
        weight: its rows to those of the other entries.
        rows: how many of its rows are taken.
        repeat: how often each of its rows is taken.
        format: how its rows are read; None: as `data.format` says.
        columns: its columns, as in `data.columns`; None: as that says.
    """

    path: str
    weight: float | None = None
    rows: int | None = None
    repeat: float | None = None
    format: str | None = None
    columns: Mapping[str, str] | None = field(default=None)

    def __str__(self) -> str:
        share = next((f" ({key} {getattr(self, key):g})" for key in _SHARES if getattr(self, key) is not None), "")
        return f"{self.path}{share}"


def sources_of(value: str | Sequence[Any]) -> list[DataSource]:
    """The sources that `data.train` or `data.eval` names, in order."""
    entries = [value] if isinstance(value, str) else value
    return [DataSource(entry) if isinstance(entry, str) else DataSource(**entry) for entry in entries]


def told(value: str | Sequence[Any]) -> str:
    """The sources in words: `a.jsonl (weight 2), b.csv (weight 1)`."""
    return ", ".join(map(str, sources_of(value)))


def check_sources(entries: list[Any]) -> list[Any]:
    """The entries of a list of sources, each a path or a checked mapping.

    Raises:
        ValueError: an entry is neither, or some contradict one another.
    """
    checked = [_check_entry(f"entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    weighted = ["weight" in entry if isinstance(entry, dict) else False for entry in checked]
    if any(weighted) and not all(weighted):
        one, other = weighted.index(True) + 1, weighted.index(False) + 1
        raise ValueError(f"entry {one} has a weight and entry {other} has none; give each one, or none")
    if any(weighted) and not any(entry["weight"] for entry in checked):
        raise ValueError("every weight is 0, so that nothing is left; give one above 0")
    return checked


def _check_entry(name: str, entry: Any) -> Any:
    if isinstance(entry, str):
        return _path(name, entry)
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is neither a path nor a mapping such as {{path: a.jsonl, weight: 2}}")
    for key in entry:
        if key not in _KEYS:
            close = did_you_mean(str(key), _KEYS) or f"; expected {', '.join(_KEYS)}"
            raise ValueError(f"{name} has the unknown key '{key}'{close}")
    if "path" not in entry:
        raise ValueError(f"{name} has no path")
    entry = {key: to_number(value) if key in _SHARES else value for key, value in entry.items() if value is not None}
    shares = [key for key in _SHARES if key in entry]
    if len(shares) > 1:
        raise ValueError(f"{name} has {' and '.join(shares)}; give one of them")
    for key in shares:
        _check_share(f"{name}: {key}", key, entry[key])
    formats = get_args(DataFormat)
    if "format" in entry and entry["format"] not in formats:
        close = did_you_mean(str(entry["format"]), formats)
        raise ValueError(f"{name}: format is '{entry['format']}', expected one of {', '.join(formats)}{close}")
    if "columns" in entry:
        try:
            check_columns(entry["columns"])
        except ValueError as error:
            raise ValueError(f"{name}: columns: {error}") from error
    return {**entry, "path": _path(name, entry["path"])}


def _path(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: the path is {value!r}, expected a file, a folder or a hub id")
    if reason := why_no_path(value):
        raise ValueError(f"{name}: the path {value!r} {reason}")
    return str(Path(value).expanduser()) if value.startswith("~/") else value


def _check_share(name: str, key: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "rows" and not (is_number and isinstance(value, int) and 1 <= value <= MOST_ROWS):
        raise ValueError(f"{name} is {_shown(value)}, expected a whole number from 1 to {MOST_ROWS:,}")
    if key == "weight" and not (is_number and 0 <= value <= MOST):
        raise ValueError(f"{name} is {_shown(value)}, expected a number of at least 0, {MOST:,} at most")
    if key == "repeat" and not (is_number and 0 < value <= MOST_TIMES):
        raise ValueError(f"{name} is {_shown(value)}, expected a number above 0, {MOST_TIMES:,} at most")


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}…"


def check_columns(value: Any) -> Any:
    """Names of columns by what they are read as.

    Raises:
        ValueError: something else.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{value!r}, expected a mapping such as {{prompt: question, completion: reply}}")
    for ours, theirs in value.items():
        if ours not in COLUMNS:
            close = did_you_mean(str(ours), COLUMNS) or f"; expected {', '.join(COLUMNS)}"
            raise ValueError(f"unknown key '{ours}'{close}")
        if not isinstance(theirs, str) or not theirs.strip():
            raise ValueError(f"{ours} is {theirs!r}, expected the name of a column")
    return value
