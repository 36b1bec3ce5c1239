"""What every test runs under: a cache of its own, and no hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is cached during the tests in a folder that goes away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_TOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("torchinductor")))
        yield


@pytest.fixture(autouse=True)
def lines_are_said_anew() -> None:
    """What a process says once, each test may hear."""
    from qlora_tool.once import log_once

    log_once.cache_clear()


@pytest.fixture(autouse=True)
def logs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command says of logging ends before the next test, whichever test or fixture called it; and a slow machine
    sees no more lines than a fast one."""
    from qlora_tool import terminal
    from qlora_tool.terminal import drawn

    monkeypatch.setattr(terminal, "SHOWN_FROM", 3600.0)
    monkeypatch.setattr(terminal, "WAIT_SHOWN_FROM", 3600.0)
    log = logging.getLogger("qlora_tool")
    log.handlers, log.propagate, drawn.quiet = [], True, False
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat base and two runs on it, of a few steps each; see `write_two_runs`. Tests read it, and write elsewhere."""
    from tiny_adapters import write_two_runs

    return write_two_runs(tmp_path_factory.mktemp("runs"))
