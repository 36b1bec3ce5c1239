"""Quantized matrices row by row, so that several can be joined into the experts of one weight without quantizing again.

A row that is a whole number of blocks has codes and scales of its own: what stacks and joins rows of weights (and
leaves their columns alone) can be done to codes and to scales instead. Scales that were quantized themselves, whose
blocks and mean belong to the whole matrix, become fp32 again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlora_tool.ops.quantization import NESTED_BLOCK_SIZE, code_values
from qlora_tool.weights.quantized import QuantizedTensor


def rows_of(weight: QuantizedTensor) -> tuple[Tensor, Tensor] | None:
    """(out, in) → codes (out, bytes of a row) and scales (out, scales of a row), fp32; None where blocks straddle."""
    out, width = weight.shape
    if weight.kind == "int8":
        return weight.codes, weight.scales.view(out, 1)
    if width % weight.block_size:
        return None
    return weight.codes.view(out, width // 2), _plain_scales(weight).view(out, width // weight.block_size)


def _plain_scales(weight: QuantizedTensor) -> Tensor:
    if weight.nested_scales is None or weight.nested_offset is None:
        return weight.scales
    table = code_values("nested", weight.device)
    scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
        weight.scales, weight.nested_scales, table, NESTED_BLOCK_SIZE, torch.float32
    )
    return scales.add_(weight.nested_offset)


def experts_from_rows(like: QuantizedTensor, codes: Tensor, scales: Tensor, shape: tuple[int, ...]) -> QuantizedTensor:
    """The weight (experts, out, in) that rows make, of the kind and dtype of `like`.

    Args:
        codes: (experts, out, bytes of a row).
        scales: (experts, out, scales of a row).

    Raises:
        ValueError: they are not the rows of such a weight.
    """
    experts, out, width = shape
    row = width if like.kind == "int8" else width // 2
    columns = 1 if like.kind == "int8" else width // like.block_size
    if tuple(codes.shape) != (experts, out, row) or tuple(scales.shape) != (experts, out, columns):
        raise ValueError(f"rows of codes {tuple(codes.shape)} and scales {tuple(scales.shape)} for a weight of {shape}")
    codes = codes if like.kind == "int8" else codes.reshape(experts, -1)
    return replace(like, shape=tuple(shape), codes=codes.contiguous(), scales=scales.reshape(experts, -1).contiguous(),
                   nested_scales=None, nested_offset=None)  # fmt: skip
