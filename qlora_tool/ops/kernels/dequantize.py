"""Weights of 4 and 8 bits back to floating point in one pass over memory.

Bit-equal to the references in `ops/quantization.py`, which take several: the same products in fp32 in the same order,
never fused (`enable_fp_fusion`), rounded once. A weight is written once; what is read for it is a byte of int8, or half
a byte of 4 bits and its block's share of a scale.

A thread makes the weights of 16 bytes, and neighbours lie beside each other: a warp writes 512 bytes in a row, out of
128 of 4-bit codes, a word a thread, or 256 of int8 where weights are 16-bit. No thread needs what another one has read,
and the table of the 16 values of 4 bits fits a line of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_tool.ops.kernels import on_device_of

_WEIGHTS = 4096  # that one program makes, 32 a thread
_WARPS = 4
_WIDTH = 16  # bytes that a thread writes at once


@triton.jit(do_not_specialize=["blocks", "nested_blocks", "first_block"])
def _dequantize_4bit(
    codes, values, scales, nested_values, nested_scales, nested_offset, result, size, count, blocks, nested_blocks,
    first_block, BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    codes += matrix * size
    scales += matrix * blocks
    result += matrix * count
    if nested_scales is not None:
        nested_scales += matrix * nested_blocks
        nested_offset += matrix
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)  # of EACH weights, in one block
    there = group * EACH < count
    if codes.dtype.element_ty == tl.uint8:
        place = group[:, None] * (EACH // 2) + tl.arange(0, EACH // 2)[None, :]
        packed = tl.load(codes + place, mask=place < size, other=0)
        first, second = tl.load(values + (packed >> 4)), tl.load(values + (packed & 15))
        value = tl.reshape(tl.join(first, second), (GROUPS, EACH))
    else:  # words of EACH weights, their lowest byte first, of a byte its high half first
        # Told of no neighbours, the compiler reads one word a thread, where its weights are made.
        word = tl.load(codes + tl.max_contiguous(group, 1), mask=there, other=0).to(tl.int32)
        value = tl.load(values + ((word[:, None] >> ((tl.arange(0, EACH) ^ 1) * 4)[None, :]) & 15))
    block = first_block + group * EACH // BLOCK_SIZE
    scale = tl.load(scales + block, mask=there, other=0)
    if nested_scales is not None:
        nested = tl.load(nested_scales + block // NESTED_BLOCK_SIZE, mask=there, other=0)
        scale = tl.load(nested_values + scale) * nested + tl.load(nested_offset)
    place = group[:, None] * EACH + tl.arange(0, EACH)[None, :]
    tl.store(result + place, (value * scale[:, None]).to(result.dtype.element_ty), mask=place < count)


def dequantize_4bit(
    codes: Tensor, values: Tensor, scales: Tensor, nested_values: Tensor | None, nested_scales: Tensor | None,
    nested_offset: Tensor | None, block_size: int, nested_block_size: int, first_block: int, result: Tensor,
) -> None:  # fmt: skip
    """Write value of the code × scale of the block; under double quantization the scale is the value of its code ×
    the scale of its own block + the offset.

    Args:
        codes: uint8, contiguous, two weights a byte, the first in the high half; read by words where they are some.
        values: fp32 (16,), those of the codes.
        scales: fp32 (blocks,), or uint8 under double quantization; contiguous.
        nested_values: fp32 (256,), those of the scales' codes.
        nested_scales: fp32, one for `nested_block_size` scales, contiguous; None without double quantization.
        nested_offset: fp32, of one element.
        block_size: weights that share a scale, a multiple of 8.
        nested_block_size: scales that share one of their own.
        first_block: the block of the first weight.
        result: fp32, bf16 or fp16, contiguous; as many weights as it has elements are written.

    Of several matrices of one shape `result` has three dimensions, and codes, scales and nested scales have two, the
    matrix first.
    """
    if result.numel() == 0:
        return
    matrices = result.shape[0] if result.dim() == 3 else 1
    count, size = result.numel() // matrices, codes.numel() // matrices
    each = _WIDTH // result.element_size()
    word = torch.int32 if each == 8 else torch.int16
    if size % word.itemsize == codes.data_ptr() % word.itemsize == codes.storage_offset() % word.itemsize == 0:
        codes, size = codes.view(word), size // word.itemsize  # for half of the instructions
    with on_device_of(result):
        _dequantize_4bit[(triton.cdiv(count, _WEIGHTS), matrices)](
            codes, values, scales, nested_values, nested_scales, nested_offset, result, size, count,
            scales.numel() // matrices, 0 if nested_scales is None else nested_scales.numel() // matrices,
            first_block, block_size, nested_block_size, _WEIGHTS // each, each,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _dequantize_int8(
    codes, scales, result, rows, width,
    STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # A thread must not read more at once than it writes, or it would have to pass some on.
    column = tl.program_id(1) * COLUMNS + tl.max_contiguous(tl.arange(0, COLUMNS), EACH)
    there = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(codes + place, mask=there, other=0).to(tl.float32)
    scale = tl.load(scales + row, mask=row < rows, other=0)
    tl.store(result + place, (value * scale[:, None] * STEP).to(result.dtype.element_ty), mask=there)


def dequantize_int8(codes: Tensor, scales: Tensor, step: float, result: Tensor) -> None:
    """Write code × scale of the row × step.

    Args:
        codes: int8 (…, in), contiguous.
        scales: fp32 (…), contiguous.
        step: the part of a scale that codes count.
        result: fp32, bf16 or fp16, of the shape of `codes`, contiguous.
    """
    if codes.numel() == 0:
        return
    width = codes.shape[-1]
    columns = min(_WEIGHTS, triton.next_power_of_2(width))
    rows, height = codes.numel() // width, _WEIGHTS // columns
    with on_device_of(result):
        _dequantize_int8[(triton.cdiv(rows, height), triton.cdiv(width, columns))](
            codes, scales, result, rows, width, step, height, columns, min(columns, _WIDTH // result.element_size()),
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
