"""What lies between the products of a gated MLP, h = act(gate) ∘ up, in one pass over memory each way.

Activations are the three that gated MLPs use, with Φ the normal distribution and σ the logistic function:

    silu        g·σ(g)
    gelu none   g·Φ(g)
    gelu tanh   g·σ(2u), u = √(2/π)·(g + 0.044715·g³)        (½·(1 + tanh u) = σ(2u))

Sources: GLU variants (Shazeer 2020, arXiv 2002.05202), GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_tool.ops.declare import declare
from qlora_tool.ops.kernels import usable
from qlora_tool.ops.one_pass import in_one_pass


@dataclass(frozen=True)
class Activation:
    """An activation and its derivative: `gradient(grad, input)`, which may write over `grad`."""

    name: str
    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        f"gelu {approximate}", lambda x: torch.nn.functional.gelu(x, approximate=approximate),
        lambda grad, x: torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=grad),
    )  # fmt: skip


def _silu() -> Activation:
    return Activation(
        "silu", torch.nn.functional.silu,
        lambda grad, x: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad),
    )  # fmt: skip


ACTIVATIONS = (_silu(), _gelu("none"), _gelu("tanh"))
_BY_NAME = {activation.name: activation for activation in ACTIVATIONS}


def runs_in_one_pass(gate: Tensor, activation: Activation) -> bool:
    """Whether the operations below are kernels where this tensor's step runs; elsewhere PyTorch's own are as good."""
    return activation in ACTIVATIONS and in_one_pass(gate)


def gated_product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) ∘ up, (tokens, intermediate)."""
    if runs_in_one_pass(gate, activation):
        return _product(gate, up, activation.name)
    return activation.function(gate).mul_(up)


def gated_gradients_(gate: Tensor, up: Tensor, grad: Tensor, activation: Activation) -> None:
    """From h's gradient to those of gate and up, in place: afterwards `gate` holds h = act(gate) ∘ up once more, `up`
    its own gradient, and `grad` that of gate.

    Args:
        gate, up, grad: (tokens, intermediate), contiguous, of one dtype; nobody needs their values any more.
    """
    _gradients(gate, up, grad, activation.name)


# --------------------------------------------------------------------------------------------------------- operations


def _product_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _BY_NAME[activation].function(gate).mul_(up)


def _product_cuda(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if not (usable(gate.device) and gate.is_contiguous() and up.is_contiguous()):
        return _product_reference(gate, up, activation)
    from qlora_tool.ops.kernels import gated

    h = torch.empty_like(gate)
    gated.product(gate, up, activation, h)
    return h


_product = declare(
    "gated_product(Tensor gate, Tensor up, str activation) -> Tensor",
    reference=_product_reference,
    shapes=lambda gate, up, activation: torch.empty_like(gate),
    versions={"cuda": _product_cuda},
)


def _gradients_reference(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> None:
    active = _BY_NAME[activation].function(gate)
    of_up = active * grad
    _BY_NAME[activation].gradient(grad.mul_(up), gate)
    gate.copy_(active.mul_(up))
    up.copy_(of_up)


def _gradients_cuda(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> None:
    if not (usable(gate.device) and all(tensor.is_contiguous() for tensor in (gate, up, grad))):
        return _gradients_reference(gate, up, grad, activation)
    from qlora_tool.ops.kernels import gated

    gated.gradients(gate, up, grad, activation)
    return None


_gradients = declare(
    "gated_gradients_(Tensor(a!) gate, Tensor(b!) up, Tensor(c!) grad, str activation) -> ()",
    reference=_gradients_reference,
    shapes=lambda gate, up, grad, activation: None,
    versions={"cuda": _gradients_cuda},
    workspace={"cpu": lambda gate, up, grad, activation: 2 * gate.nbytes},
)
