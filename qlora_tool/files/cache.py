"""Where the project keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where the project keeps what it can make again: `$QLORA_TOOL_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("QLORA_TOOL_CACHE"):
        return Path(folder)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "qlora-tool"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlora-tool"
