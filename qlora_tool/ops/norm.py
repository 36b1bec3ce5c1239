"""RMSNorm with a frozen weight, in one pass over memory each way.

    y = (offset + w) · x̂        x̂ = x / √(mean(x²) + ε), over the last dimension, in fp32

Families differ in two things. Gemma's keep w near zero: offset 1. Llama's round x̂ to the input's dtype before the
product (`rounds`); others round once, at the end.

What is kept for backward is x itself and 1/√(…) of each row; autograd would keep two fp32 copies of x. With v = offset
+ w and N numbers a row,

    dx = (dy·v - x̂ · mean(dy·v·x̂)) / √(mean(x²) + ε)

Source: RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), equation 4; the gradient is that of the first line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_tool.ops.declare import declare
from qlora_tool.ops.kernels import usable


@dataclass(frozen=True)
class NormKind:
    """How a family computes its RMSNorm.

    Attributes:
        offset: what is added to the weight.
        rounds: x̂ is rounded to the input's dtype before it is multiplied by the weight.
    """

    offset: float
    rounds: bool


KINDS = (NormKind(0.0, rounds=True), NormKind(0.0, rounds=False), NormKind(1.0, rounds=False))
WIDEST = 1 << 16  # numbers of a row that the kernel can hold


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, kind: NormKind) -> Tensor:
    """x (…, N) normalized over its last dimension, in its dtype; laid out row by row.

    Args:
        weight: (N,), frozen; None: one everywhere.
        eps: ε.
        kind: of the family.
    """
    return _RmsNorm.apply(x, weight, eps, kind)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float, kind: NormKind) -> Tensor:
    """The same by autograd."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return unit.to(x.dtype)
    if kind.rounds:
        return (unit.to(x.dtype) * (kind.offset + weight if kind.offset else weight)).to(x.dtype)
    return (unit * (kind.offset + weight.to(unit.dtype))).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float, kind: NormKind) -> Tensor:
        y, scale = _forward(x, weight, eps, kind.offset, kind.rounds)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = kind.offset
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        return _backward(grad, None, x, weight, scale, ctx.offset), None, None, None


# ---------------------------------------------------------------------------------------------------- beside a residual


def pass_and_norm(x: Tensor, weight: Tensor | None, eps: float, kind: NormKind) -> tuple[Tensor, Tensor]:
    """x itself, and x normalized as by `rms_norm`. Where the first is used in the place of x from there on, both
    gradients of x meet in one pass."""
    return _PassAndNorm.apply(x, weight, eps, kind)


def add_and_norm(
    x: Tensor, update: Tensor, weight: Tensor | None, eps: float, kind: NormKind
) -> tuple[Tensor, Tensor]:
    """x + update, both of one dtype, and that sum normalized as by `rms_norm`."""
    return _AddAndNorm.apply(x, update, weight, eps, kind)


class _PassAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float, kind: NormKind) -> tuple[Tensor, Tensor]:
        y, scale = _forward(x, weight, eps, kind.offset, kind.rounds)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = kind.offset
        return x, y

    @staticmethod
    def backward(ctx, passed: Tensor, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        return _backward(grad, passed, x, weight, scale, ctx.offset), None, None, None


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, update: Tensor, weight: Tensor | None, eps: float, kind: NormKind
    ) -> tuple[Tensor, Tensor]:
        total, y, scale = _add_forward(x, update, weight, eps, kind.offset, kind.rounds)
        ctx.save_for_backward(total, weight, scale)
        ctx.offset = kind.offset
        return total, y

    @staticmethod
    def backward(ctx, passed: Tensor, grad: Tensor):
        total, weight, scale = ctx.saved_tensors
        dx = _backward(grad, passed, total, weight, scale, ctx.offset)
        needs_x, needs_update, *_ = ctx.needs_input_grad
        return dx if needs_x else None, dx if needs_update else None, None, None, None


# --------------------------------------------------------------------------------------------------------- operations


def _forward_reference(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, rounds: bool
) -> tuple[Tensor, Tensor]:
    y, scale = _forward_shapes(x, weight, eps, offset, rounds)
    unit = x.to(torch.float32, copy=True)
    scale.copy_(torch.rsqrt(unit.square().mean(-1) + eps))
    unit.mul_(scale.unsqueeze(-1))
    if weight is not None and not rounds:
        unit.mul_(offset + weight.float())
    y.copy_(unit)
    return (y.mul_(offset + weight if offset else weight) if weight is not None and rounds else y), scale


def _forward_cuda(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, rounds: bool
) -> tuple[Tensor, Tensor]:
    if not usable(x.device):
        return _forward_of_pytorch(x, weight, eps, offset, rounds)
    from qlora_tool.ops.kernels import norm

    y, scale = _forward_shapes(x, weight, eps, offset, rounds)
    norm.forward(x.contiguous(), None, weight, eps, offset, rounds, None, y, scale)
    return y, scale


