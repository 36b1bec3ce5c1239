"""The longest rows that fit, found with few looks at what a length takes."""

from __future__ import annotations

from collections.abc import Callable

LOOKS = 24


def longest_length(
    needed: Callable[[int], int], limit: int, shortest: int, top: int, *, start: int, slope: float = 0.0
) -> tuple[int, float]:
    """The longest length, of those that are tried, at which `needed` is within `limit`.

    Memory grows with the length in pieces that only get steeper (the largest of several moments, each linear or
    quadratic in it). So what lies beyond two lengths is at least on the line through them, and where that line leaves
    the limit, nothing longer fits.

    Args:
        needed: bytes at a length; each look at it takes a second.
        limit: bytes.
        shortest, top: the range of lengths.
        start: where to look first.
        slope: bytes a token, as seen elsewhere; 0: unknown. It says where to look, not where to stop.

    Returns:
        The length, a multiple of `step_of` it, or `top`, or 0 where not even `shortest` fits; and bytes a token around
        there, 0 where none were seen.
    """
    shortest = min(shortest, top)
    seen: dict[int, int] = {}
    length = round_down(min(max(start, shortest), top), shortest, top)
    for _ in range(LOOKS):
        seen[length] = needed(length)
        fitting = max((at for at in seen if seen[at] <= limit), default=None)
        beyond = min((at for at in seen if seen[at] > limit), default=None)
        slope = _slope(seen, fitting, beyond) or slope
        if fitting == top or beyond == shortest:
            break
        length = _next(seen, limit, fitting, beyond, slope, shortest, top)
        if length in seen:
            break
    return fitting or 0, slope


def step_of(length: int) -> int:
    """Lengths are multiples of 64, or of less where 64 would be more than a tenth."""
    return 64 if length >= 640 else 8 if length >= 80 else 1


def round_down(length: int, shortest: int, top: int) -> int:
    """The longest length to suggest that is not above `length`, between `shortest` and `top`."""
    if length >= top:
        return top
    return max(shortest, length // step_of(length) * step_of(length))


def _slope(seen: dict[int, int], fitting: int | None, beyond: int | None) -> float:
    """Bytes a token around the limit: between the two lengths next to it."""
    if fitting is not None and beyond is not None:
        pair = fitting, beyond
    else:
        nearest = sorted(seen, reverse=beyond is None)[:2]
        pair = nearest[-1], nearest[0]
    return (seen[pair[1]] - seen[pair[0]]) / (pair[1] - pair[0]) if pair[0] != pair[1] else 0.0


def _next(
    seen: dict[int, int], limit: int, fitting: int | None, beyond: int | None, slope: float, shortest: int, top: int
) -> int:
    """Where to look next; a length that was seen says that the answer is found."""
    at = fitting if fitting is not None else beyond
    if slope <= 0:
        return round_down(at * 2 if fitting is not None else at // 2, shortest, top)
    guess = round_down(int(at + (limit - seen[at]) / slope), shortest, top)
    if fitting is None:
        return min(guess, round_down(beyond - 1, shortest, top))
    if beyond is None:
        if len(seen) == 1:  # the slope is another's
            guess = max(guess, round_down(fitting + step_of(fitting), shortest, top))
        return max(guess, fitting)
    last = round_down(beyond - 1, shortest, top)
    if (bound := _bound(seen, limit, fitting)) is not None and (bound := round_down(bound, shortest, top)) <= last:
        return max(fitting, bound)
    # Between two lengths the line is too high, so the answer may lie beyond what it says.
    if guess <= fitting and beyond > 1.05 * fitting:
        guess = round_down((fitting + beyond) // 2, shortest, top)
    return max(fitting, min(guess, last))


def _bound(seen: dict[int, int], limit: int, fitting: int) -> int | None:
    """Where the line through the two longest lengths that fit leaves the limit: nothing longer fits, as lines go on too
    low. None where there is no such line."""
    before = max((at for at in seen if at < fitting), default=fitting)
    rise = seen[fitting] - seen[before]
    return None if rise <= 0 else int(fitting + (limit - seen[fitting]) * (fitting - before) / rise)
