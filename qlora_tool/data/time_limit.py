"""A limit to how long a piece of Python may run, in any thread and on any system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator


class TimeIsUp(BaseException):
    """The time is up. No `Exception`, so that the code that is stopped does not catch it as one of its own."""


class _Watch:
    """One thread for all limits of a process: starting one for each would take longer than what is timed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}  # by thread
        self.fired: set[int] = set()
        self.process: int | None = None  # threads do not live on in a forked process

    def begin(self, thread: int, seconds: float) -> None:
        with self.lock:
            if self.process != os.getpid():
                self.process, self.deadlines, self.fired = os.getpid(), {}, set()
                threading.Thread(target=self._run, name="time limit", daemon=True).start()
            self.deadlines[thread] = time.monotonic() + seconds

    def end(self, thread: int) -> None:
        with self.lock:
            self.deadlines.pop(thread, None)
            if thread in self.fired:
                self.fired.discard(thread)
                _raise_in(thread, None)  # what was done in the very last moment counts

    def _run(self) -> None:
        idle = 0
        while True:
            time.sleep(0.2)
            with self.lock:
                idle = 0 if self.deadlines else idle + 1
                if idle == 50:  # ten seconds: let the process be
                    self.process = None
                    return
                for thread, deadline in list(self.deadlines.items()):
                    if time.monotonic() > deadline:
                        del self.deadlines[thread]
                        self.fired.add(thread)
                        _raise_in(thread, TimeIsUp)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Let a thread raise at its next instruction; None takes that back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind) if kind else None)


_watch = _Watch()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop what runs inside after so many seconds. A long call into C is stopped when it returns. Limits do not nest.

    Raises:
        TimeIsUp: it took longer.
    """
    thread = threading.get_ident()
    _watch.begin(thread, seconds)
    try:
        yield
    finally:
        _watch.end(thread)
