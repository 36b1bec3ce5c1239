"""The environment of processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def child_environment(first: Path = CHECKOUT, **values: object) -> dict[str, str]:
    """This process's, where a folder's modules come before all others; packages may come from `PYTHONPATH` too."""
    path = os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in values.items()}}
