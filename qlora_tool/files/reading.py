"""The one way in which small files that people hand in are read: a regular file, of a bounded size, in UTF-8; JSON
that is what it should be, neither too deep nor with halves of characters. What is in it is for those to check who
know its keys.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from qlora_tool.errors import UserError

LARGEST = 256 << 20  # bytes: the largest tokenizer.json is a tenth of it
DEEPEST = 64  # lists and mappings in one another
_READ = (".json", ".jinja", ".txt", ".model", ".safetensors")  # of a model's folder


def is_regular(file: Path) -> bool:
    """Whether there is a file that ends: no folder, pipe, device, or link to such."""
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError):
        return False


def why_no_file(file: Path) -> str | None:
    """What is in the place of a file that is to be read, by its name; None where there is one that ends."""
    if is_regular(file):
        return None
    return f"{file.name} is {'no file' if os.path.lexists(file) else 'missing'}"


def refuse_other_than_file(file: Path, cure: str) -> os.stat_result:
    """Refuse what is no regular file, before it is opened: a pipe would wait for ever, a device has no end.

    Raises:
        UserError: naming what it is.
    """
    try:
        found = file.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{file}: cannot be read: {reason}; {cure}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{file}: {_kind(found.st_mode)}, where a file is expected; {cure}")
    return found


def refuse_odd_files(folder: Path, cure: str) -> None:
    """Refuse a folder in which a folder, a pipe or a device has the name of a file that is going to be read.

    Raises:
        UserError: naming it.
    """
    for file in folder.iterdir():
        if file.suffix in _READ:
            refuse_other_than_file(file, cure)


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_it, name in kinds if is_it(mode)), "a device")


def read_text(file: Path, cure: str, largest: int = LARGEST) -> str:
    """A small file's text.

    Args:
        cure: what to do about a broken one, for the end of a line.
        largest: how many bytes it may have.

    Raises:
        UserError: it is no file, cannot be read, is larger, or not in UTF-8.
    """
    size = refuse_other_than_file(file, cure).st_size
    if size > largest:
        raise UserError(f"{file}: {size:,} bytes, expected {largest:,} at most; {cure}")
    try:
        with file.open("rb") as stream:
            return stream.read(largest + 1).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}; {cure}") from error
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise UserError(f"{file}: byte {error.start} (0x{found:02x}) is not UTF-8; {cure}") from error


def json_value(text: str | bytes) -> Any:
    """What a text of JSON says. All that may come from elsewhere is read with it: of what is nested deeply Python's
    own makes a RecursionError, which nobody expects.

    Raises:
        JSONDecodeError: a ValueError; it is no JSON, nested too deeply, or has a number of too many digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("lists and objects in one another too deep", "", 0) from None
    except UnicodeDecodeError:
        raise
    except ValueError:
        raise json.JSONDecodeError("a number of too many digits", "", 0) from None


def read_json(file: Path, cure: str) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: as `read_text`; or it is not JSON, too deep, or holds halves of characters.
    """
    return parse_json(read_text(file, cure), str(file), cure)


def read_object(file: Path, cure: str) -> dict[str, Any]:
    """What a file with one JSON object holds.

    Raises:
        UserError: as `read_json`; or it is something else.
    """
    found = read_json(file, cure)
    if not isinstance(found, dict):
        raise UserError(f"{file}: {found_as(found)}, where a JSON object is expected; {cure}")
    return found


def found_as(value: Any) -> str:
    """What kind of JSON a value is, for a line."""
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "a truth value"}
    return kinds.get(type(value), "a number")


def why_no_path(text: str) -> str | None:
    """Why a text that a user gives cannot be a path, in words; None where it can."""
    if "\0" in text:
        return "has a NUL character, which no path has"
    return "is not UTF-8; rename what it names" if has_half(text) else None


def refuse_no_path(path: Path, named: str) -> None:
    """Refuse what can be no path, whatever lies there.

    Args:
        named: what a line calls it.

    Raises:
        UserError: it can be none.
    """
    if reason := why_no_path(str(path)):
        raise UserError(f"{named}: {str(path)!r} {reason}")


def is_inside(name: str) -> bool:
    """Whether a name that stands in a file leads to something in that file's folder, on every system."""
    if not name or len(name) > 255 or not name.isprintable() or "\\" in name or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def parse_json(text: str, name: str, cure: str) -> Any:
    """The same of a text.

    Args:
        name: of where it stands, for the line.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise UserError(f"{name}: lists and objects in one another more than {DEEPEST} deep; {cure}") from None
    except ValueError as error:  # a number of too many digits as well
        raise UserError(f"{name}: not JSON ({' '.join(str(error).split())}); {cure}") from error
    if is_deep(found):
        raise UserError(f"{name}: lists and objects in one another more than {DEEPEST} deep; {cure}")
    if "\\ud" in text or "\\uD" in text:
        half = next((part for part in texts_of(found) if has_half(part)), None)
        if half is not None:
            raise UserError(f"{name}: {half[:60]!r} holds half of a character (a lone surrogate); {cure}")
    return found


def is_deep(value: Any, deepest: int = DEEPEST) -> bool:
    """Whether lists and mappings lie in one another deeper than so."""
    level = [value]
    for _ in range(deepest + 1):
        level = [part for one in level if isinstance(one, dict | list)
                 for part in (one.values() if isinstance(one, dict) else one)
                 if isinstance(part, dict | list)]  # fmt: skip
        if not level:
            return False
    return True


def texts_of(value: Any) -> list[str]:
    """Every text in a value of JSON, names of keys too."""
    found, left = [], [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
    return found


def has_half(text: str) -> bool:
    """Whether a text holds a lone surrogate, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
