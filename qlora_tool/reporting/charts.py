"""Charts as HTML: lines and areas in an SVG that stretches to its box, labels in plain text around it.

So that letters keep their size on a telephone as on a wide screen, and stay text for those who hear a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_tool.reporting.escape import escaped

Point = tuple[float, float]
_SIDE = 1000  # units of an SVG's side, whatever its shape on the screen


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: of what it shows.
        points: (x, y), x growing.
        kind: its colour and form in the page's style: `one` to `four`.
        marked: whether each point is a dot.
    """

    name: str
    points: Sequence[Point]
    kind: str = "one"
    marked: bool = False


def line_chart(
    title: str, series: Sequence[Series], *, unit: str, across: str = "step", from_zero: bool = False
) -> str:
    """A figure with one or more lines, and their numbers in words.

    Args:
        title: what it shows.
        unit: of y, such as `nats`; empty where it has none.
        across: what x is.
        from_zero: let the scale of y begin at 0.
    """
    shown = [one for one in series if one.points]
    points = [point for one in shown for point in one.points]
    low, high = min(y for _, y in points), max(y for _, y in points)
    ticks = ticks_between(0.0 if from_zero else low, high)
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    plot = "".join(_line(one, (left, right), (ticks[0], ticks[-1])) for one in shown)
    key = [(one.kind, one.name) for one in shown] if len(shown) > 1 else []
    words = "; ".join(_in_words(one, across) for one in shown)
    return _figure(title, words, plot, _labels(ticks, unit), [number(left), across, number(right)], key)


def area_chart(
    title: str, words: str, positions: Sequence[float], end: float, layers: Sequence[tuple[str, Sequence[int]]],
    ticks: Sequence[float], labels: Sequence[str], spans: Sequence[tuple[str, float, float]],
) -> str:  # fmt: skip
    """A figure of stacked areas, each level of which holds until the next position.

    Args:
        positions: where levels change; `end`: where the last one ends.
        layers: colour and levels of each, from below.
        ticks, labels: of the scale, from 0 on.
        spans: (name, begin, end) of stretches to be told apart.
    """
    plot, below = "", [0] * len(positions)
    right = [*positions[1:], end]
    for colour, levels in layers:
        above = [one + other for one, other in zip(below, levels, strict=True)]
        upper = "".join(f"L{_x(x0, 0, end)} {_y(y, ticks)}H{_x(x1, 0, end)}"
                        for x0, x1, y in zip(positions, right, above, strict=True))  # fmt: skip
        lower = "".join(f"L{_x(x1, 0, end)} {_y(y, ticks)}H{_x(x0, 0, end)}"
                        for x0, x1, y in reversed(list(zip(positions, right, below, strict=True))))  # fmt: skip
        if any(levels):
            plot += f'<path d="M{upper[1:]}{lower}Z" fill="{colour}"/>'
        below = above
    totals = below
    if totals:
        highest = max(range(len(totals)), key=totals.__getitem__)
        x = _x((positions[highest] + right[highest]) / 2, 0, end)
        plot += f'<path class="peak" d="M{x} {_SIDE}V{_y(totals[highest], ticks)}"/>'
        plot += f'<path class="dot peak" d="M{x} {_y(totals[highest], ticks)}h0"/>'
    for _, begin, _ in spans[1:]:
        plot += f'<path class="begin" d="M{_x(begin, 0, end)} 0V{_SIDE}"/>'
    named = [(name, (begin + stop) / 2 / end) for name, begin, stop in spans if (stop - begin) / end > 0.12]
    places = list(zip((1 - tick / ticks[-1] for tick in ticks), labels, strict=True))
    return _figure(title, words, plot, places, named, [])


def bar(share: float) -> str:
    """A bar in a table's cell, of which a share is full."""
    return f'<span class="bar"><span style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></span></span>'


def ticks_between(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about so many steps apart."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number for an axis or a table, in four digits."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"


def _line(one: Series, across: Point, up: Point) -> str:
    points = [(_x(x, *across), _y(y, up)) for x, y in one.points]
    path = "M" + "L".join(f"{x} {y}" for x, y in points)
    dots = "".join(f'<path class="dot {one.kind}" d="M{x} {y}h0"/>' for x, y in points) if one.marked or \
        len(points) == 1 else ""  # fmt: skip
    return f'<path class="line {one.kind}" d="{path}"/>{dots}'


def _x(x: float, left: float, right: float) -> str:
    return f"{_SIDE * (x - left) / (right - left or 1):.1f}"


def _y(y: float, ticks: Sequence[float]) -> str:
    return f"{_SIDE * (1 - (y - ticks[0]) / (ticks[-1] - ticks[0])):.1f}"


def _labels(ticks: Sequence[float], unit: str) -> list[tuple[float, str]]:
    """Where from the top each stands, and what it says; the unit at the uppermost."""
    count = len(ticks) - 1
    return [(1 - index / count, f"{number(tick)} {unit}".strip() if index == count else number(tick))
            for index, tick in enumerate(ticks)]  # fmt: skip


def _in_words(one: Series, across: str) -> str:
    (x0, first), (x1, last) = one.points[0], one.points[-1]
    lowest = min(y for _, y in one.points)
    return (f"{one.name}: {number(first)} at {across} {number(x0)}, {number(last)} at {across} {number(x1)}, "
            f"lowest {number(lowest)}")  # fmt: skip


def _figure(
    title: str, words: str, plot: str, up: Sequence[tuple[float, str]], along: Sequence[str | tuple[str, float]],
    key: Sequence[tuple[str, str]],
) -> str:  # fmt: skip
    """The box: labels of the scale, the plot with a rule at each of them, what lies along its foot."""
    rules = "".join(f'<path class="rule" d="M0 {_SIDE * place:.1f}H{_SIDE}"/>' for place, _ in up)
    scale = "".join(f'<span style="top:{100 * place:.1f}%">{escaped(label)}</span>' for place, label in up)
    return (
        f'<figure><figcaption>{escaped(title)}{"".join(_keyed(key))}</figcaption><div class="chart" role="img" '
        f'aria-label="{escaped(f"{title}. {words}")}"><div class="scale" aria-hidden="true">{scale}</div>'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" aria-hidden="true">{rules}{plot}</svg>'
        f'<div class="foot" aria-hidden="true">{"".join(_foot(along))}</div></div></figure>'
    )


def _keyed(key: Sequence[tuple[str, str]]) -> Iterator[str]:
    for kind, name in key:
        yield f' <span class="key {kind}">{escaped(name)}</span>'


def _foot(along: Sequence[str | tuple[str, float]]) -> Iterator[str]:
    for label in along:
        if isinstance(label, str):
            yield f"<span>{escaped(label)}</span>"
        else:
            yield f'<span class="at" style="left:{100 * label[1]:.1f}%">{escaped(label[0])}</span>'
