"""Products on frozen weights. Nothing is saved for backward but what the caller keeps anyway.

The weight is asked from its handle, in the dtype of the input, once forward and once backward; neither pass makes a
gradient of its shape. As backward needs no value of this operation's own, a checkpointed region that ends in it is
not recomputed up to it (non-reentrant checkpointing stops at the last value it needs).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qlora_tool.ops.products import matmul


class FrozenWeight(Protocol):
    """Whatever can give a frozen weight: kept on the device, in 4 bits, or elsewhere.

    Attributes:
        shape: (out, in), or (experts, out, in).
    """

    shape: tuple[int, ...]

    def dense(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The weight (out, in) in `dtype`; of one expert where there are several."""
        ...


def frozen_linear(x: Tensor, weight: FrozenWeight, expert: int | None = None) -> Tensor:
    """x (…, in) · Wᵀ → (…, out), W (out, in) frozen.

    Args:
        x: the input; the product runs in its dtype.
        weight: the handle of W.
        expert: which matrix of a three-dimensional weight.
    """
    y = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), weight, expert)
    return y.view(*x.shape[:-1], y.shape[1])  # out here: a view that the function gives could not be added to in place


class _FrozenLinear(torch.autograd.Function):
    """(n, in) · Wᵀ → (n, out)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: FrozenWeight, expert: int | None) -> Tensor:
        ctx.weight, ctx.expert = weight, expert  # the handle, not a tensor: nothing is kept
        return matmul(x, weight.dense(x.dtype, expert).T)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return matmul(grad, ctx.weight.dense(grad.dtype, ctx.expert)), None, None
