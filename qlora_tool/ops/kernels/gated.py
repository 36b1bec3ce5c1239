"""act(gate) ∘ up and its gradients, number by number, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qlora_tool.ops.kernels import on_device_of

_NUMBERS = 2048  # of one program, 16 a thread
_WARPS = 4


@triton.jit
def _share(g, ACTIVATION: tl.constexpr):
    """What an activation lets through of g, and the derivative of that."""
    if ACTIVATION == "silu":
        share = 1 / (1 + tl.exp(-g))
        slope = share * (1 - share)
    elif ACTIVATION == "gelu tanh":
        share = 1 / (1 + tl.exp(-1.5957691216057308 * g * (1 + 0.044715 * g * g)))  # 2·√(2/π)
        slope = share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    else:
        share = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * g * g)  # 1/√(2π)
    return share, slope


@triton.jit
def _product(gate_at, up_at, h_at, count, ACTIVATION: tl.constexpr, NUMBERS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    there = place < count
    gate = tl.load(gate_at + place, mask=there, other=0).to(tl.float32)
    up = tl.load(up_at + place, mask=there, other=0).to(tl.float32)
    share, _ = _share(gate, ACTIVATION)
    tl.store(h_at + place, (gate * share * up).to(h_at.dtype.element_ty), mask=there)


@triton.jit
def _gradients(gate_at, up_at, grad_at, count, ACTIVATION: tl.constexpr, NUMBERS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    there = place < count
    gate = tl.load(gate_at + place, mask=there, other=0).to(tl.float32)
    up = tl.load(up_at + place, mask=there, other=0).to(tl.float32)
    grad = tl.load(grad_at + place, mask=there, other=0).to(tl.float32)
    share, slope = _share(gate, ACTIVATION)
    active = gate * share
    tl.store(gate_at + place, (active * up).to(gate_at.dtype.element_ty), mask=there)
    tl.store(up_at + place, (grad * active).to(up_at.dtype.element_ty), mask=there)
    tl.store(grad_at + place, (grad * up * (share + gate * slope)).to(grad_at.dtype.element_ty), mask=there)


def product(gate: Tensor, up: Tensor, activation: str, h: Tensor) -> None:
    """Write h = act(gate) ∘ up; all contiguous, fp32, bf16 or fp16, `activation` as `ops/gated.py` names it."""
    if gate.numel():
        with on_device_of(gate):
            _product[(triton.cdiv(gate.numel(), _NUMBERS),)](
                gate, up, h, gate.numel(), activation, _NUMBERS, num_warps=_WARPS
            )


def gradients(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> None:
    """Write h over `gate`, the gradient of up over `up`, and that of gate over `grad`, the gradient of h."""
    if gate.numel():
        with on_device_of(gate):
            _gradients[(triton.cdiv(gate.numel(), _NUMBERS),)](
                gate, up, grad, gate.numel(), activation, _NUMBERS, num_warps=_WARPS
            )
