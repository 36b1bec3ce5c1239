"""Weights as others publish them in 8 and 4 bits: values in FP8 times scales, and blocks in MXFP4.

Each is multiplied in fp32 and rounded once, as transformers does (`Fp8Dequantize`, `Mxfp4Dequantize`), some rows at a
time: beside the stored weight and the result, little is ever held.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# FP4 in E2M1, by its four bits: sign, two of exponent, one of mantissa (OCP Microscaling Formats, table 5).
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_AT_ONCE = 1 << 20  # values in fp32


def dequantize_scaled(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None, *, packed: bool = False
) -> Tensor:
    """weight × scale, rounded once to `dtype`.

    Args:
        weight: (out, in) or (experts, out, in), in FP8 or int8; where `packed`, two FP4 values a byte, the first in the
            low half.
        scale: one for all, one a row, or one a block (rows of blocks, columns of blocks); with experts, for each. In
            float, or as the exponents of powers of two (E8M0, also as uint8).
        dtype: of the result.
        block: rows and columns of a block; None: as many blocks of one size as there are scales.

    Raises:
        ValueError: scales that do not fit the weight.
    """
    *experts, rows, stored_columns = weight.shape
    columns = stored_columns * (2 if packed else 1)
    grid = _as_grid(_scale_values(scale), tuple(experts), rows)
    height = _block_size(rows, grid.shape[-2], block[0] if block else None)
    width = _block_size(columns, grid.shape[-1], block[1] if block else None)
    result = torch.empty(*experts, rows, columns, dtype=dtype, device=weight.device)
    matrices = weight.reshape(-1, rows, stored_columns), grid.reshape(-1, *grid.shape[-2:])
    for values, scales, target in zip(*matrices, result.view(-1, rows, columns), strict=True):
        wide = scales.repeat_interleave(width, dim=1)[:, :columns]  # (rows of blocks, columns)
        for start in range(0, rows, height):
            for first in range(start, min(start + height, rows), step := max(1, _AT_ONCE // columns)):
                part = slice(first, min(first + step, start + height, rows))
                some = _unpacked(values[part], torch.float32) if packed else values[part].float()
                target[part] = some.mul_(wide[start // height])
    return result


def _scale_values(scale: Tensor) -> Tensor:
    """Scales in fp32; bytes are exponents above -127, as E8M0 has them."""
    return (scale.float() - 127.0).exp2() if scale.dtype == torch.uint8 else scale.float()


def _as_grid(scale: Tensor, experts: tuple[int, ...], rows: int) -> Tensor:
    """Scales as (*experts, rows of blocks, columns of blocks)."""
    lead = len(experts)
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(*experts, 1, 1)
    if scale.dim() == lead + 2 and tuple(scale.shape[:lead]) == experts:
        return scale
    if tuple(scale.shape) == (*experts, rows) or tuple(scale.shape) == experts:
        return scale.reshape(*experts, -1, 1)
    raise ValueError(f"scales of shape {tuple(scale.shape)} for a weight of {(*experts, rows)} rows")


def _block_size(length: int, blocks: int, asked: int | None) -> int:
    """Of a dimension. The last block of the size asked for may be short."""
    if blocks == 1:
        return length
    if asked and -(-length // asked) == blocks:
        return asked
    if length % blocks == 0:
        return length // blocks
    size = f"blocks of {asked}" if asked else "blocks of one size, and config.json names no weight_block_size"
    raise ValueError(f"{blocks} scales do not divide {length} rows or columns into {size}")


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Experts in MXFP4 as gpt-oss has them: each block of 32 values in FP4 times a power of two.

    Args:
        blocks: uint8 (experts, out, blocks, 16), two values a byte, the first in the low half.
        scales: uint8 (experts, out, blocks), exponents above -127.
        dtype: of the result.

    Returns:
        (experts, in, out), as the model's module has them; a view of (experts, out, in).

    Raises:
        ValueError: blocks and scales that do not fit together.
    """
    if blocks.dim() != 4 or blocks.shape[:-1] != scales.shape:
        raise ValueError(f"MXFP4 blocks of shape {tuple(blocks.shape)} with scales of {tuple(scales.shape)}")
    experts, rows, count, half = blocks.shape
    result = torch.empty(experts, rows, count * half * 2, dtype=dtype, device=blocks.device)
    step = max(1, _AT_ONCE // (count * half * 2))
    for expert in range(experts):
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            values = _unpacked(blocks[expert, part], dtype)  # (rows, blocks, 32)
            exponents = scales[expert, part].int().sub_(127).unsqueeze(-1)
            result[expert, part] = torch.ldexp(values, exponents).to(dtype).flatten(1)
    return result.transpose(1, 2)


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, n) bytes → (…, 2n) values of FP4."""
    pairs = torch.tensor(_pairs(), dtype=dtype, device=packed.device)  # (256, 2): by the byte
    return pairs[packed.contiguous().view(torch.uint8).int()].flatten(-2)


@functools.cache
def _pairs() -> tuple[tuple[float, float], ...]:
    return tuple((_FP4_VALUES[byte & 15], _FP4_VALUES[byte >> 4]) for byte in range(256))
