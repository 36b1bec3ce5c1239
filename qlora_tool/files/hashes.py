"""SHA-256 of large files, computed once: a file of the same size and times of change is not read again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qlora_tool.files.cache import cache_folder, read_cached, write_cached
from qlora_tool.files.digest import sha256


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of config.json and of every weights file, by file name."""
    paths = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    return {path.name: found for path, found in kept_hashes(paths).items()}


def kept_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """The SHA-256 of each file, kept in the cache by its path, size and times of change."""
    kept, hashes, changed = _kept(), {}, False
    for path in paths:
        key = _key(path)
        if key not in kept:
            kept[key], changed = sha256(path), True
        hashes[path] = kept[key]
    if changed:
        write_cached(_kept_file(), kept)
    return hashes


def kept_hash(path: Path) -> str | None:
    """The SHA-256 of a file where the cache has it, else None: the file is not read."""
    return _kept().get(_key(path))


def _kept_file() -> Path:
    return cache_folder() / "hashes.json"


def _kept() -> dict[str, str]:
    return {key: digest for key, digest in read_cached(_kept_file()).items()
            if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)}  # fmt: skip


def _key(path: Path) -> str:
    stat = path.resolve().stat()
    # The second time is the file system's own, which no copying sets back (on Windows it is that of creation).
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
