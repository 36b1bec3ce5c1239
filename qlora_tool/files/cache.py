"""Where the project keeps what it can make again."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tool.errors import MachineError
from qlora_tool.files.atomic import disk_errors
from qlora_tool.files.sealed import read_sealed, write_sealed
from qlora_tool.once import log_once

logger = logging.getLogger(__name__)

TORCHS = "torchinductor"  # which torch makes, and fills as it likes
_TORCH_NEEDS = 1 << 20  # bytes free, to make its folders
_FILES = r"(products|bandwidths|cuda|hashes|packing|training_speeds)\.json"
_FOLDERS = {
    "predictions": (r"[a-z]+-[0-9a-f]{24}\.json",),
    "datasets": (r"[0-9a-f]{32}", r"examples\.arrow|numbers\.npz|meta\.json"),
    "bases": (r"[0-9a-f]{24}-[\w-]+-\d+|calibrated-[0-9a-f]{32}",
              r"model\.safetensors|(hashes|manifest)\.json|adapter_start\.bin"),
    "demo": (r"SmolLM2-135M-Instruct", r"[a-z_]+\.(json|safetensors|jinja|txt)|README\.md"),
}  # fmt: skip
"""What is written here, by the names of each level: all else is a user's, and stays."""
_ON_THE_WAY = re.compile(r"\.(.+)\.(\w+-\d+-\d+\.(tmp|previous)|lock)")  # to its name; see `atomic` and `lock`


def cache_folder() -> Path:
    """Where the project keeps what it can make again: `$QLORA_TOOL_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("QLORA_TOOL_CACHE"):
        return Path(folder)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "qlora-tool"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlora-tool"


def write_cached(file: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON into the cache; where that cannot be done only time is lost, which is said once."""
    with telling_unwritable():
        write_sealed(file, value)


def read_cached(file: Path) -> dict[str, Any]:
    """The object that `write_cached` wrote. What is not as it was written counts as empty, which is said."""
    if not os.path.lexists(file):
        return {}
    try:
        return read_sealed(file)
    except (OSError, ValueError) as error:
        log_once(logger, logging.WARNING, f"{file}: not as it was written ({' '.join(str(error).split())}); what it "
                                          "kept is made again")  # fmt: skip
        return {}


def place_torchs_cache() -> None:
    """Let torch, once it is imported, make its cache in this one, not in the folder of temporary files; where this one
    cannot be written, or is nearly full, torch keeps its own place."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no home, or the current folder is gone
        folder = cache_folder().absolute()
        above = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
        if above.is_dir() and os.access(above, os.W_OK | os.X_OK) and shutil.disk_usage(above).free > _TORCH_NEEDS:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / TORCHS))


def lacking_room(needed: int) -> str:
    """Why a quantized base of so many bytes cannot be put into the cache, and what to do; empty where it can."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return (f"the cache {folder} cannot be written ({error.strerror}); set QLORA_TOOL_CACHE to a folder that you "
                "may write to")  # fmt: skip
    if needed <= free:
        return ""
    return (f"the quantized base takes {needed / 1e6:,.1f} MB in {folder}, and {free / 1e6:,.1f} MB are free there; "
            "free some, or set QLORA_TOOL_CACHE to a folder on another disk")  # fmt: skip


def tell_unwritable(error: Exception) -> None:
    """Say once that the cache cannot be written, and that it costs no more than time."""
    if cache_folder() not in _told:
        _told.add(cache_folder())
        _warn(cache_folder(), " ".join(str(error).split()))


@contextlib.contextmanager
def telling_unwritable() -> Iterator[None]:
    """What is put into the cache inside is as good as not there where that cannot be done, which is said."""
    try:
        yield
    except (OSError, MachineError) as error:
        tell_unwritable(error)


_told: set[Path] = set()


def _warn(folder: Path, reason: str) -> None:
    logger.warning("the cache %s cannot be written, so that what it would save time for is done again in every run; "
                   "set QLORA_TOOL_CACHE to a folder that you may write to (%s)", folder, reason)  # fmt: skip


@dataclass(frozen=True)
class Cleared:
    """What became of the cache.

    Attributes:
        nbytes: that were deleted.
        left: files and links that lie where this project caches, and that it did not write.
    """

    nbytes: int
    left: list[Path]


def clear_cache() -> Cleared:
    """Delete what this project cached; other files stay.

    Raises:
        MachineError: some of it cannot be deleted.
    """
    root, nbytes = cache_folder(), 0
    left: list[Path] = []
    if root.exists() and not root.is_dir():
        raise MachineError(f"the cache {root} is a file; set QLORA_TOOL_CACHE to a folder")
    with disk_errors(root):
        for path in list(root.iterdir()) if root.exists() else ():
            if path.name in (*_FOLDERS, TORCHS) and path.is_dir() and not path.is_symlink():
                found = _clear_folder(path)
                nbytes, left = nbytes + found.nbytes, left + found.left
            elif path.name in _FOLDERS:
                left.append(path)
            elif is_written(path):
                nbytes += _delete(path)
    return Cleared(nbytes, left)


def is_written(path: Path) -> bool:
    """Whether something in the cache has the place and the name of what this project writes, and is no link or pipe."""
    names = [found[1] if (found := _ON_THE_WAY.fullmatch(name)) else name
             for name in path.relative_to(cache_folder()).parts]  # fmt: skip
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return False
    if names[0] == TORCHS or len(names) == 1:
        return names[0] in (*_FOLDERS, TORCHS) or re.fullmatch(_FILES, names[0]) is not None
    levels = _FOLDERS[names[0]]
    return len(names) <= len(levels) + 1 and all(map(re.fullmatch, levels, names[1:]))


def forget(folder: Path) -> None:
    """Delete what this project wrote of a folder in the cache, as far as that can be done."""
    with contextlib.suppress(OSError):
        _clear_folder(folder)


def _clear_folder(top: Path) -> Cleared:
    nbytes, left = 0, []
    for name, folders, files in os.walk(top, topdown=False):
        for path in (Path(name, file) for file in sorted(files)):
            if is_written(path):
                nbytes += _delete(path)
            else:
                left.append(path)
        left += [Path(name, folder) for folder in folders if os.path.islink(Path(name, folder))]
        if is_written(Path(name)):
            with contextlib.suppress(OSError):  # something is left in it
                os.rmdir(name)
    return Cleared(nbytes, left)


def _delete(file: Path) -> int:
    """The bytes that it had."""
    size = file.lstat().st_size
    file.unlink(missing_ok=True)
    return size
