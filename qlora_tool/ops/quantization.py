"""Weights into 4 and 8 bits and back, bit-identical to what bitsandbytes makes of them on a CPU, on every device.

What is trained on a card is so what an export makes on a CPU. bitsandbytes' own kernels for CUDA round otherwise, and
give a block of zeros another code, so they quantize nothing here. One number is not its own: the mean of more than
32768 scales, of which its last bit depends on the number of threads.

4 bits: the weights, flat, in blocks of one fp32 scale each, two codes a byte, the first in the high half. Under double
quantization the scales, less their mean, are 8-bit codes themselves, in blocks of 256. int8: one fp32 scale a row.

Sources: QLoRA (Dettmers et al. 2023, arXiv 2305.14314) for nf4 and double quantization; LLM.int8() (Dettmers et al.
2022, arXiv 2208.07339) for int8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.ops import kernels, quantize_by_table
from qlora_tool.ops.declare import declare, target_of

NESTED_BLOCK_SIZE = 256  # scales that share one scale of their own
SERIAL = 32768  # numbers that PyTorch sums in one thread (at::internal::GRAIN_SIZE)
INT8_STEP = 7.874015718698502e-3  # 1/127, as bitsandbytes writes it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that bitsandbytes' operators know
PIECE = 1 << 20  # weights at a time: fp32 copies stay a few MB


@functools.cache
def code_values(name: str, device: torch.device) -> Tensor:
    """bitsandbytes' table of values, fp32: `nested` (256 values, for scales), `nf4` or `fp4` (16)."""
    return bnb.create_dynamic_map().to(device) if name == "nested" else bnb.get_4bit_type(name, device=device)


def make_tables(device: torch.device) -> None:
    """Make what a process keeps for these operations, a few KB, which do not count as memory of any step."""
    code_values("nested", device)
    for kind in ("nf4", "fp4"):
        code_values(kind, device)
        quantize_by_table.table(kind, device)
    kernels.usable(device)


# ---------------------------------------------------------------------------------------------------- into 4 bits


