"""JSON files that are one value, or several one after the other: read an item at a time, in any of the usual shapes.

| shape                                            | rows                                           |
|--------------------------------------------------|------------------------------------------------|
| `[{…}, {…}]`                                     | its items                                      |
| `{"data": [{…}], "version": 1}`                  | the items of the one list of objects in it     |
| `{"question": ["a", "b"], "answer": ["c", "d"]}` | the columns side by side; also as pandas does  |
| `{"a17": {…}, "b03": {…}}`                       | its values, where all of them are objects      |
| `{…} {…}`                                        | each, on a line of its own or not              |
| `{"messages": […]}`                              | it, by itself                                  |

The values are the standard library's; what is here steps from one to the next, so that a list of gigabytes is read an
item at a time. Two libraries that do it were tried and read another JSON than programs write: ijson 3.6 refuses NaN and
long integers and makes `?` of half a surrogate pair, json-stream 2.5 misses a lacking comma and what follows the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_tool.data.faults import RowFault, RowFaults
from qlora_tool.data.names import is_known
from qlora_tool.data.readers.rows import Decoder, Row, fields_of, json_kind, not_json, twice
from qlora_tool.data.readers.streams import blocks
from qlora_tool.errors import UserError

# What a list of rows is called in an object around it. Such a list is read an item at a time.
LISTS = ("data", "rows", "train", "examples", "items", "instances", "samples", "records")
_NO_SPACE = re.compile(r"\S")


def read_values(file: Path, faults: RowFaults) -> Iterator[Row]:
    """The rows of a JSON file.

    Raises:
        UserError: the file is no JSON from some place on, or has none of the shapes above.
    """
    values = _Values(file, faults)
    first = values.peek()
    if first == "[":
        yield from _items(values, file, faults)
        values.expect_end()
    elif first == "{":
        yield from _objects(values, file, faults)
    elif first:
        value = values.next()
        values.expect_end()
        raise _unknown_shape(file, value)


def _items(values: _Values, file: Path, faults: RowFaults) -> Iterator[Row]:
    """The items of the list that comes next."""
    values.take("[")
    number = 0
    while values.peek() != "]":
        if number:
            values.take(",", "Expecting ',' delimiter")
        number += 1
        values.peek()
        where = f"{file}, line {values.line} (row {number})"
        try:
            yield Row(fields_of(values.next()), where)
        except RowFault as fault:
            faults.add(where, fault)
    values.take("]")


def _objects(values: _Values, file: Path, faults: RowFaults) -> Iterator[Row]:
    """The rows in an object, or in several one after the other."""
    where, content, read = f"{file}, line {values.line}", {}, ""
    values.take("{")
    while values.peek() != "}":
        if content:
            values.take(",", "Expecting ',' delimiter")
        name, line = _name(values), values.line
        if name in content and name != read:
            raise UserError(f"{file}, line {line}: {twice(name)}")
        if name in LISTS and values.peek() == "[" and values.begins_list_of_objects():
            if read:
                raise UserError(f"{file}, line {line}: a second list of rows, '{name}' beside '{read}'; keep one")
            read, content[name] = name, None
            yield from _items(values, file, faults)
        else:
            try:
                content[name] = values.next()
            except RowFault as fault:
                raise UserError(f"{file}, line {line}, in '{name}': {fault}") from fault
    values.take("}")
    if read:
        if others := [name for name, value in content.items() if _is_list_of(value, dict) and value]:
            faults.remark(f"{file}: of its lists of rows '{read}' is read, and not {', '.join(map(repr, others))}")
        values.expect_end()
    elif values.peek() == "{":
        yield Row(content, where)
        while values.peek():
            where = f"{file}, line {values.line}"
            try:
                yield Row(fields_of(values.next()), where)
            except RowFault as fault:
                faults.add(where, fault)
    else:
        values.expect_end()
        yield from _rows_of(content, where, file, faults)


def _name(values: _Values) -> str:
    if values.peek() != '"':
        raise values.fault("Expecting property name enclosed in double quotes")
    name: str = values.next()
    values.peek()
    values.take(":", "Expecting ':' delimiter")
    return name


def _rows_of(content: dict[str, Any], where: str, file: Path, faults: RowFaults) -> Iterator[Row]:
    """The rows of an object that is the whole file."""
    lists = [name for name, value in content.items() if _is_list_of(value, dict)]
    if content and any(is_known(name) for name in content):
        if all(_is_list_of(value, str, int, float, bool, None) for value in content.values()):
            yield from _side_by_side({name: list(value) for name, value in content.items()}, file)
        elif all(isinstance(value, dict) and all(key.isdecimal() for key in value) for value in content.values()):
            yield from _side_by_side({name: list(value.values()) for name, value in content.items()}, file)
        else:
            yield Row(content, where)
    elif len(lists) == 1 or (content and all(isinstance(value, dict) for value in content.values())):
        items = content[lists[0]] if lists else content.values()
        for number, item in enumerate(items, start=1):
            place = f"{file}, row {number}"
            try:
                yield Row(fields_of(item), place)
            except RowFault as fault:
                faults.add(place, fault)
    elif content.get("data") != []:
        raise _unknown_shape(file, content)


def _is_list_of(value: Any, *kinds: type | None) -> bool:
    types = tuple(type(None) if kind is None else kind for kind in kinds)
    return isinstance(value, list) and bool(value) and all(isinstance(item, types) for item in value)


def _side_by_side(columns: dict[str, list[Any]], file: Path) -> Iterator[Row]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise UserError(f"{file}: columns of different lengths ({told}); expected a value of each for every row")
    for number, cells in enumerate(zip(*columns.values(), strict=True), start=1):
        yield Row(dict(zip(columns, cells, strict=True)), f"{file}, row {number}")


def _unknown_shape(file: Path, content: Any) -> UserError:
    keys = f" with the keys {', '.join(map(str, content))}" if isinstance(content, dict) else ""
    return UserError(f'{file}: {json_kind(content)}{keys}; expected a list of objects, or {{"data": [...]}}')


class _Values:
    """JSON values out of a stream of text, one at a time.

    Attributes:
        line: the line of the place that is read next.
    """

    def __init__(self, file: Path, faults: RowFaults):
        self.file = file
        self.blocks = blocks(file, faults)
        self.decoder = Decoder()
        self.text, self.place = "", 0
        self.line, self.counted = 1, 0  # lines are counted up to here in `text`
        self.line_begins = 0  # in `text`; below zero where that was let go

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            if found := _NO_SPACE.search(self.text, self.place):
                self.place = found.start()
                self._count()
                return found.group()
            self.place = len(self.text)
            if not self._more():
                return ""

    def take(self, expected: str, message: str = "Expecting value") -> None:
        """Go past a character that has to come next."""
        if self.peek() != expected:
            raise self.fault(message)
        self.place += 1

    def next(self) -> Any:
        """The value that comes next.

        Raises:
            RowFault: a key stands twice in it.
        """
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
                if end < len(self.text) or not self._more():
                    self.place = end
                    self.decoder.refuse_twice()
                    return value
            except json.JSONDecodeError as error:
                # Only where the text may go on: a fault far from its end is one whatever follows.
                within = len(self.text) - error.pos > 12 and not error.msg.startswith("Unterminated string")
                if within or not self._more():
                    raise self.fault(error.msg, error.pos) from error
            except RecursionError as error:
                raise UserError(f"{self.file}, line {self.line}: nested too deeply") from error
            except ValueError as error:  # Python's limit for what it makes a number of
                raise UserError(f"{self.file}, line {self.line}: a number of more than 4,300 digits; put it in "
                                "quotes") from error  # fmt: skip

    def begins_list_of_objects(self) -> bool:
        """Whether the list that comes next has an object, or a list, for its first item."""
        place = self.place
        while True:
            rest = self.text[place + 1 :].lstrip()
            if rest:
                return rest[0] in "{["
            if not self._more():
                return False
            place = self.place

    def expect_end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise self.fault("Extra data")

    def fault(self, message: str, place: int | None = None) -> UserError:
        """That what stands here (or at `place`) is no JSON."""
        self.place = len(self.text) if place is None and not self.peek() else self.place if place is None else place
        self._count()
        error = json.JSONDecodeError(message, "", 0)
        error.colno = self.place - self.line_begins + 1
        return UserError(f"{self.file}, line {self.line}: {not_json(error)}")

    def _more(self) -> bool:
        """Read on, as much again as is waiting, so that a long value is not tried for every block of it."""
        self._count()
        blocks, wanted = [], len(self.text) - self.place
        while wanted >= 0 and (block := next(self.blocks, "")):
            blocks.append(block)
            wanted -= len(block)
        if not blocks:
            return False
        self.line_begins -= self.place
        self.text, self.place, self.counted = "".join([self.text[self.place :], *blocks]), 0, 0
        return True

    def _count(self) -> None:
        found = self.text.count("\n", self.counted, self.place)
        if found:
            self.line += found
            self.line_begins = self.text.rindex("\n", self.counted, self.place) + 1
        self.counted = self.place
