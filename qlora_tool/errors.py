"""The two kinds of failure a user sees, each one clear line per fault.

`UserError`: what the user gave is at fault (exit code 2). `MachineError`: the machine is (exit code 1).
The command line prints each line of either after `error: ` and shows no traceback unless `--debug`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ToolError(Exception):
    """A failure that is reported by its lines, without a traceback.

    Args:
        lines: one fault, or several that were found together. Each says what was found, where, what was expected
            and what to do about it.

    Attributes:
        known_to_all: whether all processes of a run fail with it.
        told_elsewhere: whether another of them tells it.
    """

    exit_code = 1
    known_to_all = told_elsewhere = False

    def __init__(self, lines: str | Iterable[str]):
        self.lines = [lines] if isinstance(lines, str) else list(lines)
        super().__init__("\n".join(self.lines))


class UserError(ToolError):
    """The configuration, an option, a data file or a model folder is at fault: exit code 2."""

    exit_code = 2


class OptionError(UserError):
    """Options that contradict one another, or one that is missing; on the command line it points to `--help`."""


class MachineError(ToolError):
    """The disk, the device or the network is at fault, or the loss is not a number: exit code 1."""

    exit_code = 1


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a valid name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
