"""Regular expressions that people write: valid, and done in time. Python's go back and forth over a name for as long as
they find another way to split it, for some expressions for years, and nothing stops one from outside.

So one in which repetitions stand in one another, or many one after the other, is tried first in a process of its own,
on names as long as modules have.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from typing import Any

SECONDS = 3.0  # of which names as they are take a thousandth
_MANY = 4  # repetitions one after the other
_NAMES = (
    "model.layers.31.self_attn.q_proj", "base_model.model.model.language_model.layers.31.mlp.experts.gate_up_proj",
    "a" * 64, "a." * 32, "layers.1" * 8, "1" * 48, "_" * 48,
)  # fmt: skip
_TRIAL = (
    "import json, re, sys\npattern, names = json.load(sys.stdin)\n"
    "for name in names:\n for end in ('', '!', '.'):\n"
    "  re.fullmatch(pattern, name + end); re.match('(.*\\\\.)?(' + pattern + ')$', name + end)\n"
)


def check_pattern(pattern: str) -> str:
    """A regular expression that may be used.

    Raises:
        ValueError: it is empty or none, or does not come to an end on the name of a module.
    """
    if not pattern.strip():
        raise ValueError
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if runs_away(pattern):
        raise ValueError(f"it is not done with a module's name after {SECONDS:g} seconds: repetitions in one "
                         "another, such as (a+)+, try every way to split it; write it without")  # fmt: skip
    return pattern


@cache
def runs_away(pattern: str) -> bool:
    """Whether a valid expression may take for ever on a module's name."""
    nested, count = _repetitions(_parsed(pattern))
    if not nested and count < _MANY:
        return False
    try:
        subprocess.run([sys.executable, "-I", "-S", "-c", _TRIAL], input=json.dumps([pattern, _NAMES]).encode(),
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return True
    except OSError:  # no process to be had: as it was before
        return False
    return False


def _parsed(pattern: str) -> Any:
    if sys.version_info >= (3, 11):
        from re import _parser  # type: ignore[attr-defined]  # the only reader of expressions that there is

        return _parser.parse(pattern)
    import sre_parse

    return sre_parse.parse(pattern)


def _repetitions(tree: Any, inside: bool = False) -> tuple[bool, int]:
    """Whether a repetition without an end stands in another one, and how many there are."""
    nested, count = False, 0
    for name, value in tree:
        repeats = str(name) in ("MAX_REPEAT", "MIN_REPEAT") and value[1] > 16
        count += repeats
        nested = nested or (repeats and inside)
        for part in _trees(value):
            one, more = _repetitions(part, inside or repeats)
            nested, count = nested or one, count + more
    return nested, count


def _trees(value: Any) -> list[Any]:
    """The expressions within a part of one."""
    if hasattr(value, "data"):
        return [value]
    return [tree for part in value for tree in _trees(part)] if isinstance(value, tuple | list) else []
