"""A step of AdamW with all weights in one launch.

Each program takes four blocks of 256 elements of one weight, and finds which weight that is by bisection in a table
that has a row a weight. The table comes from the host with each step, as gradients lie elsewhere each time, through
pinned memory, so that nobody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_tool.ops.kernels import on_device_of

_BLOCK = 256  # elements that share a scale of moments in 8 bits
_BLOCKS = 4  # of them, that one program takes
_WARPS = 4
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _nearest(codes, value):
    """The place of the value nearest to each of `value` among 256 ascending ones; of two as near, the first."""
    place = tl.zeros_like(value).to(tl.int32)
    for power in tl.static_range(8):
        further = place + (128 >> power)
        place = tl.where(tl.load(codes + further) <= value, further, place)
    above = tl.minimum(place + 1, 255)
    nearer = tl.load(codes + above) - value < value - tl.load(codes + place)
    return tl.where(nearer, above, place)


@triton.jit
def _address(entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(entry).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def _load_moment(moments, scales, codes, place, block, there):
    code = tl.load(moments + place, mask=there, other=0).to(tl.int32)
    scale = tl.load(scales + block, mask=there, other=0.0)
    return tl.load(codes + code) * scale


@triton.jit
def _store_moment(moment, moments, scales, codes, place, block, there, block_there):
    scale = tl.max(tl.where(there, tl.abs(moment), 0.0), axis=1)
    tl.store(scales + block, scale, mask=block_there)
    divisor = tl.where(scale > 0.0, scale, 1.0)[:, None] + tl.zeros_like(moment)
    tl.store(moments + place, _nearest(codes, tl.div_rn(moment, divisor)).to(tl.uint8), mask=there)


@triton.jit
def _adamw(
    addresses, numbers, first_codes, second_codes, factor, count,
    BISECTIONS: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPSILON: tl.constexpr,
    weight_type: tl.constexpr, gradient_type: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    low, high = program * 0, program * 0 + count
    for _ in range(BISECTIONS):
        middle = (low + high) // 2
        before = tl.load(addresses + middle) <= program
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    row = addresses + low
    block = (program - tl.load(row)) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    size = tl.load(row + count)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    there, block_there = place < size, block * BLOCK < size

    gradients = _address(row + 2 * count, gradient_type, ALIGNED)
    gradient = tl.load(gradients + place, mask=there, other=0.0).to(tl.float32)
    if factor is not None:
        gradient *= tl.load(factor)
    weights = _address(row + 3 * count, tl.int16 if weight_type == tl.bfloat16 else weight_type, ALIGNED)
    if weight_type == tl.bfloat16:
        exact = _address(row + 4 * count, tl.int16, ALIGNED)
        high_bits = tl.load(weights + place, mask=there, other=0).to(tl.int32) << 16
        bits = high_bits + tl.load(exact + place, mask=there, other=0).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)
    else:
        exact = _address(row + (4 if weight_type == tl.float16 else 3) * count, tl.float32, ALIGNED)
        master = tl.load(exact + place, mask=there, other=0.0)

    if first_codes is not None:
        moments = _address(row + 5 * count, tl.uint8, ALIGNED)
        squares = _address(row + 6 * count, tl.uint8, ALIGNED)
        moment_scales = _address(row + 7 * count, tl.float32, ALIGNED)
        square_scales = _address(row + 8 * count, tl.float32, ALIGNED)
        moment = _load_moment(moments, moment_scales, first_codes, place, block[:, None], there)
        square = _load_moment(squares, square_scales, second_codes, place, block[:, None], there)
    else:
        moments = _address(row + 5 * count, tl.float32, ALIGNED)
        squares = _address(row + 6 * count, tl.float32, ALIGNED)
        moment = tl.load(moments + place, mask=there, other=0.0)
        square = tl.load(squares + place, mask=there, other=0.0)

    moment = moment * BETA1 + gradient * (1 - BETA1)
    square = square * BETA2 + gradient * gradient * (1 - BETA2)
    kept, rate, correction = tl.load(numbers + low), tl.load(numbers + count + low), tl.load(numbers + 2 * count + low)
    denominator = tl.div_rn(tl.sqrt_rn(square), correction + tl.zeros_like(square)) + EPSILON
    master = master * kept - rate * tl.div_rn(moment, denominator)

    if first_codes is not None:
        _store_moment(moment, moments, moment_scales, first_codes, place, block, there, block_there)
        _store_moment(square, squares, square_scales, second_codes, place, block, there, block_there)
    else:
        tl.store(moments + place, moment, mask=there)
        tl.store(squares + place, square, mask=there)
    if weight_type == tl.bfloat16:
        bits = master.to(tl.int32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)  # one NaN, whose half rounds to itself
        tl.store(exact + place, bits.to(tl.int16), mask=there)
        tl.store(weights + place, ((bits + 0x8000) >> 16).to(tl.int16), mask=there)
    else:
        tl.store(exact + place, master, mask=there)
        if weight_type == tl.float16:
            tl.store(weights + place, master.to(tl.float16), mask=there)


def step(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], exact: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], first_scales: Sequence[Tensor], second_scales: Sequence[Tensor],
    codes: Sequence[Tensor], factor: Tensor | None, steps: Sequence[int], rates: Sequence[float], weight_decay: float,
    *, beta1: float, beta2: float, epsilon: float,
) -> None:  # fmt: skip
    """Take a step with each weight; the arguments are those of `ops.adamw.adamw`, and AdamW's three constants."""
    gradients = [_laid_out_as(*pair) for pair in zip(weights, gradients, strict=True)]
    sizes = [weight.numel() for weight in weights]
    programs = list(accumulate((triton.cdiv(size, _BLOCKS * _BLOCK) for size in sizes), initial=0))
    nothing = [0] * len(weights)
    columns = [programs[:-1], sizes]
    for tensors in (gradients, weights, exact, first, second, first_scales, second_scales):
        columns.append([tensor.data_ptr() for tensor in tensors] or nothing)
    numbers = [
        [1 - rate * weight_decay for rate in rates],
        [rate / (1 - beta1**number) for rate, number in zip(rates, steps, strict=True)],
        [(1 - beta2**number) ** 0.5 for number in steps],
    ]
    if programs[-1] == 0:
        return
    aligned = all(number % 16 == 0 for column in columns[1:] for number in column)
    device = weights[0].device
    tables = _to_device(columns, torch.int64, device), _to_device(numbers, torch.float32, device)
    with on_device_of(weights[0]):
        _adamw[(programs[-1],)](
            *tables, *(codes or (None, None)), factor, len(weights), len(weights).bit_length(),
            beta1, beta2, epsilon, _TYPES[weights[0].dtype], _TYPES[gradients[0].dtype], _BLOCK, _BLOCKS, aligned,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the weight's layout in memory."""
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)


def _to_device(values: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table on a device, without waiting for it."""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
