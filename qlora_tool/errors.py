"""The two kinds of failure a user sees, each one clear line per fault.

`UserError`: what the user gave is at fault (exit code 2). `MachineError`: the machine is (exit code 1).
The command line prints each line of either after `error: ` and shows no traceback unless `--debug`.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i(?=b|$))?[a-z]*)?", re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


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
    """The configuration, an option, a data file or a model folder is at fault: exit code 2.

    Example:
        >>> from qlora_tool import UserError, preview
        >>> try:
        ...     preview("my-run.yaml", set={"data.max_lenght": 128})
        ... except UserError as error:
        ...     print(error.lines[0])
        --set data.max_lenght: unknown key; did you mean 'max_length'?
    """

    exit_code = 2


class AlreadyFinished(UserError):
    """The output folder holds the run that was asked for, and it is finished."""


class OptionError(UserError):
    """Options that contradict one another, or one that is missing; on the command line it points to `--help`."""


class MachineError(ToolError):
    """The disk, the device or the network is at fault, or the loss is not a number: exit code 1.

    Example:
        >>> from qlora_tool import MachineError
        >>> try:
        ...     raise MachineError("my-run: the disk is full; free 1.2 GB and run the same command again")
        ... except MachineError as error:
        ...     print(error.exit_code, *error.lines)
        1 my-run: the disk is full; free 1.2 GB and run the same command again
    """

    exit_code = 1


# Names that the valid ones are known by elsewhere, as `_plain` has them.
_ALSO_CALLED = {
    "gpu": "cuda", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "4bit": "nf4",
    "8bit": "int8",
}  # fmt: skip


def did_you_mean(name: str, valid: Iterable[str], given: str | None = None) -> str:
    """`; did you mean 'x'?` where a valid name is close to `name`, else an empty string.

    Args:
        given: as it was written, which is never suggested; None: `name`.
    """
    close = closest(name, valid, name if given is None else given)
    return f"; did you mean '{close}'?" if close else ""


def did_you_mean_path(path: Path, siblings: Iterable[str]) -> str:
    """The same of a path, as it is written, whose name is to be one of those that lie beside it."""
    close = closest(path.name, siblings, path.name)
    return f"; did you mean '{path.with_name(close)}'?" if close else ""


def looked_for(name: str) -> str:
    """`; looked for /home/me/base` for a path that is not written in full, which depends on the current folder, or on
    whose home it is; else an empty string."""
    path = os.path.abspath(os.path.expanduser(name))
    return "" if path == os.path.normpath(name) else f"; looked for {path}"


def closest(name: str, valid: Iterable[str], written: str) -> str | None:
    """The valid name that is meant, other than the one that was written; None where none is close."""
    others = [one for one in valid if one != written]
    plain = _plain(name)
    same = [one for one in others if plain and _plain(one) in (plain, _ALSO_CALLED.get(plain))]
    return next(iter(same or difflib.get_close_matches(name, others, n=1)), None)


def _plain(name: str) -> str:
    """A name without what is told apart by nobody who types it: case, and what joins its words."""
    return re.sub(r"[-_ .]", "", name.lower())


def meant_size(value: str | int) -> str:
    """`; did you mean 24GB?` for a size without its unit or with half of it, as `24` or `24G`; else an empty string."""
    found = _SIZE.fullmatch(str(value).strip())
    if found is None or isinstance(value, bool):
        return ""
    number, letter, binary = found.groups()
    if not float(number) or (letter is None and float(number) >= 1000):
        return ""
    return f"; did you mean {number}{(letter or 'G').upper()}{'iB' if binary else 'B'}?"


def meant_share(value: str | float) -> str:
    """`; did you mean 0.05?` for a share that is given in percent, as `5%` or 5; else an empty string."""
    percent = _PERCENT.fullmatch(value.strip()) if isinstance(value, str) else None
    number = float(percent[1]) if percent else value
    if isinstance(number, str | bool) or not (percent or number > 1):
        return ""
    return f"; did you mean {number / 100:g}?" if 0 < number < 100 else ""


LONGEST = 1500  # characters of a line that is shown


def printable(text: str, longest: int | None = None) -> str:
    r"""A text as it may stand on a terminal, in a log or on a page: what would move the cursor, turn the direction of
    writing or be no character is shown as its code (`\x1b`), and the middle of a very long one left out. Line ends and
    tabs stay.

    Args:
        longest: how many characters are shown at most; None: all.
    """
    if longest is not None and len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in "\n\t" or not _acts(letter) else _code(letter) for letter in text)


def _acts(letter: str) -> bool:
    category = unicodedata.category(letter)
    return category in ("Cc", "Cs") or letter in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029"


def _code(letter: str) -> str:
    number = ord(letter)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
