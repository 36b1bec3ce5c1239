"""Measurements of a machine, kept in the cache for a while by what they hold for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

from qlora_tool.files.cache import read_cached, write_cached

Measured = TypeVar("Measured")

VALID, VALID_IF_DOUBTFUL = timedelta(days=28), timedelta(hours=1)


def read_measured(file: Path, from_json: Callable[[Any], Measured]) -> dict[str, Measured]:
    """By what each holds for; what is none, or not as it was written, is left out.

    Args:
        file: that `write_measured` wrote.
        from_json: makes one of them; raises ValueError, KeyError, TypeError or AttributeError where it is none.
    """
    found = {}
    for machine, data in read_cached(file).items():
        try:
            found[machine] = from_json(data)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def write_measured(file: Path, found: Mapping[str, Any]) -> None:
    """Write dataclasses, by what each holds for; where the cache cannot be written that is said once."""
    write_cached(file, {machine: asdict(one) for machine, one in found.items()})


def today() -> str:
    """This moment, ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def check_date(date: str) -> None:
    """
    Raises:
        ValueError, TypeError: it is none that `today` gave.
    """
    if datetime.fromisoformat(date).tzinfo is None:
        raise ValueError(f"{date}: no time zone")


def expired(date: str, doubtful: bool) -> bool:
    """Whether what was measured then is to be measured again, after an hour where there was reason to doubt it."""
    age = datetime.now(timezone.utc) - datetime.fromisoformat(date)
    return not timedelta(0) <= age < (VALID_IF_DOUBTFUL if doubtful else VALID)
