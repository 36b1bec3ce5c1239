"""What the project logs goes to stderr, a plain line each; what libraries chatter about does not."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from qlora_tool.errors import printable


def log_to_stderr(level: int = logging.INFO) -> None:
    """Show the project's own log from a level on; keep the libraries to their errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("qlora_tool")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own lines about when it starts and stops
    warnings.filterwarnings("ignore", category=FutureWarning)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return text if record.levelno < logging.WARNING else f"warning: {text}"
