"""The values that the weights of a matrix may take, and what their scales may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scales:
    """What scales (out, in / width) may be: unit · factor + offset.

    Attributes:
        unit: of each, fp32 of their shape.
        offset: of all.
        factors: ascending, fp32; None: any number of `dtype`.
    """

    unit: Tensor | None = None
    offset: float = 0.0
    factors: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def of_rows(self, rows: slice) -> Scales:
        return replace(self, unit=None if self.unit is None else self.unit[rows])

    def nearest(self, wanted: Tensor, index: int | slice = slice(None)) -> Tensor:
        """What comes nearest to those of a run of columns, (out,), or of all."""
        if self.unit is None or self.factors is None:
            most = torch.finfo(self.dtype).max
            return wanted.clamp(-most, most).to(self.dtype).float()
        unit = self.unit[:, index]
        return self.factors[self.index(wanted, index)].mul_(unit).add_(self.offset)

    def index(self, wanted: Tensor, index: int | slice = slice(None)) -> Tensor:
        """Which factors these are."""
        assert self.unit is not None and self.factors is not None
        unit = self.unit[:, index]
        share = torch.where(unit == 0, 0, (wanted - self.offset) / unit)
        return torch.bucketize(share, (self.factors[1:] + self.factors[:-1]) / 2)


@dataclass(frozen=True)
class Grid:
    """The values that the weights of a matrix (out, in) may take: a·level + b, a and b being those of `width` weights.

    Attributes:
        levels: ascending, fp32.
        uniform: whether they are whole numbers one after the other.
        a, b: (out, in / width) fp32; b is None where it is 0. The descent changes a in place.
        width: weights of a row that share them.
        scales: what a may be; None: it stays.
    """

    levels: Tensor
    uniform: bool
    a: Tensor
    b: Tensor | None
    width: int
    scales: Scales | None = None

    def copy(self) -> Grid:
        """One with an a of its own."""
        return replace(self, a=self.a.clone())

    def of_rows(self, rows: slice) -> Grid:
        """That of some rows, whose a is a view of this one's."""
        return replace(self, a=self.a[rows], b=None if self.b is None else self.b[rows],
                       scales=None if self.scales is None else self.scales.of_rows(rows))  # fmt: skip

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The least and the largest level."""
        return float(self.levels[0]), float(self.levels[-1])

    @cached_property
    def between(self) -> Tensor:
        """Half-way between each level and the next one."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    def nearest_levels(self, values: Tensor, a: Tensor) -> Tensor:
        """The levels of values that lie on the grid, a being theirs and b none."""
        share = values * torch.where(a == 0, 0, 1 / a)
        return self.levels[torch.bucketize(share, self.between, out_int32=True)]

    def values(self, index: Tensor) -> Tensor:
        """What indices (out, in) of levels stand for, fp32."""
        found = self.levels[index.int()].unflatten(1, (-1, self.width)) * self.a.unsqueeze(-1)
        if self.b is not None:
            found += self.b.unsqueeze(-1)
        return found.flatten(1)

    def columns(self, index: int) -> _Columns:
        """The values of the columns that share a and b, the index-th of such runs."""
        a, b = (None if part is None else part[:, index].contiguous() for part in (self.a, self.b))
        return _Columns(self, a, b)


@dataclass
class _Columns:
    grid: Grid
    a: Tensor  # (out,) each
    b: Tensor | None

    def __post_init__(self) -> None:
        self.inverse = torch.where(self.a == 0, 0, 1 / self.a)
        self.offset = None if self.b is None else -self.b * self.inverse

    def nearest(self, values: Tensor) -> Tensor:
        """The value of the grid nearest to each of a column's."""
        b, offset = self.b, self.offset
        found = values.mul_(self.inverse) if offset is None else torch.addcmul(offset, values, self.inverse)
        if self.grid.uniform:
            found = found.round_().clamp_(*self.grid.ends)
        else:
            found = self.grid.levels[torch.bucketize(found, self.grid.between, out_int32=True)]
        return found.mul_(self.a) if b is None else torch.addcmul(b, found, self.a)