def _forward_of_pytorch(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, rounds: bool
) -> tuple[Tensor, Tensor]:
    """By PyTorch's own kernel, a tenth of the reference's time, where it knows the kind: it has no offset."""
    if weight is not None and (offset or weight.dtype != x.dtype):
        return _forward_reference(x, weight, eps, offset, rounds)
    y, scale = torch.ops.aten._fused_rms_norm(x.contiguous(), x.shape[-1:], None if rounds else weight, eps)
    return (y.mul_(weight) if weight is not None and rounds else y), scale.squeeze(-1)


def _forward_shapes(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, rounds: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _forward_workspace(x: Tensor, weight: Tensor | None, eps: float, offset: float, rounds: bool) -> int:
    return 8 * x.numel() + 4 * (x.numel() // x.shape[-1])


_forward = declare(  # (…, N) → y (…, N), and 1/√(mean(x²) + ε), fp32 (…)
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, bool rounds) -> (Tensor, Tensor)",
    reference=_forward_reference,
    shapes=_forward_shapes,
    versions={"cuda": _forward_cuda},
    workspace={"cpu": _forward_workspace, "cuda": lambda x, weight, eps, offset, rounds: _copied(x)},
)


def _add_reference(
    x: Tensor, update: Tensor, weight: Tensor | None, eps: float, offset: float, rounds: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.add(x, update, out=x.new_empty(x.shape))
    return total, *_forward_reference(total, weight, eps, offset, rounds)


def _add_cuda(
    x: Tensor, update: Tensor, weight: Tensor | None, eps: float, offset: float, rounds: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not usable(x.device):
        total = torch.add(x, update, out=x.new_empty(x.shape))
        return total, *_forward_of_pytorch(total, weight, eps, offset, rounds)
    from qlora_tool.ops.kernels import norm

    total, y, scale = _add_shapes(x, update, weight, eps, offset, rounds)
    norm.forward(x.contiguous(), update.contiguous(), weight, eps, offset, rounds, total, y, scale)
    return total, y, scale


def _add_shapes(
    x: Tensor, update: Tensor, weight: Tensor | None, eps: float, offset: float, rounds: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_forward_shapes(x, weight, eps, offset, rounds)


_add_forward = declare(  # the same of x + update, and before it that sum
    "add_rms_norm(Tensor x, Tensor update, Tensor? weight, float eps, float offset, bool rounds) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_add_reference,
    shapes=_add_shapes,
    versions={"cuda": _add_cuda},
    workspace={
        "cpu": lambda x, update, *rest: _forward_workspace(x, *rest),
        "cuda": lambda x, update, *rest: _copied(x) + _copied(update),
    },
)


def _backward_reference(
    grad: Tensor, passed: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor, offset: float
) -> Tensor:
    result, scale = _backward_shapes(grad, passed, x, weight, scale, offset), scale.unsqueeze(-1)
    unit = x.to(torch.float32, copy=True).mul_(scale)
    through = grad.to(torch.float32, copy=True)
    if weight is not None:
        through.mul_(offset + weight.float())
    unit.mul_((through * unit).mean(-1, keepdim=True))
    through.sub_(unit).mul_(scale)
    return result.copy_(through if passed is None else through.add_(passed))


def _backward_cuda(
    grad: Tensor, passed: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor, offset: float
) -> Tensor:
    if not usable(x.device):
        return _backward_of_pytorch(grad, passed, x, weight, scale, offset)
    from qlora_tool.ops.kernels import norm

    result = _backward_shapes(grad, passed, x, weight, scale, offset)
    passed = None if passed is None else passed.contiguous()
    norm.backward(grad.contiguous(), passed, x.contiguous(), weight, scale, offset, result)
    return result


def _backward_of_pytorch(
    grad: Tensor, passed: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor, offset: float
) -> Tensor:
    """See `_forward_of_pytorch`."""
    if weight is not None and (offset or weight.dtype != x.dtype):
        return _backward_reference(grad, passed, x, weight, scale, offset)
    dx, _ = torch.ops.aten._fused_rms_norm_backward(
        grad.contiguous(), x.contiguous(), x.shape[-1:], scale.unsqueeze(-1), weight, [True, False]
    )
    return dx if passed is None else dx.add_(passed)


def _backward_shapes(
    grad: Tensor, passed: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor, offset: float
) -> Tensor:
    return x.new_empty(x.shape)


_backward = declare(  # the gradient of y → that of x, (…, N), plus what passed beside the norm
    "rms_norm_backward(Tensor grad, Tensor? passed, Tensor x, Tensor? weight, Tensor scale, float offset) -> Tensor",
    reference=_backward_reference,
    shapes=_backward_shapes,
    versions={"cuda": _backward_cuda},
    workspace={
        "cpu": lambda grad, passed, x, weight, scale, offset: 12 * x.numel() + 4 * scale.numel(),
        "cuda": lambda grad, passed, x, weight, scale, offset: _copied(grad) + _copied(passed) + _copied(x),
    },
)


def _copied(tensor: Tensor | None) -> int:
    """Bytes of the copy that a kernel is given of a tensor that is not laid out row by row."""
    return 0 if tensor is None or tensor.is_contiguous() else tensor.numel() * tensor.element_size()
