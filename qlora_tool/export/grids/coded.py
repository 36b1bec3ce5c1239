"""A matrix on a grid: where its weights lie, and how values of that grid become what a file holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from qlora_tool.export.grids.block_types import Blocks, BlockType
from qlora_tool.export.grids.fit import fit, index_of, joined, nearest
from qlora_tool.export.grids.grid import Grid, Scales
from qlora_tool.ops.quantization import NESTED_BLOCK_SIZE, code_values
from qlora_tool.weights.quantized import QuantizedTensor

AT_A_TIME = 1 << 22  # weights; bounds what is held beside a matrix

Form = TypeVar("Form")


@dataclass(frozen=True)
class Coded(Generic[Form]):
    """A matrix (out, in) on a grid.

    Attributes:
        grid: its values, scales and all.
        values: where its weights lie, fp32.
        form: a grid with scales that these may be and values that lie on it → what a file holds.
    """

    grid: Grid
    values: Tensor
    form: Callable[[Grid, Tensor], Form]

    def copy(self) -> Coded[Form]:
        """One whose values and scales may change by themselves."""
        return replace(self, grid=self.grid.copy(), values=self.values.clone())

    def finished(self) -> Form:
        """What a file holds."""
        return self.form(self.grid, self.values)


def coded_blocks(kind: BlockType, weight: Tensor, importance: Tensor | None = None) -> Coded[Tensor]:
    """A matrix in GGUF's blocks, their scales fitted to it.

    Args:
        kind: of the blocks.
        weight: (out, in) fp32, in a multiple of the block's size.
        importance: of each column's squared errors, (in,); by default all count alike.

    Returns:
        Finished it is uint8, (out, bytes of a row).
    """
    blocks = fitted(kind, weight, importance)
    out, width = len(weight), kind.weights // kind.sub_blocks
    a, b = (part.reshape(out, -1) for part in kind.coefficients(blocks))
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    # Those of k-types hang together; to move Q6_K's took two layers of a 7B from 1.9 to 2.1 times their bare products.
    scales = None if kind.affine or kind.steps else Scales(dtype=torch.float16)
    grid = Grid(levels, kind.uniform, a, b if kind.affine else None, width, scales)

    def form(grid: Grid, values: Tensor) -> Tensor:
        a, index = grid.a, torch.empty(values.shape, dtype=torch.uint8)
        step = max(1, AT_A_TIME // values.shape[1])
        for first in range(0, out, step):
            part = slice(first, first + step)
            away = values[part].unflatten(1, (-1, width)) - b[part].unsqueeze(-1)
            scale = a[part].unsqueeze(-1)
            index[part] = index_of(kind, nearest(kind, torch.where(scale == 0, 0, away / scale))).flatten(1)
        made = replace(blocks, index=index.view(-1, kind.weights))
        if grid.scales is not None:
            made = replace(made, d=a.reshape(-1).half())
        return packed(kind, made, out)

    return Coded(grid, kind.values(blocks).view_as(weight), form)


def fitted(kind: BlockType, weight: Tensor, importance: Tensor | None = None) -> Blocks:
    """The blocks of a matrix (out, in), fitted some rows at a time; see `coded_blocks`."""
    step = max(1, AT_A_TIME // weight.shape[1])
    parts = []
    for rows in weight.split(step):
        own = None if importance is None else importance.expand_as(rows).reshape(-1, kind.weights)
        parts.append(fit(kind, rows.reshape(-1, kind.weights), own))
    return joined(parts)


def packed(kind: BlockType, blocks: Blocks, rows: int) -> Tensor:
    """The bytes of a matrix's blocks, (rows, bytes of a row)."""
    step = max(1, AT_A_TIME // kind.weights)
    parts = []
    for first in range(0, len(blocks.index), step):
        part = slice(first, first + step)
        parts.append(kind.pack(Blocks(*(
            None if (field := getattr(blocks, name)) is None else field[part]
            for name in ("index", "d", "m", "scales", "mins")
        ))))  # fmt: skip
    return torch.cat(parts).view(rows, -1)


def coded_4bit(weight: QuantizedTensor) -> Coded[QuantizedTensor]:
    """A matrix in bitsandbytes' 4 bits, with the scales that it has.

    Returns:
        Finished it is a `QuantizedTensor` with the same scales of scales.
    """
    columns = weight.shape[1]
    width = math.gcd(columns, weight.block_size)  # of a row, within one block whatever row it is
    table = code_values(weight.kind, weight.device)
    levels, order = table.sort()
    one = int(table.argmax())  # the code of 1
    ones = torch.full_like(weight.codes, one << 4 | one)
    a = replace(weight, codes=ones, dtype=torch.float32).dequantize()[:, ::width]
    scales = _nested_scales(weight) if width == weight.block_size else None
    grid = Grid(levels, False, a.contiguous(), None, width, scales)

    def form(grid: Grid, values: Tensor) -> QuantizedTensor:
        scale = grid.a.unsqueeze(-1)
        share = torch.where(scale == 0, 0, values.unflatten(1, (-1, width)) / scale).flatten()
        code = order[torch.bucketize(share, (levels[1:] + levels[:-1]) / 2)].to(torch.uint8)
        if len(code) % 2:
            code = torch.cat([code, code.new_zeros(1)])
        made = replace(weight, codes=code[0::2] << 4 | code[1::2])
        if scales is None:
            return made
        return replace(made, scales=scales.index(grid.a).flatten().to(torch.uint8) if made.double_quant
                       else grid.a.flatten())  # fmt: skip

    return Coded(grid, weight.dequantize(torch.float32), form)


def _nested_scales(weight: QuantizedTensor) -> Scales:
    """What the scales of 4 bits may be: quantized twice, those with the same scales of their own."""
    if weight.nested_scales is None or weight.nested_offset is None:
        return Scales()
    unit = weight.nested_scales.repeat_interleave(NESTED_BLOCK_SIZE)[: weight.scales.numel()]
    return Scales(unit.view(weight.shape[0], -1), float(weight.nested_offset), code_values("nested", weight.device))
