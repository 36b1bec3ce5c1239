"""What a table of another tool's keys is made of: each key of theirs, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class NotTaken(Exception):
    """A value that has no counterpart here; its text says why."""


class NotDone(NotTaken):
    """A value that asks for another kind of training: nothing is made of the file."""


@dataclass
class Given:
    """What a file holds.

    Attributes:
        values: its keys, sections flattened, those included that it leaves at the other tool's defaults.
        left: what is not taken over: the key, its value, and why.
    """

    values: Mapping[str, Any]
    left: list[tuple[str, Any, str]] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """A value; None where there is none."""
        return self.values.get(key)

    def leave(self, key: str, value: Any, why: str) -> None:
        """Note what is not taken over."""
        self.left.append((key, value, why))


Convert = Callable[[Any, Given], Any]
OMIT = object()
"""What a conversion gives where a value asks for nothing, or for what happens anyway."""


@dataclass(frozen=True)
class Taken:
    """A key that has a counterpart.

    Attributes:
        ours: its name here, as `section.key`.
        convert: from their value to ours, or OMIT; raises NotTaken. None: it is the same.
        how: how values turn, for the page of keys; empty where they are the same.
    """

    ours: str
    convert: Convert | None = None
    how: str = ""


@dataclass(frozen=True)
class Left:
    """A key that has none.

    Attributes:
        why: what happens here instead.
        neutral: values beside null that ask for nothing, and are passed over.
        refused: whether any other asks for another kind of training, so that nothing is made of the file.
    """

    why: str
    neutral: tuple[Any, ...] = (False, "", 0)
    refused: bool = False


@dataclass(frozen=True)
class Format:
    """The configurations of another tool.

    Attributes:
        name: the tool's.
        marks: keys by which its files are told from others'.
        keys: what becomes of each key.
        defaults: what it takes for keys that a file leaves out, where that changes numbers and is not our default; a
            function makes it of the keys that are there.
        sections: mappings in its files whose keys count as the file's own.
        calls: functions and classes whose arguments are its keys, in a program.
    """

    name: str
    marks: frozenset[str]
    keys: Mapping[str, Taken | Left]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
