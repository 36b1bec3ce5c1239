"""The blocks that stand for weights best: scales by trial and least squares, each weight on the nearest value.

For fixed levels q of a sub-block the a and b of the least Σ w·(a·q + b − x)² have a closed form; for fixed a and b the
best levels are the nearest ones. The guesses of a and b that lead lowest are taken on: the two are done in turn, twice.
In the k-types a and b are then rounded to whole numbers times the block's d and m, and the same is done once more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_tool.export.grids.block_types import Blocks, BlockType
from qlora_tool.export.grids.columns import Columns, Scales, inverse_of, levels_of
from qlora_tool.export.grids.threads import on_every_core

AT_A_TIME = 1 << 19  # weights: what is worked on stays in the caches, and an operation takes longer than its call
# Guesses of a and b, as shares of those that take in the largest and the smallest weight: smaller ones cut them, larger
# ones leave levels unused, negative ones put the largest weight on the other end. Chosen one after the other from 60
# such pairs, each the one that lowers the error most beside those before it: of normal weights, of weights with long
# tails, and of a trained model's. The error left is within 3 % of that of all 60; ends are met where values lie on a
# grid of so many levels, or half as many.
_OF_16 = ((0.984, 0.984), (0.98, 0.95), (0.966, 1), (1.071, 1), (1.015, 1.04), (1.02, 1), (0.99, 1.04), (0.955, 0.95))
_OF_32 = (
    (31 / 30, 1), (1, 1), (0.984, 1), (1.069, 1), (1.008, 1), (1.016, 1.04), (1.025, 1), (0.992, 1), (0.976, 0.95)
)  # fmt: skip
_GUESSES: dict[str, tuple[tuple[float, float], ...]] = {
    "Q4_0": tuple((factor, 1) for factor in (1, 0.983, 0.907, 1.114, 1.017, 0.951, -1.333, 0.842)),
    "Q5_0": tuple((factor, 1) for factor in (1, 0.992, 1.063, 0.959, -1.143, 1.017, 1.083)),
    "IQ4_NL": tuple((factor, 1) for factor in (0.985, -1.124, 1.187, 0.927, 1.033, -1.05, -1.21, 0.888)),
    "Q4_1": ((1, 1), *_OF_16), "Q5_1": _OF_32, "Q4_K": _OF_16, "Q5_K": _OF_32,
    "Q6_K": tuple((factor, 1) for factor in (1, 1.032, -1.067, 0.985, 1.008)),
}  # fmt: skip
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16


def fit(kind: BlockType, weights: Tensor, importance: Tensor | None = None) -> Blocks:
    """The best blocks found for weights.

    Args:
        weights: (blocks, weights of a block) fp32.
        importance: of each weight's squared error, of the same shape or (1, …); by default all count alike.
    """
    step = max(1, AT_A_TIME // kind.weights)
    parts: dict[int, Blocks] = {}

    def work(start: int) -> None:
        part = slice(start, start + step)
        own = importance if importance is None or len(importance) == 1 else importance[part]
        parts[start] = _fit(kind, weights[part], own)

    on_every_core(work, range(0, len(weights), step))
    return joined([parts[start] for start in sorted(parts)])


def joined(parts: Sequence[Blocks]) -> Blocks:
    """Blocks, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Blocks(*(
        None if parts[0].__dict__[name] is None else torch.cat([getattr(part, name) for part in parts])
        for name in ("index", "d", "m", "scales", "mins")
    ))  # fmt: skip


def nearest(kind: BlockType, values: Tensor) -> Tensor:
    """The level nearest to each value, as fp32."""
    return levels_of(kind, values.clone())


def index_of(kind: BlockType, levels: Tensor) -> Tensor:
    """The index of each level, uint8."""
    if kind.uniform:
        return (levels - kind.levels[0]).to(torch.uint8)
    places = torch.tensor(kind.levels) - kind.levels[0]
    table = torch.zeros(int(places[-1]) + 1, dtype=torch.uint8)
    table[places] = torch.arange(len(places), dtype=torch.uint8)
    return table.index_select(0, (levels - kind.levels[0]).int().view(-1)).view_as(levels)


def _fit(kind: BlockType, weights: Tensor, importance: Tensor | None) -> Blocks:
    x = Columns(kind, weights.float(), importance)
    a, b = _guessed(x)
    scales = _in_halves(x, a, b) if kind.steps is None else _in_steps(x, a, b)
    index = index_of(kind, x.levels(*scales.coefficients())).permute(1, 2, 0).flatten(1).contiguous()
    d = scales.d.half()
    m = None if scales.m is None else scales.m.half()
    whole = (None if steps is None else steps.to(torch.int16) for steps in (scales.scales, scales.mins))
    return Blocks(index, d, m, *whole)


