"""Lines of the log that a process writes once, however often their reason comes up."""

from __future__ import annotations

import functools
import logging


@functools.cache
def log_once(logger: logging.Logger, level: int, line: str) -> None:
    """Log a line, unless this process has logged the same one already."""
    logger.log(level, line)
