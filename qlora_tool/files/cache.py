"""Where the project keeps what it can make again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qlora_tool.files.atomic import disk_errors

CACHED = ("predictions", "bases", "demo", "products.json", "cuda.json", "hashes.json")


def cache_folder() -> Path:
    """Where the project keeps what it can make again: `$QLORA_TOOL_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("QLORA_TOOL_CACHE"):
        return Path(folder)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "qlora-tool"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlora-tool"


def clear_cache() -> int:
    """Delete what this project cached; other files in the folder stay.

    Returns:
        The bytes that were deleted.

    Raises:
        MachineError: some of it cannot be deleted.
    """
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
