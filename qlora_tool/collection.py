"""Python's search for garbage in cycles, left out where there is none to find."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage is searched for meanwhile: where many objects are made that stay, each search goes through all of them
    (a seventh of a second, with PyTorch and transformers imported)."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()
