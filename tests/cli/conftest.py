"""What every test of a command runs under."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Undo what a command sets for its process."""
    logger, environment = logging.getLogger("qlora_tool"), dict(os.environ)
    before = logger.handlers[:], logger.propagate, logger.level
    with warnings.catch_warnings():
        yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
    os.environ.clear()
    os.environ.update(environment)
