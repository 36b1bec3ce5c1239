"""Output projection and cross-entropy in chunks of rows: the logits of a chunk live only while it is worked on.

The gradient of the loss with respect to the hidden states is made in forward, chunk by chunk, so that what is kept
for backward is (rows, hidden), never (rows, vocabulary).

`frozen_cross_entropy` does it with a frozen projection: logits, probabilities and gradient of a chunk share one buffer,
and the weight is brought into the products' dtype once. `linear_cross_entropy` takes any projection, by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_tool.ops.declare import target_of
from qlora_tool.ops.linear import FrozenWeight
from qlora_tool.ops.products import matmul

CHUNK_BYTES, CHUNK_ROWS = 32 * 2**20, 128  # of fp32 logits at a time; and rows at least, which fill a product
CARD_BYTES, CARD_ROWS = 128 * 2**20, 512  # on a card, to which few rows are little work; and rows at most


@dataclass(frozen=True)
class LogitsTransform:
    """What a family does to its logits: `softcap`·tanh(scale·logits/`softcap`); without a cap, the scale alone."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def linear_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """The sum over rows of the cross-entropy of `project(hidden)` against `labels`.

    Args:
        hidden: (rows, hidden).
        labels: (rows,) token ids; -100 rows must have been dropped.
        project: hidden (n, hidden) → logits (n, vocabulary), differentiable in its input. Parameters of its own get no
            gradient this way: where they are trained, checkpoint the cross-entropy of some rows at a time.
        label_smoothing: share of the target spread evenly over the vocabulary.
        chunk_rows: rows of logits made at a time, 128 by default.

    Returns:
        A scalar in fp32.
    """
    chunk_rows = chunk_rows or CHUNK_ROWS
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _ChunkedLoss.apply(hidden, labels, project, label_smoothing, chunk_rows)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        total += _sum(project(hidden[rows]), labels[rows], label_smoothing)
    return total


def _sum(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, project, label_smoothing, chunk_rows):
        grad = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            with torch.enable_grad():
                chunk = hidden[rows].detach().requires_grad_()
                loss = _sum(project(chunk), labels[rows], label_smoothing)
            (grad[rows],) = torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None, None, None  # a scalar in fp32: rounded once, with the product


def frozen_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None = None,
    *,
    transform: LogitsTransform = LogitsTransform(),
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """The sum over rows of the cross-entropy of transform(hidden·Wᵀ + b) against `labels`.

    Args:
        hidden: (rows, hidden).
        labels: (rows,) token ids; -100 rows must have been dropped.
        weight: the handle of W (vocabulary, hidden), frozen.
        bias: (vocabulary,), frozen, or None.
        transform: what the family does to its logits.
        label_smoothing: share of the target spread evenly over the vocabulary.
        chunk_rows: rows of logits made at a time; by default 32 MiB of them, on a card 128 MiB and at most 512 rows; or
            128 rows where that is more.

    Returns:
        A scalar in fp32.
    """
    if chunk_rows is None:
        row = 4 * weight.shape[0]
        on_card = target_of(hidden).type == "cuda"
        chunk_rows = max(CHUNK_ROWS, min(CARD_ROWS, CARD_BYTES // row) if on_card else CHUNK_BYTES // row)
    return _FrozenLoss.apply(hidden, labels, weight, bias, transform, label_smoothing, chunk_rows)


class _FrozenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, weight, bias, transform, label_smoothing, chunk_rows):
        total = hidden.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dense = weight.dense(hidden.dtype)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = matmul(hidden[rows], dense.T)
            logits = (logits if bias is None else logits.add_(bias)).float()
            sum_of_chunk, derivative = _chunk(logits, labels[rows], transform, label_smoothing, grad is not None)
            total += sum_of_chunk
            if grad is not None:
                grad[rows] = matmul(derivative.to(hidden.dtype), dense)
            del logits, derivative  # before the next chunk's are made
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, *(None,) * 6  # a scalar in fp32: rounded once, with the product


def _chunk(
    logits: Tensor, labels: Tensor, transform: LogitsTransform, smoothing: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss summed over the rows of `logits` (n, vocabulary), fp32, and its derivative, which takes their place."""
    if transform.scale != 1.0:
        logits.mul_(transform.scale)
    capped = None
    if transform.softcap is not None:
        logits.div_(transform.softcap).tanh_()
        capped = logits.clone() if with_gradient else None
        logits.mul_(transform.softcap)
    targets = labels.unsqueeze(1)
    of_target = logits.gather(1, targets)
    spread = logits.mean(1, keepdim=True) if smoothing else 0.0
    highest = logits.amax(1, keepdim=True)
    exponentials = logits.sub_(highest).exp_()
    sums = exponentials.sum(1, keepdim=True)
    total = (sums.log() + highest - (1 - smoothing) * of_target - smoothing * spread).sum()
    if not with_gradient:
        return total, None
    derivative = exponentials.div_(sums)  # softmax − (1 − ε)·one-hot − ε/V
    if smoothing:
        derivative.sub_(smoothing / logits.shape[1])
    derivative.scatter_add_(1, targets, torch.full_like(of_target, smoothing - 1.0))
    if capped is not None:
        derivative.mul_(capped.square_().neg_().add_(1.0))  # tanh' = 1 − tanh²
    if transform.scale != 1.0:
        derivative.mul_(transform.scale)
    return total, derivative
