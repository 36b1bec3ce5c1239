"""The blocks that stand for weights best: scales by trial and least squares, each weight on the nearest value.

For fixed levels q of a sub-block the a and b of the least Σ w·(a·q + b − x)² have a closed form; for fixed a and b the
best levels are the nearest ones. From several first guesses of a the two are done in turn, and the best end is kept. In
the k-types a and b are then rounded to whole numbers times the block's d and m, for which the same is done once more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlora_tool.export.grids.block_types import Blocks, BlockType

GUESSES = 9  # of the first scale
_SPREAD = 0.12  # how far the guesses lie apart, as a share of the scale that takes in the largest weight
AT_A_TIME = 1 << 17  # weights: what is worked on stays in a core's cache


def fit(kind: BlockType, weights: Tensor, importance: Tensor | None = None) -> Blocks:
    """The best blocks found for weights.

    Args:
        weights: (blocks, weights of a block) fp32.
        importance: of each weight's squared error, of the same shape or (1, …); by default all count alike.
    """
    step = max(1, AT_A_TIME // kind.weights)
    parts = []
    for start in range(0, len(weights), step):
        part = slice(start, start + step)
        own = importance if importance is None or len(importance) == 1 else importance[part]
        parts.append(_fit(kind, weights[part], own))
    return Blocks(*(
        None if parts[0].__dict__[name] is None else torch.cat([getattr(part, name) for part in parts])
        for name in ("index", "d", "m", "scales", "mins")
    ))  # fmt: skip


def nearest(kind: BlockType, values: Tensor) -> Tensor:
    """The level nearest to each value, as fp32."""
    if kind.uniform:
        return values.round().clamp_(kind.levels[0], kind.levels[-1])
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    return levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]


def index_of(kind: BlockType, levels: Tensor) -> Tensor:
    """The index of each level, uint8."""
    if kind.uniform:
        return (levels - kind.levels[0]).to(torch.uint8)
    return torch.searchsorted(torch.tensor(kind.levels, dtype=torch.float32), levels).to(torch.uint8)


def _fit(kind: BlockType, weights: Tensor, importance: Tensor | None) -> Blocks:
    x = weights.float().view(-1, kind.sub_blocks, kind.weights // kind.sub_blocks)
    w = None if importance is None else importance.view(-1, kind.sub_blocks, x.shape[-1])
    a, b = _coefficients(kind, x, w)
    if kind.steps is None:
        a, b = a.half().float(), b.half().float()
        levels = _levels(kind, x, a, b)
        best, shift, _ = _solve(kind, x, w, levels)  # once more for the levels that rounding a and b has changed
        best, shift = best.half().float(), shift.half().float()
        a, b, levels = _better(x, w, (a, b, levels), (best, shift, _levels(kind, x, best, shift)))
        return Blocks(index_of(kind, levels).flatten(1), a[:, 0].half(), b[:, 0].half() if kind.affine else None)
    return _in_steps(kind, x, w, a, b)


def _coefficients(kind: BlockType, x: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """a and b of each sub-block, (blocks, sub-blocks), not yet rounded."""
    least, most = kind.levels[0], kind.levels[-1]
    if kind.affine:
        low = x.amin(-1).clamp(max=0) if kind.steps else x.amin(-1)
        first, shift = (x.amax(-1) - low) / (most - least), low
    else:
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
        first, shift = extreme / least, torch.zeros_like(extreme)
    best_a, best_b, most_gained = first, shift, torch.zeros_like(first)
    for place in range(GUESSES):
        factor = 1 + _SPREAD * (place / (GUESSES - 1) - 0.75)  # most guesses are smaller: they cut the largest weight
        levels = _levels(kind, x, first * factor, shift * factor if kind.affine and kind.steps else shift)
        a, b, gained = _solve(kind, x, w, levels)
        takes = gained > most_gained
        best_a, best_b = torch.where(takes, a, best_a), torch.where(takes, b, best_b)
        most_gained = torch.where(takes, gained, most_gained)
    a, b, gained = _solve(kind, x, w, _levels(kind, x, best_a, best_b))
    takes = gained >= most_gained
    return torch.where(takes, a, best_a), torch.where(takes, b, best_b)


def _levels(kind: BlockType, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inverse = torch.where(a == 0, 0, 1 / a)
    return nearest(kind, (x - b.unsqueeze(-1)) * inverse.unsqueeze(-1))


def _error(x: Tensor, w: Tensor | None, a: Tensor, b: Tensor, levels: Tensor) -> Tensor:
    """Σ w·(a·q + b − x)² of each sub-block."""
    return _squares(a.unsqueeze(-1) * levels + b.unsqueeze(-1) - x, w)


def _squares(difference: Tensor, w: Tensor | None) -> Tensor:
    return _dot(difference if w is None else difference * w, difference)


_Solution = tuple[Tensor, Tensor, Tensor]  # a, b and the levels


def _better(x: Tensor, w: Tensor | None, one: _Solution, other: _Solution) -> _Solution:
    """Of two solutions of each sub-block the one with the smaller error."""
    takes = _error(x, w, *other) < _error(x, w, *one)
    a, b = (torch.where(takes, new, old) for old, new in zip(one[:2], other[:2], strict=True))
    return a, b, torch.where(takes.unsqueeze(-1), other[2], one[2])


def _solve(kind: BlockType, x: Tensor, w: Tensor | None, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The a and b of the least error for given levels, and how far it lies below Σ w·x²; b at most 0 where a block
    keeps it as a product that is taken away, and 0 where there is none."""
    weighted = levels if w is None else levels * w
    qq, qx = _dot(weighted, levels), _dot(weighted, x)
    alone = torch.where(qq == 0, 0, qx / qq)
    if not kind.affine:
        return alone, torch.zeros_like(alone), alone * qx
    q = weighted.sum(-1)
    s = x.sum(-1) if w is None else _dot(w.expand_as(x), x)
    total = torch.full_like(q, x.shape[-1]) if w is None else w.expand_as(x).sum(-1)
    determinant = total * qq - q * q
    solvable = determinant > 1e-6 * total * qq
    a = torch.where(solvable, (total * qx - q * s) / determinant, alone)
    b = torch.where(solvable, (qq * s - q * qx) / determinant, 0)
    if kind.steps is None:  # one level for all: b is their mean
        a = torch.where(solvable, a, 0)
        b = torch.where(solvable, b, torch.where(total == 0, 0, s / total))
    else:
        without = (b > 0) | (a < 0)
        a, b = torch.where(without, alone, a), torch.where(without, 0, b)
    return a, b, a * qx + b * s


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return torch.linalg.vecdot(one, other)


