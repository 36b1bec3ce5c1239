"""JSON files, of one object a line (.jsonl, .ndjson) or of any other shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from qlora_tool.data.faults import RowFault, RowFaults
from qlora_tool.data.readers.json_values import read_values
from qlora_tool.data.readers.rows import Decoder, Row, fields_of, is_turn, not_json
from qlora_tool.data.readers.streams import Line, blocks, lines


def read_json_lines(file: Path, faults: RowFaults) -> Iterator[Row]:
    """A row a line; blank lines are none. A file whose values go over several lines is read as `read_json` does."""
    begun, decoder = False, Decoder()
    for line in lines(file, faults):
        if not line.text.strip():
            continue
        if not begun and (line.text.strip() in ("{", "[") or _is_list_of_rows(line.text)):
            yield from read_values(file, faults)
            return
        begun = True
        if row := _row(file, line, decoder, faults):
            yield row


def read_json(file: Path, faults: RowFaults) -> Iterator[Row]:
    """The rows of a .json file: a list, an object around one, or an object a line."""
    head = next(blocks(file, faults), "").lstrip()
    first, _, rest = head.partition("\n")
    yield from (read_json_lines if _is_object(first) and rest.strip() else read_values)(file, faults)


def _is_list_of_rows(line: str) -> bool:
    """Whether a first line is a whole list of rows; one of turns is a row."""
    if not line.lstrip().startswith("["):
        return False
    try:
        items = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(items) and all(isinstance(item, dict) and not is_turn(item) for item in items)


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _row(file: Path, line: Line, decoder: Decoder, faults: RowFaults) -> Row | None:
    """The row of a line; None where it is faulty, which `faults` is told."""
    where = f"{file}, line {line.number}"
    try:
        if line.fault:
            raise RowFault(line.fault)
        return Row(fields_of(decoder.decode(line.text)), where)
    except json.JSONDecodeError as error:
        faults.add(where, not_json(error))
    except RowFault as fault:
        faults.add(where, fault)
    except RecursionError:
        faults.add(where, "nested too deeply")
    except ValueError:  # Python's limit for what it makes a number of
        faults.add(where, "a number of more than 4,300 digits; put it in quotes")
    return None
