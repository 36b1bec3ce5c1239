"""Rows from .json, .jsonl, .csv, .parquet and .txt files, from a folder of them, or from the hub."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import json.decoder
import json.scanner
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tool.data.faults import RowFaults
from qlora_tool.errors import MachineError, UserError, did_you_mean
from qlora_tool.files.hashes import sha256

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class Row:
    """One row of a data source: its columns, and where it stands (`FILE, line N`) for whoever must name it."""

    fields: dict[str, Any]
    where: str


def read_rows(source: str) -> list[Row]:
    """All rows of a data source, in order.

    Args:
        source: a file; a folder, whose data files are read in the order of their names; or, where no such path
            exists, a hub id: `owner/name`, `owner/name:split` or `owner/name:configuration:split` (default: train).
            A .txt file is one row whose `text` is the whole file. A .json file is a list of objects, `{"data": [...]}`,
            or one object a line.

    Raises:
        UserError: nothing there, nothing in it, or rows that cannot be read (several are named at once).
        MachineError: the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if _looks_like_hub_id(source, path):
            return _hub_rows(source)
        raise UserError(_missing(source, path))
    return [row for file in source_files(source) for row in _file_rows(file)]


def source_files(source: str) -> list[Path]:
    """The files that a source on this machine consists of, sorted; none for a hub id."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return [path] if path.exists() else []
    inside = sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
    hidden = {file for file in inside if any(part.startswith(".") for part in file.relative_to(path).parts)}
    files = [file for file in inside if file.suffix.lower() in READERS and file.is_file() and file not in hidden]
    if not files:
        raise UserError(f"{source}: a folder without data files; expected {_kinds()} files in it")
    return files


def hashes(source: str, rows: list[Row]) -> dict[str, str]:
    """SHA-256 by file, of its bytes; for a hub id, of its rows as JSON lines."""
    if files := source_files(source):
        return {str(file): sha256(file) for file in files}
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode() + b"\n")
    return {source: digest.hexdigest()}


def _kinds() -> str:
    *most, last = READERS
    return f"{', '.join(most)} or {last}"


def _missing(source: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"{source}: no such file; there is no folder {path.parent} either"
    close = did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
    return f"{source}: no such file or folder{close or f' in {path.parent.absolute()}'}"


def _looks_like_hub_id(source: str, path: Path) -> bool:
    """Whether a source that is not a path can be meant as a hub id: not a file's name, not in a folder that exists, and
    not a misspelling of something in this folder."""
    if not HUB_ID.fullmatch(source) or path.suffix.lower() in READERS:
        return False
    if "/" in source:
        return not path.parent.is_dir()
    return not did_you_mean(source, (entry.name for entry in Path().iterdir()))


def _file_rows(file: Path) -> list[Row]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        kind = f"the unknown ending '{file.suffix}'" if file.suffix else "no ending"
        raise UserError(f"{file}: a data file with {kind}; expected {_kinds()}")
    try:
        rows = reader(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not rows:
        raise UserError(f"{file}: the file has no rows; expected at least one")
    return rows


def _text(file: Path) -> str:
    """A file's content. A byte order mark is left out, line ends stay as they are."""
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from error


def _json_kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    kinds = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not JSON ({error.msg}, column {error.colno})"


def _read_jsonl(file: Path) -> list[Row]:
    return _json_lines(file, _text(file))