def _quantize_4bit_reference(weights: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    piece = PIECE // block_size * block_size
    codes, scales = _empty_4bit(weights, kind, block_size)
    for start in range(0, weights.numel(), piece):
        stop = min(start + piece, weights.numel())
        found = torch.ops.bitsandbytes.quantize_4bit.default(weights[start:stop], block_size, kind, torch.uint8)
        if start == 0 and stop == weights.numel():
            return found[0].view(-1), found[1]
        codes[start // 2 : -(-stop // 2)] = found[0].view(-1)
        scales[start // block_size : -(-stop // block_size)] = found[1]
    return codes, scales


def _quantize_4bit(weights: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """The table's way for whole blocks; the reference, on the CPU, for a rest and for weights that are not finite."""
    codes, scales = _empty_4bit(weights, kind, block_size)
    whole = weights.numel() // block_size * block_size
    quick = quantize_by_table.quantize_blocks(weights[:whole], kind, block_size, codes, scales)
    if not quick or whole < weights.numel():
        begin = whole if quick else 0
        rest_codes, rest_scales = _quantize_4bit_reference(weights[begin:].cpu(), kind, block_size)
        codes[begin // 2 :].copy_(rest_codes)
        scales[begin // block_size :].copy_(rest_scales)
    return codes, scales


def _empty_4bit(weights: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    count = weights.numel()
    codes = weights.new_empty(-(-count // 2), dtype=torch.uint8)
    return codes, weights.new_empty(-(-count // block_size), dtype=torch.float32)


quantize_4bit = declare(  # (n,) → codes, uint8 (n/2,), and scales, fp32 (blocks,)
    "quantize_4bit(Tensor weights, str kind, int block_size) -> (Tensor, Tensor)",
    reference=_quantize_4bit_reference,
    shapes=_empty_4bit,
    versions=dict.fromkeys(("cpu", "cuda"), _quantize_4bit),
    workspace={
        "cpu": lambda weights, kind, block_size: quantize_by_table.workspace(weights, block_size, "cpu"),
        "cuda": lambda weights, kind, block_size: quantize_by_table.workspace(weights, block_size, "cuda"),
    },
)


def _quantize_scales_reference(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offset = _mean(scales)
    codes, nested = torch.ops.bitsandbytes.quantize_blockwise.default(
        scales - offset, code_values("nested", scales.device), NESTED_BLOCK_SIZE
    )
    return codes, nested, offset


def _mean(scales: Tensor) -> Tensor:
    """The mean, the same whatever the number of threads: PyTorch sums up to 32768 numbers in one of them."""
    if scales.numel() <= SERIAL:
        return scales.mean()
    total = math.fsum(part.sum(dtype=torch.float64).item() for part in scales.split(SERIAL))
    return scales.new_tensor(total / scales.numel())


def _quantize_scales_cuda(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the CPU: there are few."""
    codes, nested, offset = _quantize_scales_reference(scales.cpu())
    return codes.to(scales.device), nested.to(scales.device), offset.to(scales.device)


def _empty_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nested = scales.new_empty(-(-scales.numel() // NESTED_BLOCK_SIZE))
    return torch.empty_like(scales, dtype=torch.uint8), nested, scales.new_empty(())


quantize_scales = declare(  # (blocks,) → codes, uint8 (blocks,), their scales, fp32 (blocks/256,), and the mean, ()
    "quantize_scales(Tensor scales) -> (Tensor, Tensor, Tensor)",
    reference=_quantize_scales_reference,
    shapes=_empty_scales,
    versions={"cuda": _quantize_scales_cuda},
    workspace={"cpu": lambda scales: max(scales.nbytes, 8 * SERIAL * (scales.numel() > SERIAL))},  # less the mean
)


# ------------------------------------------------------------------------------------------------------ and back


def _dequantize_4bit_reference(
    codes: Tensor, scales: Tensor, nested_scales: Tensor | None, nested_offset: Tensor | None,
    kind: str, block_size: int, first_block: int, shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if len(shape) == 3:
        dense = codes.new_empty(shape, dtype=dtype)
        for index, one in enumerate(dense):
            nested, offset = (None if part is None else part[index] for part in (nested_scales, nested_offset))
            one.copy_(_dequantize_4bit_reference(
                codes[index], scales[index], nested, offset, kind, block_size, first_block, shape[1:], dtype
            ))  # fmt: skip
        return dense
    if nested_scales is not None:
        nested_map = code_values("nested", scales.device)
        scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
            scales, nested_scales, nested_map, NESTED_BLOCK_SIZE, torch.float32
        ).add_(nested_offset)
    count, width = math.prod(shape), _width(shape, block_size)
    scales = scales[first_block : first_block - (-count // block_size)]
    known = _made_in(dtype, codes.device.type)
    weight = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, scales, block_size, kind, (-(-count // width), width), known
    )
    return weight.view(-1)[:count].view(shape).to(dtype)


def _made_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """What bitsandbytes is asked for on the way to `dtype`: where it knows none, it leaves the memory as it was."""
    right = dtype in DTYPES and (dtype != torch.float16 or device != "cpu" or rounds_to_fp16())
    return dtype if right else torch.float32


@functools.cache
def rounds_to_fp16() -> bool:
    """Whether what bitsandbytes dequantizes to fp16 on the CPU is rounded to nearest, ties to even. Its library for
    CUDA (0.50), which is loaded for the CPU too where there is a card, rounds ties away from zero."""
    with _disable_current_modes():  # a prediction asks
        tie = torch.tensor([1 + 2**-11])  # between 1 and the next number
        codes = torch.full((32,), 0xFF, dtype=torch.uint8)  # of 1
        found = torch.ops.bitsandbytes.dequantize_4bit.default(codes, tie, 64, "nf4", (1, 64), torch.float16)
        return bool((found == 1).all())


def _width(shape: Sequence[int], block_size: int) -> int:
    """Columns that bitsandbytes is told of: a row that is not a whole number of blocks goes through flat.

    On CPUs with AVX-512 bitsandbytes 0.50 gives the weights of such a row the scales of other blocks where 16 divides
    it, and for odd ones it compiles an operator first.
    """
    count = math.prod(shape)
    if shape[1] % block_size == 0:
        return shape[1]
    return block_size if count % block_size == 0 else count + count % 2


def _dequantize_4bit_cuda(
    codes: Tensor, scales: Tensor, nested_scales: Tensor | None, nested_offset: Tensor | None,
    kind: str, block_size: int, first_block: int, shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """In one pass, without a copy of the scales."""
    if dtype not in DTYPES or not kernels.usable(codes.device):
        return _dequantize_4bit_reference(
            codes, scales, nested_scales, nested_offset, kind, block_size, first_block, shape, dtype
        )
    from qlora_tool.ops.kernels import dequantize

    dense = codes.new_empty(shape, dtype=dtype)
    dequantize.dequantize_4bit(
        codes.contiguous(), code_values(kind, codes.device), scales.contiguous(), code_values("nested", codes.device),
        nested_scales, nested_offset, block_size, NESTED_BLOCK_SIZE, first_block, dense,
    )  # fmt: skip
    return dense


def _empty_dense(codes, scales, nested_scales, nested_offset, kind, block_size, first_block, shape, dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def _dense_workspace(device, scales, nested_scales, shape, dtype) -> int:
    """Of the reference: the scales, and the weights in fp32 where they are made so first; one of several matrices."""
    if len(shape) == 3:
        even = math.prod(shape[1:]) + (math.prod(shape[1:]) % 2 if _made_in(dtype, device) == dtype else 0)
        return _dense_workspace(device, scales[0], nested_scales, shape[1:], dtype) + even * dtype.itemsize
    plain = 0 if nested_scales is None else 4 * scales.numel()
    return plain + (0 if _made_in(dtype, device) == dtype else 4 * -(-math.prod(shape) // 2) * 2)


def _dense_workspace_cpu(codes, scales, nested_scales, offset, kind, block_size, first_block, shape, dtype) -> int:
    return _dense_workspace("cpu", scales, nested_scales, shape, dtype)


def _dense_workspace_cuda(codes, scales, nested_scales, offset, kind, block_size, first_block, shape, dtype) -> int:
    if dtype in DTYPES and kernels.available(target_of(codes)):
        return 0
    return _dense_workspace("cuda", scales, nested_scales, shape, dtype)


# The codes of (out, in) weights and the scales of all of a matrix, of which `first_block` belongs to the first of these
# weights → the weights: code × scale in fp32, rounded once. Of (experts, out, in) all tensors have the expert first.
dequantize_4bit = declare(
    "dequantize_4bit(Tensor codes, Tensor scales, Tensor? nested_scales, Tensor? nested_offset, str kind, "
    "int block_size, int first_block, int[] shape, ScalarType dtype) -> Tensor",
    reference=_dequantize_4bit_reference,
    shapes=_empty_dense,
    versions={"cuda": _dequantize_4bit_cuda},
    workspace={"cpu": _dense_workspace_cpu, "cuda": _dense_workspace_cuda},
)


# ----------------------------------------------------------------------------------------------------------- int8


def _quantize_int8_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    return _quantize_int8(weight, lambda half: torch.ops.bitsandbytes.int8_vectorwise_quant.default(half)[:2])


def _quantize_int8_cuda(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As bitsandbytes does on a CPU."""

    def by_row(half: Tensor) -> tuple[Tensor, Tensor]:
        scales = half.abs().amax(1).float()
        return half.float().mul_(127.0 / scales.unsqueeze(1)).round_().to(torch.int8), scales

    return _quantize_int8(weight, by_row)


def _quantize_int8(
    weight: Tensor, by_row: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    codes, scales = _empty_int8(weight)
    rows = _int8_rows(weight)
    for chunk, codes_part, scales_part in zip(*(tensor.split(rows) for tensor in (weight, codes, scales)), strict=True):
        half = chunk.to(torch.float16)  # as bitsandbytes' Int8Params does
        if not half.isfinite().all():
            raise ValueError("int8: the weight has values that are not numbers or lie beyond fp16's range (65504)")
        row_codes, row_scales = by_row(half)
        codes_part.copy_(row_codes)
        scales_part.copy_(row_scales)
        del half, row_codes, row_scales  # before the next piece's are made
    return codes, scales


def _int8_rows(weight: Tensor) -> int:
    return max(1, PIECE // weight.shape[1])


def _int8_workspace(weight: Tensor, each: int) -> int:
    """Of a piece its fp16 copy, where that is one, and `each` bytes a weight; two fp32 numbers a row."""
    rows = min(_int8_rows(weight), weight.shape[0])
    return rows * weight.shape[1] * (each + (2 if weight.dtype != torch.float16 else 0)) + 8 * rows


def _empty_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[0], dtype=torch.float32)


quantize_int8 = declare(  # (out, in) → codes, int8 (out, in), and scales, fp32 (out,); ValueError beyond fp16's range
    "quantize_int8(Tensor weight) -> (Tensor, Tensor)",
    reference=_quantize_int8_reference,
    shapes=_empty_int8,
    versions={"cuda": _quantize_int8_cuda},
    workspace={
        "cpu": lambda weight: _int8_workspace(weight, 8),  # quotients in fp32, and rounded ones
        "cuda": lambda weight: _int8_workspace(weight, 5),  # quotients in fp32, and codes
    },
)


INT8_CHUNK = 1 << 23  # int8 weights dequantized at a time: 32 MB of them in fp32


def _dequantize_int8_reference(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 or codes.numel() <= INT8_CHUNK:
        return codes.to(torch.float32).mul_(scales.unsqueeze(-1)).mul_(INT8_STEP).to(dtype)
    # A large one (an output projection) by rows: whole in fp32 it would take more than int8 saves.
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    parts = (tensor.flatten(0, -2).split(_chunk_rows(codes)) for tensor in (codes, scales.unsqueeze(-1), result))
    for part, part_scales, part_result in zip(*parts, strict=True):
        part_result.copy_(part.to(torch.float32).mul_(part_scales).mul_(INT8_STEP))
    return result


def _chunk_rows(codes: Tensor) -> int:
    return max(1, INT8_CHUNK // codes.shape[-1])


def _dequantize_int8_cuda(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """In one pass, without a copy in fp32."""
    if dtype not in DTYPES or not kernels.usable(codes.device):
        return _dequantize_int8_reference(codes, scales, dtype)
    from qlora_tool.ops.kernels import dequantize

    dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    dequantize.dequantize_int8(codes.contiguous(), scales.contiguous(), INT8_STEP, dense)
    return dense


def _int8_dense_workspace(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> int:
    """A copy in fp32, of all or of the rows of a chunk; in fp32 it is the result."""
    if dtype == torch.float32:
        return 0
    return 4 * (codes.numel() if codes.numel() <= INT8_CHUNK else _chunk_rows(codes) * codes.shape[-1])


def _int8_dense_workspace_cuda(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> int:
    one_pass = dtype in DTYPES and kernels.available(target_of(codes))
    return 0 if one_pass else _int8_dense_workspace(codes, scales, dtype)


# Codes, int8 (…, in), contiguous, and the scales of their rows, fp32 (…) → the weights: code × scale × step, each
# product rounded to fp32, the last one to `dtype` too.
dequantize_int8 = declare(
    "dequantize_int8(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
    reference=_dequantize_int8_reference,
    shapes=lambda codes, scales, dtype: codes.new_empty(codes.shape, dtype=dtype),
    versions={"cuda": _dequantize_int8_cuda},
    workspace={"cpu": _int8_dense_workspace, "cuda": _int8_dense_workspace_cuda},
)
