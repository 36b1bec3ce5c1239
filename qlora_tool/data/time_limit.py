"""A limit to how long a piece of Python may run, in any thread and on any system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator

_FRESH = 0.05  # seconds


class TimeIsUp(BaseException):
    """The time is up. No `Exception`, so that the code that is stopped does not catch it as one of its own."""


class TooMuch(TimeIsUp):
    """The process grew by more than it may meanwhile."""


class _Watch:
    """One thread for all limits of a process: starting one for each would take longer than what is timed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}  # by thread
        self.fired: set[int] = set()
        self.growth: dict[int, tuple[int, int]] = {}  # bytes, by thread: before, and how many more there may be
        self.held, self.asked = 0, 0.0  # bytes, and when they were asked for: reading them takes longer than most texts
        self.process: int | None = None  # threads do not live on in a forked process

    def begin(self, thread: int, seconds: float, memory: int) -> None:
        with self.lock:
            if self.process != os.getpid():
                self.process, self.deadlines, self.fired = os.getpid(), {}, set()
                self.growth, self.asked = {}, 0.0
                threading.Thread(target=self._run, name="time limit", daemon=True).start()
            self.deadlines[thread] = time.monotonic() + seconds
            if memory:
                if time.monotonic() - self.asked > _FRESH:
                    self._ask()
                self.growth[thread] = self.held, memory

    def end(self, thread: int) -> None:
        with self.lock:
            self.deadlines.pop(thread, None)
            self.growth.pop(thread, None)
            if thread in self.fired:
                self.fired.discard(thread)
                _raise_in(thread, None)  # what was done in the very last moment counts

    def _ask(self) -> None:
        self.held, self.asked = _held(), time.monotonic()

    def _run(self) -> None:
        idle = 0
        while True:
            time.sleep(0.2)
            with self.lock:
                idle = 0 if self.deadlines else idle + 1
                if idle == 50:  # ten seconds: let the process be
                    self.process = None
                    return
                if self.growth:
                    self._ask()
                for thread, deadline in list(self.deadlines.items()):
                    before, more = self.growth.get(thread, (0, 0))
                    grown = bool(more) and self.held - before > more
                    if grown or time.monotonic() > deadline:
                        del self.deadlines[thread]
                        self.growth.pop(thread, None)
                        self.fired.add(thread)
                        _raise_in(thread, TooMuch if grown else TimeIsUp)


def _held() -> int:
    """The bytes of memory that this process takes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Let a thread raise at its next instruction; None takes that back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind) if kind else None)


_watch = _Watch()


@contextlib.contextmanager
def time_limit(seconds: float, memory: int = 0) -> Iterator[None]:
    """Stop what runs inside after so many seconds. A long call into C is stopped when it returns. Limits do not nest.

    Args:
        memory: stop it too where the process takes so many bytes more than before; looked at a few times a second. 0:
            as many as it likes.

    Raises:
        TimeIsUp: it took longer.
        TooMuch: it took more memory.
    """
    thread = threading.get_ident()
    _watch.begin(thread, seconds, memory)
    try:
        yield
    finally:
        _watch.end(thread)