def _json_lines(file: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    faults = RowFaults()
    # Split at line feeds alone: JSON strings may hold other characters that str.splitlines takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            _add_row(rows, faults, json.loads(line), where)
        except json.JSONDecodeError as error:
            faults.add(where, _not_json(error))
    faults.raise_any()
    return rows


def _add_row(rows: list[Row], faults: RowFaults, value: Any, where: str) -> None:
    if isinstance(value, dict):
        rows.append(Row(value, where))
    else:
        faults.add(where, f'{_json_kind(value)}, expected an object such as {{"prompt": "…", "completion": "…"}}')


def _read_json(file: Path) -> list[Row]:
    text = _text(file)
    if not text.strip():
        return []
    decoder = _LocatingDecoder()
    try:
        content = decoder.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _json_lines(file, text)
        raise UserError(f"{file}, line {error.lineno}: {_not_json(error)}") from error
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        keys = f" with the keys {', '.join(map(str, content))}" if isinstance(content, dict) else ""
        raise UserError(f'{file}: {_json_kind(content)}{keys}; expected a list of objects, or {{"data": [...]}}')
    rows: list[Row] = []
    faults, line, counted = RowFaults(), 1, 0
    for number, (position, item) in enumerate(zip(decoder.positions[id(items)], items, strict=True), start=1):
        line, counted = line + text.count("\n", counted, position), position
        _add_row(rows, faults, item, f"{file}, line {line} (row {number})")
    faults.raise_any()
    return rows


class _LocatingDecoder(json.JSONDecoder):
    """The standard decoder, which notes besides where the items of the outermost lists begin.

    Attributes:
        positions: by the id of a list, an offset for each of its items.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions: dict[int, list[int]] = {}
        # Around the items the module's scanner in Python, which calls `parse_array`; the items by that in C.
        self._scan_item: Callable[[str, int], tuple[Any, int]] = self.scan_once  # type: ignore[has-type]
        self.parse_array = self._parse_list
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _parse_list(self, text_and_start: tuple[str, int], _: Any) -> tuple[list[Any], int]:
        positions: list[int] = []

        def scan_item(text: str, position: int) -> tuple[Any, int]:
            positions.append(position)
            return self._scan_item(text, position)

        items, end = json.decoder.JSONArray(text_and_start, scan_item)  # type: ignore[attr-defined]
        self.positions[id(items)] = positions
        return items, end


def _read_csv(file: Path) -> list[Row]:
    """Rows by the names in the first line. Quoted cells may span lines; a row's line is the one it begins on."""
    csv.field_size_limit(1 << 30)  # the module's default refuses cells over 128 KiB
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    rows, faults = [], RowFaults()
    names: list[str] = []
    begin = 1
    try:
        for cells in reader:
            where, begin = f"{file}, line {begin}", reader.line_num + 1
            if not names:
                names = cells
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise UserError(f"{where}: the column '{twice[0]}' stands twice; give each a name of its own")
            elif cells and len(cells) != len(names):
                faults.add(where, f"{len(cells)} cells, expected {len(names)} ({', '.join(names)})")
            elif cells:
                rows.append(Row(dict(zip(names, cells, strict=True)), where))
    except csv.Error as error:
        faults.add(f"{file}, line {begin}", f"not CSV ({error})")
    faults.raise_any()
    return rows


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from error
    return [Row(fields, f"{file}, row {number}") for number, fields in enumerate(table.to_pylist(), start=1)]


def _read_txt(file: Path) -> list[Row]:
    text = _text(file)
    return [Row({"text": text}, str(file))] if text.strip() else []


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _hub_rows(source: str) -> list[Row]:
    import datasets
    import huggingface_hub

    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    configuration = rest[0] if len(rest) == 2 else None
    verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # its retries would be a dozen lines before our one
    try:
        rows = datasets.load_dataset(name, configuration, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{source}: no such file or folder, and no data set '{name}' on the hub") from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: {reason}; name a split as {name}:SPLIT or {name}:CONFIGURATION:SPLIT") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        raise MachineError(
            f"{source}: no such file or folder, and the hub cannot be reached ({reason}); "
            "go online, or download the data and name its file"
        ) from error
    finally:
        huggingface_hub.logging.set_verbosity(verbosity)
    if not len(rows):
        raise UserError(f"{source}: the split '{split}' has no rows; expected at least one")
    return [Row(dict(fields), f"{source}, row {number}") for number, fields in enumerate(rows, start=1)]
