"""What the project logs goes to stderr, a plain line each; what libraries chatter about does not."""

from __future__ import annotations

import logging
import os
import time
import warnings

import click

from qlora_tool.errors import printable
from qlora_tool.terminal import drawn


def log_to_stderr(level: int = logging.INFO) -> None:
    """Show the project's own log from a level on; keep the libraries to their errors.

    Args:
        level: where the command line says nothing: with `--quiet` it is that of warnings at least, and `--verbose`
            shows all there is, each line with the time since the command began.
    """
    context = click.get_current_context(silent=True)
    said = {} if context is None else context.meta
    quiet, verbose = said.get("qlora_tool.quiet"), said.get("qlora_tool.verbose")
    if quiet:
        level = max(level, logging.WARNING)
    elif verbose and level <= logging.INFO:
        level = logging.DEBUG
    drawn.quiet = level > logging.INFO
    handler = _Handler()
    handler.setFormatter(_Formatter(time.time() if verbose else None))
    logger = logging.getLogger("qlora_tool")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own lines about when it starts and stops
    warnings.filterwarnings("ignore", category=FutureWarning)


class _Handler(logging.Handler):
    """Lines that stay, above the one that is drawn over."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            drawn.stay(self.format(record))
        except Exception:  # as logging's own handlers do
            self.handleError(record)


class _Formatter(logging.Formatter):
    def __init__(self, began: float | None):
        super().__init__()
        self.began = began

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        text = text if record.levelno < logging.WARNING else f"warning: {text}"
        return text if self.began is None else f"[{record.created - self.began:6.1f} s] {text}"
