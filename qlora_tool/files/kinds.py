"""What a path is, by its name and first bytes: for a line on a wrong thing in a place, before anything heavy loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

DATA_ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".xlsx", ".parquet", ".arrow", ".txt")
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_LARGEST_JSON = 4 << 20  # bytes
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEB = re.compile(r"https?://", re.IGNORECASE)
_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")


def kind_of(name: str) -> str:
    """One of: web, missing, data, gguf, weights, pickle, model's json, adapter's json, yaml, file; of folders: run,
    adapter, model, ggufs, empty, folder."""
    if _WEB.match(name):
        return "web"
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _of_folder(path)
        return _of_file(path) if path.is_file() else "missing"
    except (OSError, ValueError):  # a name that cannot be one
        return "missing"


def hub_id(address: str) -> str:
    """The model that a page of the hub is of, as `owner/name`; empty for other addresses."""
    found = _HUB.match(address)
    return found[1] if found else ""


def _of_folder(path: Path) -> str:
    for file, kind in (("config.yaml", "run"), ("adapter_config.json", "adapter"), ("config.json", "model")):
        if (path / file).exists():
            return kind
    if any(path.glob("*.gguf")):
        return "ggufs"
    return "folder" if any(path.iterdir()) else "empty"


def _of_file(path: Path) -> str:
    with path.open("rb") as stream:
        start = stream.read(9)
    if start.startswith(b"GGUF") or path.suffix == ".gguf":
        return "gguf"
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return "weights"
    if path.suffix in _PICKLES:
        return "pickle"
    named = Path(path.stem) if path.suffix in _PACKED else path
    if named.suffix.lower() in DATA_ENDINGS:
        return "data"
    if path.suffix == ".json":
        return _of_json(path)
    return "yaml" if path.suffix in (".yaml", ".yml") else "file"


def _of_json(path: Path) -> str:
    """Whether it is the config.json of a model, the adapter_config.json of an adapter, or another file."""
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST_JSON else None
    except (ValueError, RecursionError):
        content = None
    kinds = {"model_type": "model's json", "architectures": "model's json", "peft_type": "adapter's json"}
    return next((kind for key, kind in kinds.items() if isinstance(content, dict) and key in content), "file")
