"""SHA-256 of large files, computed once: a file of the same size and time of change is not read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from qlora_tool.files.cache import cache_folder, write_cached


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of config.json and of every weights file, by file name."""
    paths = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    return {path.name: found for path, found in kept_hashes(paths).items()}


def kept_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """The SHA-256 of each file, kept in the cache by its path, size and time of change."""
    kept_file = cache_folder() / "hashes.json"
    try:
        kept = dict(json.loads(kept_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        kept = {}  # nothing cached yet, or unreadable
    hashes, changed = {}, False
    for path in paths:
        stat = path.resolve().stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in kept:
            kept[key], changed = sha256(path), True
        hashes[path] = kept[key]
    if changed:
        write_cached(kept_file, kept)
    return hashes


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
