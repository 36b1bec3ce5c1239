"""Rotary position embeddings of queries and keys in one pass over memory each way.

The first R numbers of a head are rotated, halves against each other (R is the head's width in most families); what
comes after them is left as it is:

    y₁ = x₁·c₁ - x₂·s₁        y₂ = x₂·c₂ + x₁·s₂

Nothing is kept for backward but the cosines and sines, which all layers share. Results have memory of their own:
writing over q and k would save none at a step's peak, and a gradient may be someone else's too.

Source: RoFormer (Su et al. 2021, arXiv 2104.09864), equation 34, with the pairs (n, n + R/2) that GPT-NeoX takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_tool.ops.declare import declare
from qlora_tool.ops.kernels import usable


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_first: bool = True) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions; results in their dtypes, laid out token by token.

    Args:
        q, k: (rows, heads, length, head_dim), each with its own number of heads; or (rows, length, heads, head_dim).
        cos, sin: (rows or 1, length, R), R even and at most head_dim; constants.
        heads_first: which of the two.
    """
    if heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = _Rotary.apply(q, k, cos, sin)
    return (q.transpose(1, 2), k.transpose(1, 2)) if heads_first else (q, k)


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_first: bool = True) -> tuple[Tensor, Tensor]:
    """The same by autograd."""
    dim = 1 if heads_first else 2
    cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1).to(x.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotary(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor):
        return *_rotary(grad_q, grad_k, *ctx.saved_tensors, True), None, None


# ---------------------------------------------------------------------------------------------------------- operation


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    results = _shapes(q, k, cos, sin, transposed)
    half = cos.shape[-1] // 2
    (cos1, cos2), (sin1, sin2) = (angles.unsqueeze(2).split(half, dim=-1) for angles in (cos, sin))
    if transposed:
        sin1, sin2 = sin2, sin1
    sign = 1 if transposed else -1
    for x, result in zip((q, k), results, strict=True):
        first, second = x[..., :half], x[..., half : 2 * half]
        result[..., :half] = (first * cos1).addcmul_(second, sin1, value=sign)
        result[..., half : 2 * half] = (second * cos2).addcmul_(first, sin2, value=-sign)
        result[..., 2 * half :] = x[..., 2 * half :]
    return results


def _workspace(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> int:
    """Half of what is turned, of q or k, and in the angles' dtype once more where that is wider."""
    half = max(q.shape[2], k.shape[2]) * q.shape[0] * q.shape[1] * (cos.shape[-1] // 2)
    wide = torch.promote_types(q.dtype, cos.dtype)
    return half * wide.itemsize * (1 if wide == q.dtype else 2)


def _cuda(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    if not usable(q.device):
        return _reference(q, k, cos, sin, transposed)
    from qlora_tool.ops.kernels import rotary as kernels

    results = _shapes(q, k, cos, sin, transposed)
    kernels.rotate(q, k, cos.contiguous(), sin.contiguous(), transposed, *results)
    return results


def _shapes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _copied(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_contiguous())


# q, k (rows, length, heads, head_dim) → both rotated; or, transposed, gradients of what was rotated → those of q and k.
_rotary = declare(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)",
    reference=_reference,
    shapes=_shapes,
    versions={"cuda": _cuda},
    workspace={"cpu": _workspace, "cuda": lambda q, k, cos, sin, transposed: _copied(cos, sin)},
)
