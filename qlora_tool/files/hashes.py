"""SHA-256 of a base's files, computed once: a file of the same size and time of change is not read again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qlora_tool.files.cache import cache_folder, write_cached


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of config.json and of every weights file, by file name."""
    kept_file = cache_folder() / "hashes.json"
    try:
        kept = dict(json.loads(kept_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        kept = {}  # nothing cached yet, or unreadable
    hashes, changed = {}, False
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        stat = path.resolve().stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in kept:
            kept[key], changed = sha256(path), True
        hashes[path.name] = kept[key]
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
