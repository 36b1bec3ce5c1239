"""JSON that knows when a bit of it has changed, and lists of files with their hashes."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_tool.files.atomic import write_text
from qlora_tool.files.digest import sha256
from qlora_tool.files.reading import LARGEST, why_no_file
from qlora_tool.sizes import counted

_KEY, _BLANK = "sha256", "0" * 64


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON whose last key, `sha256`, is the hash of the file with zeros in its place.

    Raises:
        MachineError: the disk refuses.
    """
    text = json.dumps({**value, _KEY: _BLANK}, indent=2, ensure_ascii=False) + "\n"
    text = text.encode("utf-8", "backslashreplace").decode()  # of a path that is not UTF-8: as JSON escapes it
    write_text(path, _with_hash(text, _BLANK, hashlib.sha256(text.encode()).hexdigest()))


def read_sealed(path: Path) -> dict[str, Any]:
    """The object, without its hash.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or a bit of it has changed.
    """
    if reason := why_no_file(path):
        raise ValueError(reason)
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path.name} has {size:,} bytes, and {LARGEST:,} at most were written")
    content = path.read_bytes()
    try:
        value: dict[str, Any] = json.loads(content.decode())
    except RecursionError:
        raise ValueError(f"{path.name} has lists and objects in one another too deep") from None
    found = value.pop(_KEY, None) if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise ValueError(f"{path.name} has no {_KEY} of its own")
    if hashlib.sha256(_with_hash(content.decode(), found, _BLANK).encode()).hexdigest() != found:
        raise ValueError(f"{path.name} is not as it was written: its own SHA-256 is another")
    return value


def _with_hash(text: str, old: str, new: str) -> str:
    head, _, tail = text.rpartition(old)
    return head + new + tail


def listing(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """The bytes and SHA-256 of files in a folder, by their names; of all of them where none are named."""
    chosen = sorted(path.name for path in folder.iterdir() if path.is_file()) if names is None else names
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in chosen}


def first_change(folder: Path, files: Mapping[str, Any]) -> str | None:
    """The first file of a listing that is not as it was listed, in words; None where all are. Each is read once, a
    piece at a time."""
    for name, listed in files.items():
        if Path(name).name != name or not isinstance(listed, dict):
            return f"its list of files has {name!r}"
        try:
            found = (folder / name).stat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no file"
            if found.st_size != listed.get("bytes"):
                return f"{name} has {counted(found.st_size, 'byte')}, and had {listed.get('bytes')}"
            digest = sha256(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if digest != listed.get("sha256"):
            return f"{name} is not as it was written: its SHA-256 is {digest[:12]}…, and was " \
                f"{str(listed.get('sha256'))[:12]}…"  # fmt: skip
    return None
