"""The extras of the package, and the command that installs one into the environment that runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def install_command(extra: str) -> str:
    """What to type to install an extra of qlora-tool where this runs.

    An environment that pipx or uv keeps for the program is none that a plain `pip install` reaches.

    Args:
        extra: its name in pyproject.toml.
    """
    what = f"'qlora-tool[{extra}]'"
    if (Path(sys.prefix) / "pipx_metadata.json").exists():
        return f"pipx runpip {Path(sys.prefix).name} install {what}"
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {sys.prefix} {what}"
    return f"pip install {what}"
