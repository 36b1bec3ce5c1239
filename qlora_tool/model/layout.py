"""Where the examples of a batch lie, for modules whose result depends on it and that are not told by a mask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qlora_tool.data.batches import Batch


class Layout:
    """Where the examples of a batch lie, its rows flattened to one.

    Attributes:
        rows, length: of the batch.
        lengths: tokens of every example, and of padding between them, in order.
        padding: which of those are padding.
    """

    def __init__(self, rows: int, length: int, lengths: Sequence[int], padding: frozenset[int] = frozenset()):
        self.rows, self.length, self.lengths, self.padding = rows, length, tuple(lengths), padding
        self._places: dict[torch.device, tuple[list[Tensor], Tensor]] = {}

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        rows, length = batch.input_ids.shape
        if batch.segments is None:
            return cls(rows, length, (length,) * rows)
        return cls(rows, length, batch.segments.lengths, batch.segments.padding)

    @property
    def is_by_rows(self) -> bool:
        """Whether each row is an example of its own."""
        return len(self.lengths) == self.rows

    def places(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Which tokens go into which rows, and where they are found again; made once for all layers.

        Returns:
            For every group of examples of about one length (examples, longest of them), which tokens they are; and
            (tokens,), the place of each in the groups' rows, one after the other. Padding has none: any will do.
        """
        if device not in self._places:
            starts = [0, *accumulate(self.lengths)]
            groups = defaultdict(list)
            for number, length in enumerate(self.lengths):
                if number not in self.padding:
                    groups[(length - 1).bit_length()].append(number)
            chosen, back, done = [], [0] * starts[-1], 0
            for numbers in groups.values():
                longest = max(self.lengths[number] for number in numbers)
                rows = []
                for number in numbers:
                    start, length = starts[number], self.lengths[number]
                    rows.append([start + min(place, length - 1) for place in range(longest)])
                    back[start : start + length] = range(done, done + length)
                    done += longest
                chosen.append(torch.tensor(rows, device=device))
            self._places[device] = chosen, torch.tensor(back, device=device)
        return self._places[device]


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


def laid_out(layout: Layout | None) -> AbstractContextManager[None]:
    """Batches that are run meanwhile have their examples there; None: nothing is known of it. It opens again, too."""
    return _LaidOut(layout)


class _LaidOut(AbstractContextManager[None]):
    def __init__(self, layout: Layout | None):
        self.layout = layout
        self.before: list[Token[Layout | None]] = []

    def __enter__(self) -> None:
        self.before.append(_layout.set(self.layout))

    def __exit__(self, *raised: object) -> None:
        _layout.reset(self.before.pop())


def current_layout() -> Layout | None:
    """Where the examples of the batch lie that is being run."""
    return _layout.get()


def as_now() -> AbstractContextManager[None]:
    """A context in which the examples lie where they do now: for what is computed again later, in any thread, and more
    than once where a graph is gone through again."""
    return laid_out(_layout.get())