def _guessed(x: Columns) -> tuple[Tensor, Tensor | None]:
    """a and b of each sub-block, (blocks, sub-blocks), not yet rounded; the best that the guesses lead to."""
    first, shift = _widest(x)
    inverse, offset = inverse_of(first, shift)
    best, most = [inverse, offset], torch.full_like(first, -torch.inf)
    for a, b in _GUESSES[x.kind.name]:
        guess = [inverse / a, None if offset is None else offset * (b / a)]
        gained = x.gained(x.sums(x.levels_at(*guess)))
        takes = torch.gt(gained, most, out=torch.empty_like(most))  # as 0 and 1: `where` is many times slower
        best = [None if old is None else torch.lerp(old, new, takes) for old, new in zip(best, guess, strict=True)]
        torch.maximum(most, gained, out=most)
    found = x.solved(x.sums(x.levels_at(*best)))
    return x.solved(x.sums(x.levels(*found)))


def _widest(x: Columns) -> tuple[Tensor, Tensor | None]:
    """The a and b that take in the largest and the smallest weight."""
    kind, least, most = x.kind, x.kind.levels[0], x.kind.levels[-1]
    low, high = x.x.amin(0), x.x.amax(0)
    if not kind.affine:
        return torch.where(high > -low, high, low) / least, None
    low = low.clamp_(max=0) if kind.steps else low
    return (high - low) / (most - least), low


def _in_halves(x: Columns, a: Tensor, b: Tensor | None) -> Scales:
    """a and b in float16: one of them is rounded, and the other solved again for what the first has become."""
    if b is None:
        first = Scales(_half(a[:, 0]), None)
        error, sums = x.tried(first)
        second = Scales(_half(x.solved(sums)[0][:, 0]), None)
        return first.or_where(x.tried(second)[0] < error, second)
    a = _half(a)
    q, qq, qx = x.sums(x.levels(a, b))
    first = Scales(a[:, 0], ((x.sum_x - a * q) / x.sum_w)[:, 0].clamp(-_LARGEST, _LARGEST).half().float())
    error, sums = x.tried(first)
    q, qq, qx = sums
    b = x.solved(sums)[1].clamp(-_LARGEST, _LARGEST).half().float()
    second = Scales(_half((qx - b * q) / qq.clamp(min=1e-30))[:, 0], b[:, 0])
    return first.or_where(x.tried(second)[0] < error, second)


def _in_steps(x: Columns, a: Tensor, b: Tensor | None) -> Scales:
    """k-types: a and b of a block in whole numbers of its d and m; then a and b solved again, and d and m."""
    best = _rounded(x.kind, a, b)
    least, sums = x.tried(best)
    for attempt in range(4 if x.kind.affine else 2):
        found = _resolved(x, best, sums) if attempt % 2 else _rounded(x.kind, *x.solved(sums))
        error, other = x.tried(found)
        takes = error < least
        best, least = best.or_where(takes, found), torch.minimum(error, least)
        sums = torch.where(takes.unsqueeze(-1), other, sums)
    return best


def _rounded(kind: BlockType, a: Tensor, b: Tensor | None) -> Scales:
    """d and m from the largest of a block, the others in whole numbers of them."""
    assert kind.steps is not None
    if b is None:
        high, low = a.amax(-1), a.amin(-1)
        d = _half(torch.where(high > -low, high, low) / kind.steps[0])
        return Scales(d, None, _steps(a, d, kind), None)
    d, m = _half(a.amax(-1) / kind.steps[1]), _half(b.amin(-1) / -kind.steps[1])
    return Scales(d, m, _steps(a, d, kind), _steps(-b, m, kind))


def _half(values: Tensor) -> Tensor:
    """A scale in float16; what is not 0 does not become 0, so that weights near the smallest are still told apart."""
    size = values.abs().clamp_(_SMALLEST, _LARGEST).mul_(values != 0)
    return size.copysign_(values).half().float()


def _steps(values: Tensor, unit: Tensor, kind: BlockType) -> Tensor:
    assert kind.steps is not None
    whole = (values / torch.where(unit == 0, 1, unit).unsqueeze(-1)).round_()
    return whole.clamp_(*kind.steps)


def _resolved(x: Columns, found: Scales, sums: Tensor) -> Scales:
    """d and m of the least error for the whole numbers and levels that a block has.

    Args:
        sums: of those levels.
    """
    assert found.scales is not None
    q, qq, qx = sums
    scales, mins = found.scales, found.mins
    pp, px = (scales * scales * qq).sum(-1), (scales * qx).sum(-1)
    d = torch.where(pp == 0, 0, px / pp)
    if mins is None:
        return Scales(_half(d), None, scales, None)
    rr, rx, pr = (mins * mins * x.sum_w).sum(-1), -(mins * x.sum_x).sum(-1), -(scales * mins * q).sum(-1)
    determinant = pp * rr - pr * pr
    solvable = determinant > 1e-6 * pp * rr
    both = torch.where(solvable, (rr * px - pr * rx) / determinant, d)
    m = torch.where(solvable, (pp * rx - pr * px) / determinant, 0)
    usable = solvable & (m >= 0) & (both > 0)
    return Scales(_half(torch.where(usable, both, found.d)), _half(torch.where(usable, m, found.m)), scales, mins)
