"""Rotary position embeddings: a program turns some heads of one token, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qlora_tool.ops.kernels import on_device_of

_NUMBERS = 2048  # of each half that one program holds, about


@triton.jit
def _turn(
    x_at, y_at, cos_at, sin_at, place, row, token, head, heads, length, stride_row, stride_token, stride_head,
    stride_column, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    head = head.to(tl.int64)
    n = tl.arange(0, HALF)
    has = n < WIDTH // 2
    cos1 = tl.load(cos_at + n, mask=has, other=0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_at + n, mask=has, other=0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_at + WIDTH // 2 + n, mask=has, other=0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_at + WIDTH // 2 + n, mask=has, other=0).to(tl.float32)[None, :]
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    there = (head < heads)[:, None] & has[None, :]
    x_at += row * stride_row + token * stride_token + head[:, None] * stride_head
    y_at += (place * heads + head[:, None]) * HEAD_DIM
    x1 = tl.load(x_at + n[None, :] * stride_column, mask=there, other=0).to(tl.float32)
    x2 = tl.load(x_at + (WIDTH // 2 + n)[None, :] * stride_column, mask=there, other=0).to(tl.float32)
    tl.store(y_at + n[None, :], (x1 * cos1 - x2 * sin1).to(y_at.dtype.element_ty), mask=there)
    tl.store(y_at + WIDTH // 2 + n[None, :], (x2 * cos2 + x1 * sin2).to(y_at.dtype.element_ty), mask=there)
    if WIDTH < HEAD_DIM:
        m = WIDTH + tl.arange(0, REST)
        there = (head < heads)[:, None] & (m < HEAD_DIM)[None, :]
        tl.store(y_at + m[None, :], tl.load(x_at + m[None, :] * stride_column, mask=there, other=0), mask=there)


@triton.jit
def _rotate(
    q_at, k_at, cos_at, sin_at, q_to, k_to, length, stride_angles, q_heads, k_heads,
    q_row, q_token, q_head, q_column, k_row, k_token, k_head, k_column,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)  # of the token, over all rows
    row, token = place // length, place % length
    cos_at += row * stride_angles + token * WIDTH
    sin_at += row * stride_angles + token * WIDTH
    group, of_q = tl.program_id(1), tl.cdiv(q_heads, HEADS)
    if group < of_q:
        head = group * HEADS + tl.arange(0, HEADS)
        _turn(q_at, q_to, cos_at, sin_at, place, row, token, head, q_heads, length, q_row, q_token, q_head, q_column,
              HEAD_DIM, WIDTH, TRANSPOSED, HALF, REST)  # fmt: skip
    else:
        head = (group - of_q) * HEADS + tl.arange(0, HEADS)
        _turn(k_at, k_to, cos_at, sin_at, place, row, token, head, k_heads, length, k_row, k_token, k_head, k_column,
              HEAD_DIM, WIDTH, TRANSPOSED, HALF, REST)  # fmt: skip


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool, rotated_q: Tensor, rotated_k: Tensor
) -> None:
    """Write the rotated queries and keys, or with `transposed` the gradients of q and k from those of the rotated.

    Args:
        q, k: (rows, length, heads, head_dim), of any strides.
        cos, sin: (rows or 1, length, R), contiguous.
        rotated_q, rotated_k: of the shapes of q and k, contiguous.
    """
    rows, length, q_heads, head_dim = q.shape
    k_heads, width = k.shape[2], cos.shape[-1]
    if rows * length == 0:
        return
    half = triton.next_power_of_2(max(1, width // 2))
    heads = min(triton.next_power_of_2(max(q_heads, k_heads, 1)), max(1, _NUMBERS // half))
    groups = triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads)
    if groups == 0:
        return
    with on_device_of(q):
        _rotate[(rows * length, groups)](
            q, k, cos, sin, rotated_q, rotated_k, length, 0 if cos.shape[0] == 1 else length * width, q_heads, k_heads,
            *q.stride(), *k.stride(), head_dim, width, transposed, heads, half,
            triton.next_power_of_2(max(1, head_dim - width)), num_warps=4,
        )  # fmt: skip
