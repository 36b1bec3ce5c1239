"""Several sources as one: how many rows of each, which, and in what order.

The mixture is a function of the sources' rows, of the shares asked for and of the seed, and of nothing else.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from qlora_tool.errors import UserError

MOST_ROWS, MOST_REPEATED = 20_000_000, 10  # of a mixture: so many, or so many times those that there are


@dataclass(frozen=True)
class Share:
    """How much of one source there is in a mixture: at most one is set; none: every row once.

    Attributes:
        weight: its rows to those of the others, which all have a weight too.
        rows: so many rows.
        repeat: each row so many times.
    """

    weight: float | None = None
    rows: int | None = None
    repeat: float | None = None


def rows_of_each(shares: Sequence[Share], available: Sequence[int]) -> list[int]:
    """How many rows of each source the mixture has.

    By weights, as many rows in all as there are in all sources (of those that have a weight above 0): a source with a
    larger share than that is gone through more than once, one with a smaller share not to its end.

    Raises:
        UserError: every weight is 0; or far more rows are asked for than there are: their numbers alone fill the
            memory.
    """
    if any(share.weight is not None for share in shares):
        weights = [Fraction(str(share.weight or 0)) for share in shares]
        if not sum(weights):
            raise UserError("data.train: every weight is 0, so that nothing is left to train on; give one above 0")
        total = sum(count for count, weight in zip(available, weights, strict=True) if weight)
        return _rounded([total * weight / sum(weights) for weight in weights])
    counts = []
    for share, count in zip(shares, available, strict=True):
        repeated = round(count * Fraction(str(1 if share.repeat is None else share.repeat)))
        counts.append(share.rows if share.rows is not None else max(1, repeated) if count else 0)
    if sum(counts) > (most := max(MOST_ROWS, MOST_REPEATED * sum(available))):
        raise UserError(f"data.train: {sum(counts):,} rows are asked for by rows and repeat, of {sum(available):,} "
                        f"that there are; {most:,} at most; lower them, and raise training.num_train_epochs instead")
    return counts


def _rounded(wanted: Sequence[Fraction]) -> list[int]:
    """Whole numbers of the same sum, each next to what is wanted: the largest rests are rounded up."""
    counts = [int(number) for number in wanted]
    by_rest = sorted(range(len(wanted)), key=lambda index: counts[index] - wanted[index])
    for index in by_rest[: round(sum(wanted)) - sum(counts)]:
        counts[index] += 1
    return counts


def choose_rows(available: int, wanted: int, seed: str) -> array[int]:
    """Which rows of a source: all of them as often as they fit in, and of the rest a draw; in the source's order."""
    whole, rest = divmod(wanted, available) if available else (0, 0)
    chosen = array("i")
    for _ in range(whole):
        chosen.extend(range(available))
    chosen.extend(sorted(random.Random(seed).sample(range(available), rest)))
    return chosen


def mixture(rows: Sequence[Sequence[int]], shares: Sequence[Share], seed: int) -> tuple[array[int], list[int]]:
    """Which examples of several sources make a mixture, and in what order: every source is spread evenly over all of it
    and keeps its own order.

    Args:
        rows: by source, the number of the row of each example, counted from 0; those of one row are neighbours.
        shares: by source.
        seed: draws the rows of a source of which not all are taken.

    Returns:
        Numbers of examples, counted through all sources; and by source, the rows that the mixture has of it.
    """
    import numpy

    begins = [numpy.flatnonzero(numpy.diff(numpy.asarray(each), prepend=-1)) for each in rows]
    counts = rows_of_each(shares, [len(each) for each in begins])
    first, starts, lengths, places = 0, [], [], []
    for number, (own, count, begin) in enumerate(zip(rows, counts, begins, strict=True)):
        chosen = numpy.asarray(choose_rows(len(begin), count, f"{seed}, source {number}"), dtype=numpy.int64)
        starts.append(begin[chosen] + first)
        lengths.append(numpy.diff(begin, append=len(own))[chosen])
        places.append((numpy.arange(count) + 0.5) / max(count, 1))
        first += len(own)
    order = numpy.argsort(numpy.concatenate(places), kind="stable")
    start, length = numpy.concatenate(starts)[order], numpy.concatenate(lengths)[order]
    # The examples of a row one after the other: as many steps of one from its first.
    steps = numpy.arange(length.sum()) - numpy.repeat(numpy.cumsum(length) - length, length)
    return array("i", (numpy.repeat(start, length) + steps).astype(numpy.int32).tobytes()), counts