def _in_steps(kind: BlockType, x: Tensor, w: Tensor | None, a: Tensor, b: Tensor) -> Blocks:
    """k-types: a and b of a block in whole numbers of its d and m."""
    assert kind.steps is not None
    blocks = _rounded(kind, x, a, b)
    best, least = blocks, _total(kind, x, w, blocks)
    for _ in range(2):
        a, b = kind.coefficients(blocks)
        blocks = _rounded(kind, x, *_solve(kind, x, w, _levels(kind, x, a, b))[:2])
        best, least = _kept(kind, x, w, best, least, blocks)
        blocks = _resolved(kind, x, w, best)
        best, least = _kept(kind, x, w, best, least, blocks)
    return replace(best, index=best.index.flatten(1))


def _rounded(kind: BlockType, x: Tensor, a: Tensor, b: Tensor) -> Blocks:
    """d and m from the largest of a block, the others in whole numbers of them, every weight on its nearest value."""
    assert kind.steps is not None
    if kind.affine:
        d, m = (a.amax(-1) / kind.steps[1]).half(), (-b).amax(-1).clamp(min=0).div(kind.steps[1]).half()
        mins = _steps(-b, m, kind)
    else:
        extreme = a.gather(-1, a.abs().argmax(-1, keepdim=True)).squeeze(-1)
        d, m, mins = (extreme / kind.steps[0]).half(), None, None
    return _on_grid(kind, x, Blocks(x.new_empty(0), d, m, _steps(a, d, kind), mins))


def _steps(values: Tensor, unit: Tensor, kind: BlockType) -> Tensor:
    assert kind.steps is not None
    unit = unit.float().unsqueeze(-1)
    whole = torch.where(unit == 0, 0, values / unit).round()
    return whole.clamp(*kind.steps).to(torch.int16)


def _on_grid(kind: BlockType, x: Tensor, blocks: Blocks) -> Blocks:
    """The same blocks with every weight on its nearest value."""
    return replace(blocks, index=index_of(kind, _levels(kind, x, *kind.coefficients(blocks))))


def _resolved(kind: BlockType, x: Tensor, w: Tensor | None, blocks: Blocks) -> Blocks:
    """d and m of the least error for the whole numbers and levels that a block has."""
    assert blocks.scales is not None
    levels = torch.tensor(kind.levels, dtype=torch.float32)[blocks.index.long()]
    p = (blocks.scales.float().unsqueeze(-1) * levels).flatten(1)
    flat, w = x.flatten(1), None if w is None else w.expand_as(x).flatten(1)
    weighted = p if w is None else p * w
    pp, px = _dot(weighted, p), _dot(weighted, flat)
    d = torch.where(pp == 0, 0, px / pp)
    if blocks.mins is None:
        return _on_grid(kind, x, replace(blocks, d=d.half()))
    r = (-blocks.mins.float()).unsqueeze(-1).expand_as(x).flatten(1)
    rr, rx, pr = _squares(r, w), _dot(r if w is None else r * w, flat), _dot(weighted, r)
    determinant = pp * rr - pr * pr
    solvable = determinant > 1e-6 * pp * rr
    both = torch.where(solvable, (rr * px - pr * rx) / determinant, d)
    m = torch.where(solvable, (pp * rx - pr * px) / determinant, 0)
    usable = solvable & (m >= 0) & (both > 0)
    assert blocks.m is not None
    return _on_grid(kind, x, replace(
        blocks, d=torch.where(usable, both, blocks.d.float()).half(), m=torch.where(usable, m, blocks.m.float()).half()
    ))  # fmt: skip


def _total(kind: BlockType, x: Tensor, w: Tensor | None, blocks: Blocks) -> Tensor:
    """The error of each block."""
    difference = kind.values(replace(blocks, index=blocks.index.flatten(1))) - x.flatten(1)
    return _squares(difference, None if w is None else w.expand_as(x).flatten(1))


def _kept(
    kind: BlockType, x: Tensor, w: Tensor | None, best: Blocks, least: Tensor, found: Blocks
) -> tuple[Blocks, Tensor]:
    """Of two forms of each block the better one, and its error."""
    error = _total(kind, x, w, found)
    takes = error < least

    def chosen(new: Tensor | None, old: Tensor | None) -> Tensor | None:
        if new is None or old is None:
            return None
        return torch.where(takes.view(-1, *[1] * (new.dim() - 1)), new, old)

    fields = ("index", "d", "m", "scales", "mins")
    kept = Blocks(*(chosen(getattr(found, name), getattr(best, name)) for name in fields))
    return kept, torch.where(takes, error, least)
