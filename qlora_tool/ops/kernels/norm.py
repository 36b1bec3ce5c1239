"""RMSNorm in one pass over memory: a program holds whole rows, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qlora_tool.ops.kernels import on_device_of

_NUMBERS = 4096  # that one program holds at least, where rows are short: several rows


@triton.jit
def _forward(
    x_at, update_at, weight_at, sum_at, y_at, scale_at, rows, width, eps, offset,
    ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    x = tl.load(x_at + place, mask=there, other=0).to(tl.float32)
    if update_at is not None:
        x = (x + tl.load(update_at + place, mask=there, other=0).to(tl.float32)).to(sum_at.dtype.element_ty)
        tl.store(sum_at + place, x, mask=there)
        x = x.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    y = x * scale[:, None]
    if weight_at is not None:
        if ROUNDS:
            y = y.to(y_at.dtype.element_ty).to(tl.float32)
        weight = tl.load(weight_at + column, mask=column < width, other=0).to(tl.float32) + offset
        y = y * weight[None, :]
    tl.store(y_at + place, y.to(y_at.dtype.element_ty), mask=there)
    tl.store(scale_at + row, scale, mask=row < rows)


@triton.jit
def _backward(
    grad_at, passed_at, x_at, weight_at, scale_at, result_at, rows, width, offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    scale = tl.load(scale_at + row, mask=row < rows, other=0)
    unit = tl.load(x_at + place, mask=there, other=0).to(tl.float32) * scale[:, None]
    through = tl.load(grad_at + place, mask=there, other=0).to(tl.float32)
    if weight_at is not None:
        weight = tl.load(weight_at + column, mask=column < width, other=0).to(tl.float32) + offset
        through = through * weight[None, :]
    mean = tl.sum(through * unit, axis=1) / width
    result = (through - unit * mean[:, None]) * scale[:, None]
    if passed_at is not None:
        result += tl.load(passed_at + place, mask=there, other=0).to(tl.float32)
    tl.store(result_at + place, result.to(result_at.dtype.element_ty), mask=there)


def _laid_out(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """How many programs, the numbers of a row, and the sizes of a program."""
    width = x.shape[-1]
    columns = triton.next_power_of_2(width)
    rows = max(1, _NUMBERS // columns)
    warps = min(16, max(4, columns * rows // 512))
    return triton.cdiv(x.numel() // width, rows), width, {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def forward(
    x: Tensor, update: Tensor | None, weight: Tensor | None, eps: float, offset: float, rounds: bool,
    total: Tensor | None, y: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    """Write total = x + update, y = (offset + weight)·total·scale, and scale = 1/√(mean(total²) + ε).

    Args:
        x, y: (…, N) of one dtype, fp32, bf16 or fp16, contiguous; N at most 65536.
        update, total: likewise; both None: x itself is normalized.
        weight: (N,), contiguous; None: ones.
        rounds: round total·scale to the dtype of y before the product.
        scale: fp32 (…), contiguous.
    """
    if x.numel() == 0:
        return
    programs, width, sizes = _laid_out(x)
    with on_device_of(x):
        _forward[(programs,)](
            x, update, weight, total, y, scale, x.numel() // width, width, eps, offset, rounds, **sizes
        )


def backward(
    grad: Tensor, passed: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor, offset: float, result: Tensor
) -> None:
    """Write the gradient of x, plus `passed`; arguments as those of `forward`, all contiguous."""
    if x.numel() == 0:
        return
    programs, width, sizes = _laid_out(x)
    with on_device_of(x):
        _backward[(programs,)](grad, passed, x, weight, scale, result, x.numel() // width, width, offset, **sizes)
