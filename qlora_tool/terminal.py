"""What goes on, on stderr: one line that is drawn over and leaves nothing behind, or plain lines without a terminal.

Whoever works for long opens `progress` around it and says how far it is, or `waiting` where nothing tells that. What
takes less than two seconds shows nothing.
Lines that are to stay go through `stay`, which keeps them apart from the one that is drawn over. No codes of terminals
are written, but the return to the line's begin, so that all terminals do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

SHOWN_FROM, DRAWN_EVERY, SAID_EVERY = 2.0, 0.1, 10.0
"""Seconds: before them nothing is shown; between two drawings on a terminal; between two plain lines."""
WAIT_SHOWN_FROM = 0.5
"""Seconds, where the command that was typed begins with a wait."""
_BAR = 20  # characters
_NARROW = 60  # columns; on fewer there is no bar


class Drawn:
    """One line at a time that is drawn over: the last opened of those that are open.

    Attributes:
        quiet: nothing is drawn, nor said by `progress` and `waiting`.
    """

    def __init__(self) -> None:
        self.quiet = False
        self._hushed = False
        self._open: list[Callable[[int], str]] = []
        self._columns = 0  # that are written on now
        self._writing = threading.RLock()  # whoever waits draws from a thread of its own

    @property
    def is_terminal(self) -> bool:
        """Whether stderr is one on which a line can be drawn over."""
        try:
            return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        except ValueError:  # closed
            return False

    @contextlib.contextmanager
    def line(self, text: Callable[[int], str]) -> Iterator[None]:
        """A line on the terminal, taken away in the end.

        Args:
            text: gives it for so many columns; longer ones are cut.
        """
        with self._writing:
            self._open.append(text)
        try:
            yield
        finally:
            with self._writing:
                self._open.remove(text)
                self.draw()

    @contextlib.contextmanager
    def hushed(self) -> Iterator[None]:
        """What begins meanwhile shows nothing: it is not what the person who waits has asked for."""
        before, self._hushed = self._hushed, True
        try:
            yield
        finally:
            self._hushed = before

    @property
    def shows(self) -> bool:
        """Whether what begins now is to be shown."""
        return not (self.quiet or self._hushed)

    def draw(self) -> None:
        """Draw the open line as it is now; without one, take away what was drawn."""
        with self._writing:
            self._draw()

    def _draw(self) -> None:
        if not self.is_terminal:
            self._columns = 0
            return
        columns = _columns()
        text = "" if self.quiet or not self._open else _cut(self._open[-1](columns - 1), columns - 1)
        width = _width(text)
        if not text and not self._columns:
            return
        _write(f"\r{text}{' ' * (min(self._columns, columns - 1) - width)}" + ("" if text else "\r"))
        self._columns = width

    def stay(self, text: str) -> None:
        """A line that stays, above the one that is drawn over."""
        with self._writing:
            if self._columns and self.is_terminal:
                _write("\r" + " " * self._columns + "\r")
                self._columns = 0
            _write(text + "\n")
            if self._open:
                self._draw()


drawn = Drawn()
"""Of this process."""


class Bar:
    """How far something is: `what`, done of `total` units; shown unless `silent`."""

    def __init__(self, what: str, total: float, unit: str, silent: bool):
        self.what, self.total, self.unit, self.silent, self.done = what, total, unit, silent, 0.0
        self.began = self._last = time.monotonic()
        self.said = False

    def advance(self, by: float = 1) -> None:
        """So many more are done."""
        self.reach(self.done + by)

    def reach(self, done: float) -> None:
        """So many are done in all."""
        self.done, now = done, time.monotonic()
        if self.silent or now - self.began < SHOWN_FROM:
            return
        terminal = drawn.is_terminal
        if now - self._last < (DRAWN_EVERY if terminal else SAID_EVERY) and (self.said or terminal):
            return
        self._last = now
        if terminal:
            drawn.draw()
        elif done < self.total:
            self.said = True
            logger.info("%s: %s", self.what, self._how_far())

    def end(self) -> None:
        """It is over; without a terminal that is said of what took long."""
        seconds = time.monotonic() - self.began
        if seconds >= SHOWN_FROM and not drawn.is_terminal and not self.silent:
            logger.info("%s: done in %s", self.what, clock(seconds))

    def text(self, columns: int) -> str:
        """The line for a terminal; empty until there is anything to wait for."""
        if time.monotonic() - self.began < SHOWN_FROM:
            return ""
        bar = f"{progress_bar(self._share)} " if columns >= _NARROW else ""
        return f"{self.what} {bar}{self._how_far()}"

    @property
    def _share(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def _how_far(self) -> str:
        seconds = time.monotonic() - self.began
        left = f", {clock(seconds * (1 / self._share - 1))} left" if self._share else ""
        counted = f"{self.done:,.0f} of {self.total:,.0f} {self.unit} ({self._share:.0%})" if self.unit else \
            f"{self._share:.0%}"  # fmt: skip
        return f"{counted}{left}"


@contextlib.contextmanager
def progress(what: str, total: float, unit: str = "") -> Iterator[Bar]:
    """Show how far something is while it goes on, once it takes longer than two seconds.

    Args:
        what: goes on, such as `quantizing`.
        total: how much there is to do.
        unit: of that, in the plural; without one the share alone is shown.
    """
    bar = Bar(what, total, unit, not drawn.shows)
    if bar.silent:
        yield bar
        return
    with drawn.line(bar.text):
        yield bar
    bar.end()


class _Wait:
    """What is waited for, and how long it has taken: shown by a thread, as nothing else tells that it goes on."""

    def __init__(self, what: str):
        self.what, self.began, self.said = what, time.monotonic(), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def end(self, well: bool) -> None:
        """It is over; without a terminal that is said of what was said to go on."""
        self._over.set()
        self._thread.join()
        if self.said and well:
            logger.info("%s: done in %s", self.what, clock(time.monotonic() - self.began))

    def text(self, columns: int) -> str:
        """The line for a terminal; empty until it is time for one."""
        seconds = time.monotonic() - self.began
        return "" if seconds < WAIT_SHOWN_FROM else f"{self.what} {clock(seconds)}"

    def _show(self) -> None:
        pause = WAIT_SHOWN_FROM
        while not self._over.wait(pause):
            if drawn.is_terminal:
                drawn.draw()
                pause = 1.0
                continue
            so_far = f": {clock(time.monotonic() - self.began)}" if self.said else ""
            logger.info("%s%s", self.what, so_far)
            self.said, pause = True, SAID_EVERY


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something goes on of which nothing tells how far it is, and how long it has taken.

    Args:
        what: such as `predicting memory`.
    """
    if not drawn.shows:
        yield
        return
    wait, well = _Wait(what), False
    with drawn.line(wait.text):
        wait.begin()
        try:
            yield
            well = True
        finally:
            wait.end(well)


def progress_bar(share: float) -> str:
    """A bar of 20 characters, of which a share from 0 to 1 is full."""
    full = round(_BAR * share)
    return f"{'█' * full}{'░' * (_BAR - full)}" if _has("█░") else f"[{'#' * full}{'.' * (_BAR - full)}]"


def clock(seconds: float) -> str:
    """`1:02:03`, below an hour `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _columns() -> int:
    try:
        return max(20, os.get_terminal_size(sys.stderr.fileno()).columns or 80)
    except (OSError, ValueError):
        return 80


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _cut(text: str, columns: int) -> str:
    if _width(text) <= columns:
        return text
    from rich.cells import set_cell_size

    return set_cell_size(text, columns)


def _has(signs: str) -> bool:
    """Whether stderr's encoding has them."""
    try:
        signs.encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def _write(text: str) -> None:
    """Write, and go on where stderr is closed or full: work is worth more than the lines about it."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
    except (OSError, ValueError) as error:
        logger.debug("nothing can be shown: %s", error)
