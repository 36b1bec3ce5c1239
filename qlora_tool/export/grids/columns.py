"""Weights with a sub-block in each column, and what fitting needs of them in few passes over a core's cache.

Sums over a sub-block are then sums of rows, and its a and b are added to and multiplied with whole rows: both are what
a processor's vectors do. Beside the weights there are two buffers, which every step uses again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_tool.export.grids.block_types import BlockType

_NONE = 1e-30  # a scale below it is 0: no block's float16 comes near, and its inverse might be infinite


@dataclass(frozen=True)
class Scales:
    """What a block keeps beside its levels.

    Attributes:
        d, m: (blocks,) fp32, values of float16; m is None where there is no b.
        scales, mins: (blocks, sub-blocks) whole numbers as fp32; None in types of 32 weights: d and m are a and b.
    """

    d: Tensor
    m: Tensor | None
    scales: Tensor | None = None
    mins: Tensor | None = None

    def coefficients(self) -> tuple[Tensor, Tensor | None]:
        """a and b, (blocks, sub-blocks) or (blocks, 1)."""
        d, m = self.d.unsqueeze(-1), None if self.m is None else self.m.unsqueeze(-1)
        if self.scales is None:
            return d, m
        return d * self.scales, None if m is None or self.mins is None else -(m * self.mins)

    def or_where(self, takes: Tensor, other: Scales) -> Scales:
        """Of each block `other`'s where it takes them."""

        def chosen(old: Tensor | None, new: Tensor | None) -> Tensor | None:
            if old is None or new is None:
                return None
            return torch.where(takes if old.dim() == 1 else takes.unsqueeze(-1), new, old)

        return Scales(torch.where(takes, other.d, self.d), chosen(self.m, other.m), chosen(self.scales, other.scales),
                      chosen(self.mins, other.mins))  # fmt: skip


