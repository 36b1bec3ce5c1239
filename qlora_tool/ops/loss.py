"""Output projection and cross-entropy in chunks of rows: the logits of a chunk live only while it is worked on.

The gradient of the loss with respect to the hidden states is made in forward, chunk by chunk, so that what is kept
for backward is (rows, hidden), never (rows, vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ROWS = 256  # rows of logits at a time: 50 MB of fp32 for a vocabulary of 50 thousand


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
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """The sum over rows of the cross-entropy of `project(hidden)` against `labels`.

    Args:
        hidden: (rows, hidden).
        labels: (rows,) token ids; -100 rows must have been dropped.
        project: hidden (n, hidden) → logits (n, vocabulary), differentiable in its input. Parameters of its own get no
            gradient this way: where they are trained, take the cross-entropy of whole logits.
        label_smoothing: share of the target spread evenly over the vocabulary.
        chunk_rows: rows of logits made at a time.

    Returns:
        A scalar in fp32.
    """
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
