"""Predictions that another process makes while this one makes others."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

from qlora_tool.collection import without_collection
from qlora_tool.errors import MachineError, ToolError
from qlora_tool.workers import Workers

T = TypeVar("T")

_workers: Workers | None = None


def call(function: Callable[..., T], *arguments: Any) -> T:
    """What the other processes do."""
    with without_collection():
        return function(*arguments)


@contextmanager
def helped_by(workers: Workers | None) -> Iterator[None]:
    """These make what is begun with `Meanwhile` within.

    Args:
        workers: that call `call`; None, or none: each thing is made here once it is asked for.
    """
    global _workers
    before, _workers = _workers, workers
    try:
        yield
    finally:
        _workers = before


class Meanwhile(Generic[T]):
    """What a function gives, begun by another process where there is one.

    Args:
        function, arguments: that can be pickled; where they cannot, it is made here.
    """

    def __init__(self, function: Callable[..., T], *arguments: Any):
        self._work = function, arguments
        self._future: Future[T] | None = None
        if _workers is not None and _workers.count:
            with suppress(pickle.PicklingError, TypeError, AttributeError):  # a model's own code, as it may be
                self._future = _workers.submit(function, *arguments)

    def let_go(self) -> None:
        """It will hardly be asked for: others may be made before it."""
        if self._future is not None:
            self._future.cancel()

    def result(self) -> T:
        """What it gave; made here where no other process has begun with it, or where one failed: so that errors are
        this process's own."""
        if self._future is not None and not self._future.cancel():
            with suppress(MachineError, ToolError):
                return self._future.result()
        function, arguments = self._work
        return function(*arguments)
