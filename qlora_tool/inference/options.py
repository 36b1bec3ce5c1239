"""Options of `generate` and of those that take `--adapter`, as far as they are told without opening anything: nothing
heavy is imported for it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_tool.config.places import refuse_unopenable
from qlora_tool.errors import OptionError, UserError, did_you_mean_path

AnyPath = str | os.PathLike[str]
Adapters = Sequence[str] | Mapping[str, AnyPath]
BASE = "base"  # the name by which the base answers beside its adapters


@dataclass(frozen=True)
class Given:
    """An adapter as an option names it: NAME=FOLDER, or NAME=FOLDER:WEIGHT."""

    name: str
    folder: str
    weight: float | None = None


def as_options(adapter: Adapters) -> list[str]:
    """Adapters as `--adapter` takes them."""
    if isinstance(adapter, Mapping):
        return [f"{name}={os.fspath(folder)}" for name, folder in adapter.items()]
    return [adapter] if isinstance(adapter, str) else list(adapter)


def parse_adapters(given: Sequence[str]) -> list[Given]:
    """What `--adapter` was given; a folder whose own name ends in a colon and a number is that folder.

    Raises:
        OptionError: not NAME=FOLDER, two of one name, or a weight that is no number or 0.
    """
    found: list[Given] = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            cure = "" if equals else f", such as --adapter {_name_of(text)}={text}"
            raise OptionError(f"--adapter {text}: expected NAME=FOLDER{cure}")
        if name in (one.name for one in found):
            raise OptionError(f"--adapter: two adapters are called {name!r}; name them apart")
        if name == BASE:
            raise OptionError(f"--adapter {text}: {BASE!r} is the name of the model without an adapter; choose another")
        path, colon, number = folder.rpartition(":")
        weight = _number(number) if colon and not Path(folder).exists() else None
        if weight is not None and (not math.isfinite(weight) or weight == 0):
            raise OptionError(f"--adapter {text}: expected a weight that is a finite number and not 0, found {number}")
        found.append(Given(name, folder if weight is None else path, weight))
    return found


def _name_of(folder: str) -> str:
    """What an adapter in a folder may be called: as the folder, or as its run's."""
    path = Path(folder.partition(":")[0])
    return (path.parent.name if path.name == "adapter" else path.name) or "NAME"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def checked_adapters(given: Adapters, weighted: bool = False) -> list[Given]:
    """`parse_adapters`, of folders that are there.

    Args:
        weighted: whether adapters may have weights.

    Raises:
        UserError: as there, or a weight where none is taken, or no such folder, or a run that is not finished.
    """
    parsed = parse_adapters(as_options(given))
    if not weighted and (heavy := next((one for one in parsed if one.weight is not None), None)):
        raise OptionError(
            f"--adapter {heavy.name}={heavy.folder}:{heavy.weight:g}: adapters answer one at a time here, without "
            "weights; export-merged adds them up"
        )
    for one in parsed:
        path = Path(one.folder).expanduser()
        if not path.is_dir():
            siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
            missing = "a file" if path.exists() else f"no such folder{did_you_mean_path(Path(one.folder), siblings)}"
            missing = "a base, not an adapter" if one.folder == "demo" else missing
            raise UserError(f"--adapter {one.name}={one.folder}: {missing}; expected a run's folder or an adapter's")
        refuse_unopenable(path)
    return parsed


def refuse_together(
    chat: bool, texts: Sequence[str], file: str | None, adapter: Adapters, compare_base: bool, system: str | None
) -> None:
    """Refuse options of `generate` that do not go together, and adapters that are none.

    Raises:
        UserError: nothing to ask, or something beside a chat; or see `checked_adapters`.
    """
    beside = [name for name, given in {"--prompt": texts, "--prompts": file, "--adapter": adapter,
                                       "--compare-base": compare_base}.items() if given]  # fmt: skip
    if chat and beside:
        raise OptionError(f"--chat talks with one model, and {' and '.join(beside)} cannot go with it: leave one of "
                          "the two out")  # fmt: skip
    if not chat and not texts and file is None:
        raise OptionError("nothing to answer: give --prompt TEXT or --prompts FILE, or --chat")
    if not all(text.strip() for text in texts if isinstance(text, str)):
        raise OptionError("--prompt: expected a text, found an empty one")
    if system is not None and not system.strip():
        raise OptionError("--system: expected a text, found an empty one")
    checked_adapters(adapter)
