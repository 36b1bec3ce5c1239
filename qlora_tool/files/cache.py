"""Where the project keeps what it can make again."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_tool.errors import MachineError
from qlora_tool.files.atomic import disk_errors
from qlora_tool.files.sealed import read_sealed, write_sealed
from qlora_tool.once import log_once

logger = logging.getLogger(__name__)

CACHED = ("predictions", "bases", "demo", "products.json", "bandwidths.json", "cuda.json", "hashes.json",
          "packing.json", "datasets", "training_speeds.json")  # fmt: skip


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


def clear_cache() -> int:
    """Delete what this project cached; other files in the folder stay.

    Returns:
        The bytes that were deleted.

    Raises:
        MachineError: some of it cannot be deleted.
    """
    if cache_folder().exists() and not cache_folder().is_dir():
        raise MachineError(f"the cache {cache_folder()} is a file; set QLORA_TOOL_CACHE to a folder")
    with disk_errors(cache_folder()):
        return sum(_delete(cache_folder() / name) for name in CACHED)


def _delete(path: Path) -> int:
    """The bytes that a file, or the files of a folder, had; 0 where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        shutil.rmtree(path)
        return size
    size = path.lstat().st_size if path.is_file() else 0
    path.unlink(missing_ok=True)
    return size
