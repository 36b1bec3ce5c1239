"""bitsandbytes' 4-bit quantization on the CPU, bit for bit, in a fifth of its time, and on any device.

bitsandbytes finds the code of a weight by bisection among the 15 midpoints between the 16 values of the type. Here
[-1, 1] is cut into cells so narrow that none holds more than one midpoint: a table gives the code at the cell's lower
end and its midpoint, and one comparison decides. Every step rounds as IEEE 754 says, on a CUDA device too, where
bitsandbytes' own kernels divide less exactly.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

# Weights at a time. On a CPU their fp32 copies stay in the cache; a CUDA device is kept busy.
CHUNK, CUDA_CHUNK = 1 << 18, 1 << 20
_CELLS = 1024


class _Table(NamedTuple):
    """By cell: how many midpoints lie below it, uint8; the midpoint inside of it, fp32, infinity where there is none.
    `order`: the code of each rank, uint8; None where that is the rank itself (nf4)."""

    below: Tensor
    midpoint: Tensor
    order: Tensor | None


def quantize_blocks(weights: Tensor, kind: str, block_size: int, codes: Tensor, scales: Tensor) -> bool:
    """What `torch.ops.bitsandbytes.quantize_4bit` gives on the CPU, on the device of the weights.

    Args:
        weights: fp32, bf16 or fp16, (n,), n a multiple of the block size.
        kind: nf4 or fp4.
        block_size: weights that share a scale.
        codes: uint8, written to up to n/2.
        scales: fp32, written to up to n/block_size.

    Returns:
        Whether it was done; not where a weight is not finite.
    """
    chunk = _chunk(weights.device.type, block_size)
    for start in range(0, weights.numel(), chunk):
        blocks = weights[start : start + chunk].view(-1, block_size).float()
        largest = blocks.abs().amax(1)  # (blocks,)
        if not largest.isfinite().all():
            return False
        scales[start // block_size :][: len(largest)] = largest
        scaled = (blocks * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).view(-1)
        del blocks
        found = _codes(scaled, table(kind, weights.device))
        codes[start // 2 :][: len(found) // 2] = (found[::2] << 4) | found[1::2]
        del scaled, found  # before the next chunk's are made
    return True


def _codes(scaled: Tensor, table: _Table) -> Tensor:
    """The code of each value of [-1, 1], uint8."""
    cells = _cell(scaled)
    ranks = table.below.index_select(0, cells).add_(scaled > table.midpoint.index_select(0, cells))
    return ranks if table.order is None else table.order.index_select(0, ranks.int())


def _chunk(device: str, block_size: int) -> int:
    return (CUDA_CHUNK if device == "cuda" else CHUNK) // block_size * block_size


def workspace(weights: Tensor, block_size: int, device: str) -> int:
    """Bytes that `quantize_blocks` takes at once: of a chunk its values in [-1, 1] (fp32), their cells (int32), the
    midpoints there (fp32), the ranks and what is added to them; and what the blocks are multiplied by (fp32)."""
    count = min(_chunk(device, block_size), weights.numel())
    return 14 * count + 4 * (count // block_size)


def _cell(scaled: Tensor) -> Tensor:
    """The cell of each value of [-1, 1], int32. It never falls as the value grows, which is all that counts."""
    return ((scaled + 1) * (_CELLS / 2)).int()


@functools.cache
def table(kind: str, device: torch.device) -> _Table:
    """What a process keeps for one kind on a device."""
    if device.type != "cpu":
        below, midpoint, order = table(kind, torch.device("cpu"))
        return _Table(below.to(device), midpoint.to(device), None if order is None else order.to(device))
    values, order = bnb.get_4bit_type(kind, device="cpu").sort()
    midpoints = (values[:-1] + values[1:]) / 2
    below, inside = torch.zeros(_CELLS + 1, dtype=torch.uint8), torch.full((_CELLS + 1,), torch.inf)
    for cell, midpoint in zip(_cell(midpoints).tolist(), midpoints, strict=True):
        if inside[cell] != torch.inf:
            raise ValueError(f"{kind}: two midpoints in one cell")
        below[cell + 1 :] += 1
        inside[cell] = midpoint
    return _Table(below, inside, None if order.equal(torch.arange(16)) else order.to(torch.uint8))
