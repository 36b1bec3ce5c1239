"""Which part of a model lies in which of two buffers, which comes next, and when a buffer may be overwritten.

Two buffers hold two parts. When another part is asked for than before, the one that comes next begins to be brought
into the other buffer: the following one in a forward pass, the preceding one in a backward pass. So of a pass over N
parts N are brought, of a backward pass after it N - 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Copier(Protocol):
    """Brings parts into buffers. None of its methods has to wait until what it says has happened: what computes and
    what copies may be queues, in which only the order counts."""

    def used(self, buffer: int) -> None:
        """All that computes with the part that a buffer holds now has been asked for."""
        ...

    def copy(self, part: int, buffer: int) -> None:
        """Bring a part into a buffer, after what `used` said of the buffer last."""
        ...

    def ready(self, buffer: int) -> None:
        """What computes from here on finds in the buffer what `copy` brought last; raises where it cannot come."""
        ...


class Schedule:
    """Two buffers, and what is brought into them when.

    Args:
        parts: how many there are, in the order of a forward pass.
        copier: brings them.
    """

    def __init__(self, parts: int, copier: Copier):
        self._parts, self._copier = parts, copier
        self._held: list[int | None] = [None, None]  # the part that each buffer has, or is to have
        self._last: int | None = None  # asked for
        self._buffer = 0  # where it lies

    def ask(self, part: int, backward: bool) -> int:
        """The buffer that holds a part for what computes from here on, until two other parts have been asked for.

        Args:
            part: its number.
            backward: whether a backward pass asks, so that the preceding part comes next.
        """
        if part == self._last:
            return self._buffer
        if self._last is not None:
            self._copier.used(self._buffer)
        if part not in self._held:
            self._bring(part, 1 - self._buffer)
        self._buffer, self._last = self._held.index(part), part
        try:
            self._copier.ready(self._buffer)
        except BaseException:
            self._held[self._buffer], self._last = None, None
            raise
        # After the last part a backward pass may begin, which wants those two that are held.
        following = part - 1 if backward else part + 1
        if 0 <= following < self._parts and following not in self._held:
            self._bring(following, 1 - self._buffer)
        return self._buffer

    def _bring(self, part: int, buffer: int) -> None:
        self._held[buffer] = part
        self._copier.copy(part, buffer)


def brought_in_a_step(sizes: Sequence[int]) -> int:
    """Of parts of these sizes, what a forward and a backward pass bring; two parts are there from the pass before."""
    return sum(sizes[2:]) + sum(sizes[:-2])


class Seconds(NamedTuple):
    """What a layer takes: to be brought, to be computed in forward, and in backward with what is recomputed there."""

    copy: float
    forward: float
    backward: float


class Simulated(NamedTuple):
    """A step as `simulate` saw it.

    Attributes:
        seconds: of the step, from when the buffers hold what the step before left in them.
        waited: of these, what computing waited for copies.
        copies: how many parts were brought.
    """

    seconds: float
    waited: float
    copies: int


class _Clocks:
    """A `Copier` of two queues that only says how long they take: one that computes, one that copies."""

    def __init__(self, copy_seconds: Sequence[float]):
        self.computing = self.copying = self.waited = 0.0
        self.copies = 0
        self._seconds = copy_seconds
        self._used, self._ready = [0.0, 0.0], [0.0, 0.0]

    def used(self, buffer: int) -> None:
        self._used[buffer] = self.computing

    def copy(self, part: int, buffer: int) -> None:
        self.copying = self._ready[buffer] = max(self.copying, self._used[buffer]) + self._seconds[part]
        self.copies += 1

    def ready(self, buffer: int) -> None:
        wait = max(0.0, self._ready[buffer] - self.computing)
        self.waited += wait
        self.computing += wait


def simulate(layers: Sequence[Seconds], passes: int = 1, before: float = 0.0, between: float = 0.0) -> Simulated:
    """How long a step takes whose layers are brought while the ones before compute: the schedule itself, on clocks.

    Args:
        layers: what each of them takes, in the order of a forward pass; what those take that stay on the device is
            part of `before`.
        passes: forward and backward passes of a step (gradient accumulation).
        before: seconds of a pass before the first layer and after its gradient (embeddings, resident layers).
        between: seconds after the last layer's forward pass and before its backward pass (the loss).
    """
    clocks = _Clocks([layer.copy for layer in layers])
    schedule = Schedule(len(layers), clocks)
    start = (0.0, 0.0, 0)
    for number in range(passes + 1):  # the first one fills the buffers
        if number == 1:
            start = (clocks.computing, clocks.waited, clocks.copies)
        clocks.computing += before
        for index, layer in enumerate(layers):
            schedule.ask(index, backward=False)
            clocks.computing += layer.forward
        clocks.computing += between
        for index in reversed(range(len(layers))):
            schedule.ask(index, backward=True)
            clocks.computing += layers[index].backward
    return Simulated(clocks.computing - start[0], clocks.waited - start[1], clocks.copies - start[2])