class Columns:
    """The weights of some blocks.

    Args:
        weights: (blocks, weights of a block) fp32.
        importance: of each weight's squared error, of the same shape or (1, …); None: all count alike.

    Attributes:
        x: the weights, (weights of a sub-block, blocks, sub-blocks).
        sum_w, sum_x: Σ w and Σ w·x of every sub-block, (blocks, sub-blocks).
    """

    def __init__(self, kind: BlockType, weights: Tensor, importance: Tensor | None):
        self.kind = kind
        self.x = self._turned(weights)
        self._w = None if importance is None else self._weighing(importance.float(), weights)
        self._levels, self._products = torch.empty_like(self.x), torch.empty_like(self.x)
        if self._w is None:
            self.sum_x, self.sum_w = self.x.sum(0), torch.full(self.x.shape[1:], float(len(self.x)))
        else:
            self.sum_x = torch.mul(self.x, self._w, out=self._products).sum(0)
            self.sum_w = self._w.sum(0)
        self._of_mean = self.sum_x.square() / self.sum_w

    def _weighing(self, importance: Tensor, weights: Tensor) -> Tensor:
        """As columns, of mean 1; in sub-blocks where nothing counts, all count alike."""
        w = self._turned((importance / importance.mean().clamp(min=_NONE)).expand_as(weights))
        return w + (w.sum(0) == 0)

    def _turned(self, values: Tensor) -> Tensor:
        sub_blocks = self.kind.sub_blocks
        turned = values.reshape(-1, self.kind.weights // sub_blocks).T.contiguous()
        return turned.view(len(turned), -1, sub_blocks)

    def levels(self, a: Tensor, b: Tensor | None) -> Tensor:
        """The level nearest to every weight, in a buffer that the next call fills.

        Args:
            a, b: (blocks, sub-blocks); no b is 0.
        """
        return self.levels_at(*inverse_of(a, b))

    def levels_at(self, inverse: Tensor, offset: Tensor | None) -> Tensor:
        """The same by what `inverse_of` made of a and b."""
        if offset is None:
            torch.mul(self.x, inverse, out=self._levels)
        else:
            torch.addcmul(offset, self.x, inverse, out=self._levels)
        return levels_of(self.kind, self._levels)

    def sums(self, levels: Tensor) -> Tensor:
        """Σ w·q, Σ w·q² and Σ w·q·x of every sub-block, (3, blocks, sub-blocks); without a b the first is no sum."""
        found, products = torch.empty(3, *self.x.shape[1:]), self._products
        weighted = levels if self._w is None else levels * self._w
        if self.kind.affine:
            torch.sum(weighted, 0, out=found[0])
        torch.sum(torch.mul(weighted, levels, out=products), 0, out=found[1])
        torch.sum(torch.mul(weighted, self.x, out=products), 0, out=found[2])
        return found

    def gained(self, sums: Tensor) -> Tensor:
        """How far the least error for given levels lies below one that no levels change."""
        q, qq, qx = sums
        alone = qx * qx / qq.clamp(min=_NONE)
        if not self.kind.affine:
            return alone
        mean = q / self.sum_w
        both = (qx - mean * self.sum_x).square_() / torch.addcmul(qq, mean, q, value=-1).clamp_(min=_NONE)
        if self.kind.steps is None:
            return both
        bound = torch.gt(qq * self.sum_x, q * qx, out=torch.empty_like(q))
        return torch.lerp(both, alone - self._of_mean, bound)

    def solved(self, sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """The a and b of the least error for given levels; b at most 0 where a block keeps it as a product that is
        taken away.

        Args:
            sums: of those levels, (3, …, blocks, sub-blocks).
        """
        q, qq, qx = sums
        alone = qx / qq.clamp(min=_NONE)
        if not self.kind.affine:
            return alone, None
        s, total = self.sum_x, self.sum_w
        determinant = total * qq - q * q
        solvable = determinant > 1e-6 * total * qq
        a = torch.where(solvable, (total * qx - q * s) / determinant, alone)
        b = torch.where(solvable, (qq * s - q * qx) / determinant, 0)
        if self.kind.steps is None:  # one level for all: b is their mean
            return torch.where(solvable, a, 0), torch.where(solvable, b, torch.where(total == 0, 0, s / total))
        without = (b > 0) | (a < 0)
        return torch.where(without, alone, a), torch.where(without, 0, b)

    def tried(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """The error of each block, (blocks,), with its weights on the nearest values, and the sums of their levels."""
        a, b = scales.coefficients()
        levels = self.levels(a, b)
        sums = self.sums(levels)
        difference = torch.mul(levels, a, out=self._products) if b is None else torch.addcmul(
            b, levels, a, out=self._products)  # fmt: skip
        difference -= self.x
        squares = torch.mul(difference, difference, out=levels)
        if self._w is not None:
            squares *= self._w
        return squares.sum(0).sum(-1), sums


def inverse_of(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """1/a and -b/a, what a weight is multiplied by and what is added to give its level."""
    inverse = torch.where(a.abs() < _NONE, 0, a.reciprocal())
    return inverse, None if b is None else -b * inverse


def levels_of(kind: BlockType, values: Tensor) -> Tensor:
    """The level nearest to each value, written over it."""
    if kind.uniform:
        return values.round_().clamp_(kind.levels[0], kind.levels[-1])
    least, most = kind.levels[0], kind.levels[-1]
    place = values.sub_(least).mul_(2).ceil_().clamp_(0, 2 * (most - least)).int().clamp_(min=0)  # NaN is below it
    return torch.index_select(_nearest_by_halves(kind), 0, place.view(-1), out=values.view(-1)).view_as(values)


def _nearest_by_halves(kind: BlockType) -> Tensor:
    """The level nearest to least, least + ½ and so on to most; what lies between two of them has the upper one's, as
    half-way between two whole numbers is one of them."""
    halves = torch.arange(0, 2 * (kind.levels[-1] - kind.levels[0]) + 1) / 2 + kind.levels[0]
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    return levels[torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2)]
