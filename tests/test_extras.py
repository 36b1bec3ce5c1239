"""What to type to install an extra depends on who made the environment."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from qlora_tool.extras import install_command


@pytest.mark.parametrize(
    ("made_by", "line"),
    [
        ("venv", "pip install 'qlora-tool[gguf]'"),
        ("uv", "uv pip install --python {prefix} 'qlora-tool[gguf]'"),
        ("pipx", "pipx runpip qlora-tool install 'qlora-tool[gguf]'"),
    ],
)
def test_the_command_fits_the_environment(made_by: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prefix = tmp_path / "qlora-tool"
    prefix.mkdir()
    monkeypatch.setattr(sys, "prefix", str(prefix))
    # uv's environments have no pip; pipx's borrow one, or have none, and hold a file of pipx's.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if made_by == "venv" else None)
    if made_by == "pipx":
        (prefix / "pipx_metadata.json").write_text("{}")
    assert install_command("gguf") == line.format(prefix=prefix)
