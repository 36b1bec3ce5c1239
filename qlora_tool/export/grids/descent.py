"""The codes of a matrix whose products come nearest to those of another one: coordinate descent, column by column.

What is made small is ‖(Q − W)X‖² = tr((Q − W)·H·(Q − W)ᵀ), H being the second moments of the inputs X, over all Q whose
weights lie on a grid. With all other columns held, the best column k is Q_k − G_k / H_kk, G = (Q − W)·H, each of its
weights brought to the nearest value of its own: a square's least on a grid is the value nearest to its least. Scales
are coordinates too: before the columns that share a scale a, a − ⟨G, L⟩ / ⟨L·H, L⟩, L being these columns' levels, is
its best, brought to the nearest value that a file can hold. So no step makes the sum larger. Columns go in blocks,
within which G is brought up to date by products of their own; between blocks it is made anew.

Source: the order of updates is that of GPTQ (Frantar et al. 2022, arXiv 2210.17323); going over all columns again from
a start, as CDQuant (Nair, Suggala 2024, arXiv 2406.17542) and QuantEase (Behdin et al. 2023, arXiv 2309.01885) do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_tool.export.grids.grid import Grid
from qlora_tool.export.grids.threads import on_every_core
from qlora_tool.ops.products import matmul

CLEARLY = 3  # standard deviations
DAMPING = 0.01  # of the moments' mean diagonal, added to the diagonal
BLOCK, INNER = 256, 32  # columns
FEW_DIRECTIONS = 40, 136  # that the updates of ranks up to 32 and 128 are looked for in
LEFT_OUT = 1e-5  # of an update's squares: what fp32 loses where a small one is the difference of two large matrices
FEW_ROWS = 512  # that tell how large the error of all of them is
Sweep = Callable[[Tensor, Tensor, Callable[[slice], Tensor], Tensor, Grid], None]
AT_A_TIME = 11 << 20  # weights of a part: bounds what each core holds beside the matrix
MOST_ROWS = 2048  # of a part: of more the columns leave a core's cache
WORTH_PARTS = 2048  # rows; of fewer a column takes as long as its operations take to be called, whatever its length


def damped(moments: Tensor) -> Tensor:
    """The moments (in, in) as the descent takes them, in place."""
    moments.diagonal().add_(DAMPING * float(moments.diagonal().mean()) or 1.0)
    return moments


def weighted_error(difference: Tensor, moments: Tensor) -> float:
    """tr(D·H·Dᵀ) of a difference (out, in)."""
    return sum(_dot(difference[part] @ moments, difference[part]) for part in _parts(difference))


def descend(
    target: Tensor, moments: Tensor, grid: Grid, values: Tensor, sweeps: int, slopes: torch.dtype = torch.float32
) -> Tensor:
    """Bring values on a grid, in place, nearer to a target in what products with the inputs make of them.

    Args:
        target: W, (out, in) fp32.
        moments: H, (in, in) fp32, `damped`.
        grid: where the values lie.
        values: to start from, (out, in) fp32; they are changed and returned.
        sweeps: over all columns.
        slopes: dtype of the products that G is made anew by. In bf16 what is left of the sum differed by less than
            5e-4 of it.
    """
    _descend(target, None, 0.0, moments, grid, values, sweeps, slopes)
    return values


def fit_scales(
    target: Tensor, moments: Tensor, grid: Grid, values: Tensor, slopes: torch.dtype = torch.float32
) -> None:
    """Give values on a grid the scales by which they come nearest to a target, levels held; see `descend`. It goes
    before the first sweep: codes that move first make up for scales that are wrong, and both stay so."""
    if grid.scales is not None:
        _descend(target, None, 0.0, moments, grid, values, 1, slopes, _sweep_scales)


def _parts(matrix: Tensor) -> list[slice]:
    """Rows of about one number, whatever the number of cores: an even one, where that pays."""
    rows = min(MOST_ROWS, max(1, AT_A_TIME // matrix.shape[1]))
    count = max(1, math.ceil(len(matrix) / rows))
    if len(matrix) >= WORTH_PARTS:
        count = 2 * math.ceil(count / 2)
    size = math.ceil(len(matrix) / count) or 1
    return [slice(first, first + size) for first in range(0, len(matrix), size)]


def _descend(
    trained: Tensor, update: Tensor | None, more: float, moments: Tensor, grid: Grid, values: Tensor, sweeps: int,
    slopes: torch.dtype, over: Sweep | None = None,
) -> None:
    """`descend` towards W + more · Δ, some rows at a time: each has its least by itself."""

    def work(part: slice) -> None:
        own = grid.of_rows(part)

        def target(columns: slice) -> Tensor:
            if update is None or not more:
                return trained[part, columns].T
            return torch.add(trained[part, columns], update[part, columns], alpha=more).T

        chosen = values[part].T.contiguous()  # (in, out): the weights of a column lie in one piece
        difference = torch.empty_like(chosen, dtype=slopes)
        for first in range(0, len(chosen), BLOCK):
            columns = slice(first, first + BLOCK)
            difference[columns] = chosen[columns] - target(columns)
        for _ in range(sweeps):
            (over or _sweep)(chosen, difference, target, moments, own)
        values[part] = chosen.T

    on_every_core(work, _parts(values))


def descend_keeping(
    trained: Tensor, update: Tensor, moments: Tensor, grid: Grid, values: Tensor, sweeps: int,
    slopes: torch.dtype = torch.float32,
) -> Tensor:
    """`descend` towards trained weights W = W₀ + Δ, so that none of the update Δ is missing.

    The codes nearest to W lack a share of Δ, since many weights go back to where W₀ lies on the grid. That lies the
    same way in every weight and adds up over a model, where other errors do not. So each sweep after the first goes
    towards W₀ + g·Δ, with g larger by the share that was missing: 1 − ⟨(Q − W₀)·H, Δ⟩ / ⟨Δ·H, Δ⟩. Of an update far
    below the grid's steps errors of any kind lie along Δ by chance; where the share is not clearly more than that, all
    sweeps go towards W.

    Args:
        trained, update: W and Δ, (out, in) fp32.
        moments, grid, values, sweeps, slopes: see `descend`; the values are changed here too.
    """
    weighted, more = _Weighted.of(update, moments), 0.0  # more: g - 1
    size = sum(weighted.dot(part, update[part]) for part in _parts(update))
    descend(trained, moments, grid, values, 1, slopes)
    for sweep in range(1, sweeps):
        if size:
            missing = -sum(weighted.dot(part, values[part] - trained[part]) for part in _parts(values)) / size
            chance = _by_chance(values, trained, moments) if sweep == 1 else 0.0
            if sweep == 1 and not CLEARLY * chance < missing * size**0.5 <= size**0.5:
                return descend(trained, moments, grid, values, sweeps - 1, slopes)
            more += missing
        _descend(trained, update, more, moments, grid, values, 1, slopes)
    return values


@dataclass(frozen=True)
class _Weighted:
    """Δ·H, by the few directions that the rows of an update have, where they are few, as those of LoRA are: Δ = Q·QᵀΔ,
    Q being an orthonormal base of what Δ makes of random directions (Halko et al. 2011, arXiv 0909.4061).

    Attributes:
        base: Q, (out, directions); None where they are not few.
        product: QᵀΔ·H, (directions, in), or else Δ·H.
    """

    base: Tensor | None
    product: Tensor

    @classmethod
    def of(cls, update: Tensor, moments: Tensor) -> _Weighted:
        for most in FEW_DIRECTIONS:
            if 4 * most > min(update.shape):
                break
            drawn = torch.randn(update.shape[1], most, generator=torch.Generator().manual_seed(0))
            base = torch.linalg.qr(update @ drawn).Q
            inside = base.T @ update
            if _dot(inside, inside) >= (1 - LEFT_OUT) * _dot(update, update):
                return cls(base, inside @ moments)
        return cls(None, update @ moments)

    def dot(self, part: slice, other: Tensor) -> float:
        """⟨Δ·H, D⟩ over some rows, D being theirs."""
        if self.base is None:
            return _dot(self.product[part], other)
        return _dot(self.product, self.base[part].T @ other)


def _by_chance(values: Tensor, trained: Tensor, moments: Tensor) -> float:
    """How long the part of an error (out, in) is that lies along any one direction by chance, as H measures it: its
    length over the root of the number of directions that H tells apart, out · (tr H)² / ‖H‖². Of many rows, some tell
    it: each has an error of its own."""
    every = max(1, len(values) // FEW_ROWS)
    away = values[::every] - trained[::every]
    directions = len(away) * float(moments.trace()) ** 2 / _dot(moments, moments)
    return (weighted_error(away, moments) / directions) ** 0.5


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vecdot(one, other).sum(dtype=torch.float64))


def _sweep(
    chosen: Tensor, difference: Tensor, target: Callable[[slice], Tensor], moments: Tensor, grid: Grid
) -> None:
    """Once over all columns: `chosen` Q and `difference` Q - W, (in, out) each, are changed in place; `target` gives W
    of some columns, and the dtype of the difference is that of the products that G is made by."""
    width, diagonal = grid.width, moments.diagonal().unsqueeze(1)
    inverse = 1 / diagonal
    for begin in range(0, len(chosen), BLOCK):
        end = min(begin + BLOCK, len(chosen))
        # G, (columns, out), each column by its H_kk.
        slope = matmul(moments[begin:end].to(difference.dtype), difference).float()
        slope.mul_(inverse[begin:end])
        own_moments = moments[begin:end, begin:end] * inverse[begin:end]
        for first in range(begin, end, INNER):
            last = min(first + INNER, end)
            if first % width == 0:
                at = first - begin
                _rescale(grid, first // width, chosen[first : first + width], slope[at:], own_moments[at:, at:],
                         diagonal[first : first + width])  # fmt: skip
            before = chosen[first:last].clone()
            own = slope[first - begin : last - begin]
            inner = own_moments[first - begin : last - begin, first - begin : last - begin].T.contiguous()
            both = zip(chosen[first:last].unbind(), own.unbind(), strict=True)
            for k, (row, its_slope) in enumerate(both, first):
                if k == first or k % width == 0:
                    columns = grid.columns(k // width)
                best = columns.nearest(row - its_slope)
                change = best - row
                row.copy_(best)
                if k + 1 < last:
                    own[k + 1 - first :].addr_(inner[k - first, k + 1 - first :], change)
            changes = chosen[first:last] - before
            difference[first:last] = chosen[first:last] - target(slice(first, last))
            if last < end:
                slope[last - begin :].addmm_(own_moments[last - begin :, first - begin : last - begin], changes)


def _sweep_scales(
    chosen: Tensor, difference: Tensor, target: Callable[[slice], Tensor], moments: Tensor, grid: Grid
) -> None:
    """The same over scales alone."""
    diagonal = moments.diagonal().unsqueeze(1)
    for begin in range(0, len(chosen), BLOCK):
        block = slice(begin, min(begin + BLOCK, len(chosen)))
        slope = matmul(moments[block].to(difference.dtype), difference).float() / diagonal[block]
        own_moments = moments[block, block] / diagonal[block]
        for k in range(begin, block.stop, grid.width):
            run, rest = slice(k, k + grid.width), slice(k - begin, None)
            _rescale(grid, k // grid.width, chosen[run], slope[rest], own_moments[rest, rest], diagonal[run])
        difference[block] = chosen[block] - target(block)


def _rescale(grid: Grid, index: int, run: Tensor, slope: Tensor, moments: Tensor, diagonal: Tensor) -> None:
    """Give the columns of a run their best scale.

    Args:
        index: of the run.
        run: its values, (width, out); changed in place, as the grid's a is.
        slope: of its columns and those that follow in a block, each by its H_kk, (columns, out); brought up to date.
        moments: of these columns, each row by its H_kk, (columns, columns).
        diagonal: H_kk of the run, (width, 1).
    """
    if grid.scales is None:
        return
    width, a = len(run), grid.a[:, index].clone()
    levels = grid.nearest_levels(run, a)
    along = (levels * slope[:width] * diagonal).sum(0)  # half the sum's slope, a step of all levels at once
    curvature = (levels * (moments[:width, :width] @ levels) * diagonal).sum(0)
    best = grid.scales.nearest(a - torch.where(curvature > 0, along / curvature, 0), index)
    best = torch.where(best.sign() == a.sign(), best, a)  # no level moves to the other side of 0
    slope.addmm_(moments[:, :width], (best - a) * levels)
    torch.mul(levels, best, out=run)
    grid.a[:, index] = best
