"""A step of AdamW with many weights at once, exact in fp32 whatever they are in, with moments in fp32 or in 8 bits.

A step of 1e-4 is lost in a bf16 weight near 1, whose neighbours are 8e-3 apart, so steps are taken in fp32. A bf16
weight is the upper half of an fp32 number: it and 16 more bits are its master, joined before a step and split after it.
An fp16 weight has a master of its own, an fp32 weight is its own master.

The reference goes from weight to weight, large ones slice by slice, so that what is joined and converted never takes
more than a constant. On CUDA devices one kernel takes all of them at once and keeps all of that in registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_tool.ops.declare import declare, target_of
from qlora_tool.ops.kernels import available, usable

SLICE = 2**20
"""Elements that take their step at once; a multiple of `BLOCK`."""
BLOCK = 256
"""Elements with one scale in bitsandbytes' 8-bit states."""

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def split_master(master: Tensor, weight: Tensor, low_bits: Tensor) -> None:
    """Round fp32 numbers to bf16, ties away from zero, and keep what rounding drops.

    As integers, master = weight · 2¹⁶ + low_bits, and the `low_bits` of numbers that are exact in bf16 are 0. Rounding
    ties to even, as elsewhere, would need a 17th bit: the half could lie on either side. `join_master` gives every
    master back to the bit, a NaN as some NaN.

    Args:
        master: fp32, contiguous, one dimension; used up.
        weight: bf16, of the same length; written.
        low_bits: int16, of the same length; written.
    """
    # A NaN whose bits are all ones, as CUDA makes them, would round to zero.
    bits = master.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf).view(torch.int32)
    low_bits.copy_(bits)  # modulo 2¹⁶
    weight.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def join_master(weight: Tensor, low_bits: Tensor) -> Tensor:
    """The fp32 numbers that `split_master` split."""
    high_bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return high_bits.add_(low_bits.to(torch.int32)).view(torch.float32)


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of a dense tensor as they follow each other in memory, the one with neighbours last."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def slices_of(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements, in pieces of at most `SLICE`."""
    return iter([tensor] if tensor.numel() <= SLICE else tensor.reshape(-1).split(SLICE))


def _reference(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], exact: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], first_scales: Sequence[Tensor], second_scales: Sequence[Tensor],
    codes: Sequence[Tensor], factor: Tensor | None, steps: Sequence[int], rates: Sequence[float], weight_decay: float,
) -> None:  # fmt: skip
    for number, weight in enumerate(weights):
        order = memory_order(weight)
        tensors = [weight.detach().permute(order).view(-1), gradients[number].permute(order).reshape(-1)]
        tensors += [found[number] for found in (exact, first, second) if found]
        scales = [found[number] for found in (first_scales, second_scales) if found]
        for start in range(0, weight.numel(), SLICE):
            pieces = [tensor[start : start + SLICE] for tensor in tensors]
            scales_of_piece = [tensor[start // BLOCK : (start + SLICE) // BLOCK] for tensor in scales]
            _step_slice(pieces, scales_of_piece, codes, factor, steps[number], rates[number], weight_decay)


def _step_slice(
    pieces: Sequence[Tensor], scales: Sequence[Tensor], codes: Sequence[Tensor], factor: Tensor | None, step: int,
    rate: float, weight_decay: float,
) -> None:  # fmt: skip
    weight, gradient, *exact, first, second = pieces
    gradient = gradient.float()
    if factor is not None:
        gradient.mul_(factor)
    master = exact[0] if exact else weight
    if weight.dtype == torch.bfloat16:
        master = join_master(weight, exact[0])
    if codes:
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default(
            "adam", gradient, master, first, second, BETA1, BETA2, 0.0, 0.0, EPSILON, step, rate, *codes, *scales,
            weight_decay, 1.0,
        )  # fmt: skip
    else:
        torch._fused_adamw_(
            [master], [gradient], [first], [second], [], [torch.full((), float(step), device=weight.device)], lr=rate,
            beta1=BETA1, beta2=BETA2, weight_decay=weight_decay, eps=EPSILON, amsgrad=False, maximize=False,
        )  # fmt: skip
    if weight.dtype == torch.bfloat16:
        split_master(master, weight, exact[0])
    elif exact:
        weight.copy_(master)


def _on_cuda(weights: Sequence[Tensor], *others: Any) -> None:
    if not usable(weights[0].device):
        return _reference(weights, *others)
    from qlora_tool.ops.kernels.adamw import step

    step(weights, *others, beta1=BETA1, beta2=BETA2, epsilon=EPSILON)


def _reference_workspace(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], exact: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], first_scales: Sequence[Tensor], *others: Any,
) -> int:  # fmt: skip
    """The gradient and a bf16 weight in fp32, and 4 bytes more for the latter or the step; what bitsandbytes takes."""
    peak = 0
    for weight, gradient in zip(weights, gradients, strict=True):
        count = min(weight.numel(), SLICE)
        converted = 4 * count if gradient.dtype != torch.float32 else 0
        joined = 4 * count if weight.dtype == torch.bfloat16 else 0
        # Both moments, the scaled gradient, and twice the denominator, each in fp32.
        inside = 20 * count if first_scales else 4
        peak = max(peak, converted + max(2 * joined, joined + inside))
    return peak


def _cuda_workspace(weights: Sequence[Tensor], *others: Any) -> int:
    """The tables that the kernel reads, 9 addresses and 3 numbers a weight."""
    if not available(target_of(weights[0])):
        return _reference_workspace(weights, *others)
    return (9 * 8 + 3 * 4) * len(weights)


adamw = declare(
    "adamw(Tensor(a!)[] weights, Tensor(b!)[] gradients, Tensor(c!)[] exact, Tensor(d!)[] first, Tensor(e!)[] second, "
    "Tensor(f!)[] first_scales, Tensor(g!)[] second_scales, Tensor[] codes, Tensor? factor, int[] steps, "
    "float[] rates, float weight_decay) -> ()",
    reference=_reference,
    shapes=lambda *_: None,
    versions={"cuda": _on_cuda},
    workspace={"cpu": _reference_workspace, "cuda": _cuda_workspace},
)
"""Take a step with each weight.

    adamw(weights, gradients, exact, first, second, first_scales, second_scales, codes, factor, steps, rates, decay)

weights: of any dense layout, all on one device and of one dtype: fp32, bf16 or fp16.
gradients: of the weights' shapes, all of one dtype: the weights' or fp32; those in fp32 may be written to.
exact: int16 `low_bits` of bf16 weights, fp32 masters of fp16 weights, none of fp32 weights. As the states, one
    dimension each, in the order of the weight in memory.
first, second: the moments, fp32, or uint8 with an fp32 scale for every 256 in `first_scales`, `second_scales`.
codes: of 8 bits: the values that signed and unsigned ones stand for, fp32 (256,); else none, and no scales either.
factor: what gradients are multiplied by, fp32, one number on the device; or None.
steps: the number of this step, from 1 on; rates: the learning rate; of each weight.
decay: of a step, times its learning rate.

Kingma & Ba 2015; decoupled decay: Loshchilov & Hutter 2019, arXiv 1711.05101; 8 bits: Dettmers et al. 2021,
arXiv 2110.02861.
"""
