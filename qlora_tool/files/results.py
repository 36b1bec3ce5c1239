"""Files that options name for results to be written into: an earlier result of the same kind is replaced, nothing else.

What a user points at is often a slip away from what a command reads: the data, the configuration, the model's files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tool.errors import UserError
from qlora_tool.files.atomic import refuse_no_folder
from qlora_tool.files.reading import LARGEST, is_deep, refuse_no_path, refuse_other_than_file

AnyPath = str | os.PathLike[str]
_HEAD = 4096  # bytes of a page or a picture in which its mark stands


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Attributes:
        wrote: what writes it, for a line.
        is_one: whether the text of a file is one.
        own: names that such a file has where it belongs to a folder, with a file that marks that folder.
    """

    wrote: str
    is_one: Callable[[bytes], bool]
    own: tuple[tuple[str, str], ...] = ()

    def made(self, file: Path) -> bool:
        """Whether a regular file is an earlier result of this kind; an empty one will do, as nothing is lost."""
        size = file.stat().st_size
        return not size or (size <= LARGEST and self.is_one(file.read_bytes()))

    def belongs(self, file: Path) -> bool:
        """Whether it is one of a folder's own files."""
        return any(file.name == name and (file.parent / beside).exists() for name, beside in self.own)


def _with_keys(*keys: str, levels: int = 0) -> Callable[[bytes], bool]:
    """Whether it is a JSON object that has these keys, or one of such objects by their names."""

    def fits(value: Any, levels: int) -> bool:
        if not isinstance(value, dict) or not value:
            return False
        return value.keys() >= {*keys} or (levels > 0 and all(fits(one, levels - 1) for one in value.values()))

    return lambda content: fits(_parsed(content), levels)


def _lines_with_keys(*keys: str) -> Callable[[bytes], bool]:
    has_keys = _with_keys(*keys)
    return lambda content: all(map(has_keys, content.splitlines()))


def _marked(mark: str) -> Callable[[bytes], bool]:
    return lambda content: mark.encode() in content[:_HEAD]


def _parsed(content: bytes) -> Any:
    if not content.lstrip().startswith(b"{"):
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return None if is_deep(found) else found


MARKS = {name: f"qlora-tool {name}" for name in ("report", "profile-memory", "inspect")}
"""What pages name as their generator, and pictures as their software."""

_RUN, _EXPORT = "config.yaml", "qlora_tool.json"
ANSWERS = Kind("generate --json", _lines_with_keys("prompt", "answer", "finish_reason"))
SCORES = Kind("evaluate --json", _with_keys("loss", "perplexity", "tokens", levels=2))
PREVIEW = Kind("preview --json", _with_keys("rows", "counts", "eval"))
MEMORY = Kind("profile-memory --json", _with_keys("schema", "device", "predicted", "measured"),
              (("memory.json", _RUN),))  # fmt: skip
UPDATES = Kind("inspect --json", _with_keys("schema", "adapter", "kept_by_rank", "modules"))
EXPORTED = Kind("export-merged --json", _with_keys("output_dir", "format", "files"), (("export.json", _EXPORT),))
PAGE = Kind("report --output", _marked(MARKS["report"]), (("report.html", _RUN),))
MEMORY_PLOT = Kind("profile-memory --plot", _marked(MARKS["profile-memory"]))
UPDATES_PLOT = Kind("inspect --plot", _marked(MARKS["inspect"]))


@dataclass(frozen=True)
class Read:
    """What a command reads or writes besides, by what a line calls it; what is no path is passed over.

    Attributes:
        whole: files, and folders all of whose files are read, such as data.
        parts: folders that may hold results as well: a model, an adapter, a run.
    """

    whole: Mapping[str, AnyPath | None] = field(default_factory=dict)
    parts: Mapping[str, AnyPath | None] = field(default_factory=dict)

    def and_file(self, option: str, file: Path | None) -> Read:
        """The same, and a file that another option names."""
        return Read({**self.whole, f"the file of {option}": file}, self.parts)


def new_file(option: str, file: AnyPath | None, kind: Kind, read: Read) -> Path | None:
    """The file that an option names for a result, where it may be written; None where it names none.

    Args:
        option: as the user writes it.

    Raises:
        UserError: its folder is not there, the command reads it, or what is there is no earlier result of its kind.
    """
    if file is None:
        return None
    path = Path(file).expanduser()
    refuse_no_path(path, option)
    refuse_no_folder(path)
    place, whole, parts = path.resolve(), _places(read.whole), _places(read.parts)
    for name, other in (whole | parts).items():
        if place == other or (path.exists() and other.is_file() and path.samefile(other)):
            raise UserError(f"{option} {path}: is {name}, too; name another file")
    if not path.exists():
        return path
    refuse_other_than_file(path, f"name another for {option}")
    if kind.belongs(place):
        raise UserError(f"{option} {path}: belongs to the folder that it lies in; name another file")
    of_data = _holder(place, whole)
    if kind.made(path) and not of_data:
        return path
    holder = of_data or _holder(place, parts)
    cure = f"but lies in {holder}; name another file" if holder else \
        "which alone is replaced; remove it first, or name another file"  # fmt: skip
    raise UserError(f"{option} {path}: exists, and is no earlier result of {kind.wrote}, {cure}")


def _places(named: Mapping[str, AnyPath | None]) -> dict[str, Path]:
    return {name: Path(path).expanduser().resolve() for name, path in named.items() if path is not None}


def _holder(place: Path, folders: Mapping[str, Path]) -> str | None:
    """What holds a file, in words."""
    return next((name for name, folder in folders.items() if folder in place.parents), None)
