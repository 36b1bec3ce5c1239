"""What readers give: rows with their places."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qlora_tool.data.faults import RowFault
from qlora_tool.data.names import is_known
from qlora_tool.errors import UserError, printable

MOST_COLUMNS = 10_000
LONGEST = 128 << 20  # bytes or characters of a line, and of what a packed file unpacks to without a row


@dataclass(frozen=True)
class Row:
    """One row of a data source: its columns, and where it stands (`FILE, line N`) for whoever must name it."""

    fields: dict[str, Any]
    where: str


def name_index(names: list[str]) -> list[str]:
    """The names of a table's columns, with pandas' names for first ones that have none: it writes its index so."""
    first = next((place for place, name in enumerate(names) if name.strip()), 0)
    return [f"Unnamed: {place}" if place < first else name for place, name in enumerate(names)]


def refuse_title(where: str, names: list[str], below: list[str]) -> None:
    """Refuse a title that stands where the names of a table's columns are expected.

    Args:
        where: the place of `names`.
        names: the first row that is not empty, by `name_index`.
        below: the next one.

    Raises:
        UserError: one cell of `names` is filled, with no known name, and several of the row below.
    """
    given = [name for place, name in enumerate(names) if name.strip() and name != f"Unnamed: {place}"]
    filled = sum(bool(cell.strip()) for cell in below)
    if len(given) == 1 and filled > 1 and not is_known(given[0]):
        raise UserError(
            f"{where}: one cell is filled ({printable(given[0].strip(), 60)}), and {filled} in the row below; it looks "
            "like a title: delete it, so that the names of the columns are in the first row"
        )


def fields_of(value: Any) -> dict[str, Any]:
    """The columns of a row as JSON has it. A list of turns by itself is the `messages` of its row; what the hub's
    viewer puts around a row (`row_idx`, `row`) is taken off.

    Raises:
        RowFault: the value is no row.
    """
    if isinstance(value, dict):
        wrapped = value.get("row")
        return wrapped if isinstance(wrapped, dict) and "row_idx" in value else value
    if isinstance(value, list) and value and all(is_turn(turn) for turn in value):
        return {"messages": value}
    raise RowFault(f'{json_kind(value)}, expected an object such as {{"prompt": "…", "completion": "…"}}')


class Decoder:
    """JSON's, by the standard library, that does not let the last of two equal keys win.

    Attributes:
        twice: such a key in the value that was decoded last, else None.
    """

    def __init__(self) -> None:
        self.twice: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def decode(self, text: str) -> Any:
        """The value of a text.

        Raises:
            RowFault: a key stands twice in one of its objects.
        """
        self.twice = None
        value = self._decoder.decode(text)
        self.refuse_twice()
        return value

    def raw_decode(self, text: str, place: int) -> tuple[Any, int]:
        """The value that begins at a place, and where it ends; see `refuse_twice`."""
        self.twice = None
        return self._decoder.raw_decode(text, place)

    def refuse_twice(self) -> None:
        """
        Raises:
            RowFault: a key stood twice in one of the objects of the value that was decoded last.
        """
        if self.twice is not None:
            raise RowFault(twice(self.twice))

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            self.twice = next(name for name in names if names.count(name) > 1)
        return found


def twice(name: str) -> str:
    """What is said of a key that stands twice."""
    return f"the key '{name[:60]}' stands twice in one object; keep one"


def is_turn(value: Any) -> bool:
    """Whether a value of JSON looks like a turn of a conversation."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def json_kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    kinds = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


def not_json(error: json.JSONDecodeError) -> str:
    """What is said of text that is no JSON."""
    return f"not JSON ({error.msg}, column {error.colno})"
