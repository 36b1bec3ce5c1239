"""Ctrl-C, SIGTERM and SIGHUP end a run after the step at hand, saved; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(Exception):
    """The run was asked to stop, and did, its state saved.

    Args:
        signal_number: what asked.
        lines: how to go on, for the user.
        told_elsewhere: whether another process of the run tells it.

    Example:
        >>> import signal
        >>> from qlora_tool import Interrupted
        >>> stopped = Interrupted(signal.SIGTERM, ["to go on, run the same command again"])
        >>> stopped.exit_code, stopped.lines
        (143, ['to go on, run the same command again'])
    """

    known_to_all = True  # processes of a run stop after the same step

    def __init__(self, signal_number: int, lines: list[str], told_elsewhere: bool = False):
        self.signal_number, self.lines, self.told_elsewhere = signal_number, lines, told_elsewhere
        super().__init__("\n".join(lines))

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number


class StopRequest:
    """Notes the first SIGINT, SIGTERM or SIGHUP while it is active; one that is ignored (nohup) stays so."""

    def __init__(self):
        self.signal_number: int | None = None
        self._previous = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
        self.signal_number = number

    def __exit__(self, _type: type | None, _value: BaseException | None, _traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
