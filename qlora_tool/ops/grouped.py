"""Products of rows that are grouped by expert with the matrices of their experts, all experts in one operation.

    y[rows of e] = x[rows of e] · W_eᵀ

Where PyTorch has a kernel for it (`torch.nn.functional.grouped_mm`) that is one launch or two for all experts together.
On other devices, in other dtypes and for sizes that it does not take, it is a product an expert.

A frozen weight is dequantized in pieces of consecutive experts, so that what is dense at a time is bounded, once
forward and once backward, and nothing is saved for it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlora_tool.ops.declare import declare, target_of

PIECE_BYTES = 128 << 20
"""Of the dense weights of several experts at a time, at most; one expert's where that is more."""
GAP = 4  # experts without rows that are dequantized among others: that costs less than another piece does
_MOST_GROUPS = 1023  # of the kernel
_KERNEL_MAJORS = (9, 10)  # compute capabilities; PyTorch waits for the host on others (native/cuda/GroupedBlas.cpp)
# ESTIMATED: CUTLASS keeps a few descriptors of 128 bytes a multiprocessor, and what each group is, 60 bytes
# (native/cuda/GroupMM.cu).
_KERNEL_BYTES, _KERNEL_GROUP_BYTES = 128 << 10, 64


# ------------------------------------------------------------------------------------------------------ operations


def _matmul_reference(ends: Tensor, left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    result = _empty_matmul(ends, left, right, counts)
    each = list(counts)
    for some, one, products in zip(left.split(each), right.unbind(), result.split(each), strict=True):
        if len(some):
            torch.mm(some, one, out=products)
    return result


def _empty_matmul(ends: Tensor, left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[2])


def _gradient_reference(ends: Tensor, left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    result = _empty_gradient(ends, left, right, counts)
    each = list(counts)
    for some, others, one in zip(left.split(each), right.split(each), result.unbind(), strict=True):
        if len(some):
            torch.mm(some.T, others, out=one)
        else:
            one.zero_()
    return result


def _empty_gradient(ends: Tensor, left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    return left.new_empty(len(counts), left.shape[1], right.shape[1])


def _matmul_cuda(ends: Tensor, left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    if not _has_kernel(left, right, len(counts)):
        return _matmul_reference(ends, left, right, counts)
    return torch.nn.functional.grouped_mm(left, right, offs=ends)


def _gradient_cuda(ends: Tensor, left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    # Of groups without rows the kernel makes zeros for these strides, a left side turned and a right side as it is.
    if not (_has_kernel(left, right, len(counts)) and left.is_contiguous() and right.is_contiguous()):
        return _gradient_reference(ends, left, right, counts)
    return torch.nn.functional.grouped_mm(left.T, right, offs=ends)


def _has_kernel(left: Tensor, right: Tensor, groups: int) -> bool:
    """Whether PyTorch has a kernel for these, and does not do it expert by expert itself, with the host waiting."""
    return (
        target_of(left).capability[0] in _KERNEL_MAJORS
        and _built()
        and left.dtype == right.dtype == torch.bfloat16
        and left.shape[0] > 0
        and 0 < groups <= _MOST_GROUPS
        and all(_is_aligned(tensor) for tensor in (left, right))
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether a matrix, or each of several, begins on 16 bytes and so does each row, or column where those lie
    together, and their lengths are whole multiples of that, as those of results are then."""
    strides, shape, each = tensor.stride(), tensor.shape, 16 // tensor.element_size()
    along = next((dim for dim in (-1, -2) if strides[dim] == 1 and strides[-3 - dim] >= shape[dim] > 0), None)
    lengths = (*strides[:-2], *shape[1:]) if along is None else (*strides[:-2], strides[-3 - along], *shape[1:])
    return along is not None and all(length % each == 0 for length in lengths) and tensor.data_ptr() % 16 == 0


@functools.cache
def _built() -> bool:
    """Whether this PyTorch was built with the kernel."""
    return os.name == "posix" and torch.version.cuda is not None


def _workspace_cuda(ends: Tensor, left: Tensor, right: Tensor, counts: Sequence[int]) -> int:
    kernel = left.dtype == torch.bfloat16 and target_of(left).capability[0] in _KERNEL_MAJORS
    return _KERNEL_BYTES + _KERNEL_GROUP_BYTES * len(counts) if kernel else 0


# Rows (n, k), of which the first counts[0] are multiplied with the first matrix of (groups, k, m), and so on, up to the
# row `ends[e]`, int32 on the device → (n, m). All rows are of a group.
grouped_matmul = declare(
    "grouped_matmul(Tensor ends, Tensor left, Tensor right, int[] counts) -> Tensor",
    reference=_matmul_reference,
    shapes=_empty_matmul,
    versions={"cuda": _matmul_cuda},
    workspace={"cuda": _workspace_cuda},
)

# Rows (n, k) and (n, m), grouped alike → (groups, k, m): of each group leftᵀ · right; zeros where it has no rows.
grouped_gradient = declare(
    "grouped_gradient(Tensor ends, Tensor left, Tensor right, int[] counts) -> Tensor",
    reference=_gradient_reference,
    shapes=_empty_gradient,
    versions={"cuda": _gradient_cuda},
    workspace={"cuda": _workspace_cuda},
)


# -------------------------------------------------------------------------------------------------- with gradients


@dataclass(frozen=True)
class Groups:
    """How rows are grouped by expert.

    Attributes:
        counts: how many rows each expert has, in order; together they are all rows.
        ends: the row where each expert's end, int32 (experts,), on the device of the rows.
    """

    counts: tuple[int, ...]
    ends: Tensor

    def part(self, first: int, stop: int) -> Groups:
        """The experts from `first` up to `stop`, their rows counted from the first of them."""
        ends = self.ends[first:stop]
        return Groups(self.counts[first:stop], ends - sum(self.counts[:first]) if first else ends)

    def of_experts(self, each: Tensor) -> Tensor:
        """What each expert has (experts, …) → what the expert of each row has (n, …)."""
        rows = torch.arange(sum(self.counts), dtype=torch.int32, device=self.ends.device)
        return each[torch.searchsorted(self.ends, rows, right=True)]


class FrozenExperts(Protocol):
    """Whatever can give the frozen matrices of experts.

    Attributes:
        shape: (experts, out, in).
    """

    shape: tuple[int, ...]

    def dense_experts(self, dtype: torch.dtype, first: int, stop: int) -> Tensor:
        """The experts from `first` up to `stop` in `dtype`, (stop - first, out, in)."""
        ...


def pieces(counts: Sequence[int], at_once: int) -> list[tuple[int, int]]:
    """(first, stop) of experts that are taken together, `at_once` at most.

    All that have rows are among them, and others only between two that have, no more than `GAP` in a row.
    """
    found: list[tuple[int, int]] = []
    for index, count in enumerate(counts):
        if count == 0:
            continue
        first, stop = found[-1] if found else (index, -1)
        if found and index - stop <= GAP and index - first < at_once:
            found[-1] = first, index + 1
        else:
            found.append((index, index + 1))
    return found


def grouped_frozen_linear(x: Tensor, weight: FrozenExperts, groups: Groups) -> Tensor:
    """x (n, in), rows grouped by expert, · W_eᵀ of each one's expert → (n, out), W (experts, out, in) frozen.

    Args:
        x: the input; the product runs in its dtype.
        weight: the handle of W.
    """
    y: Tensor = _GroupedFrozenLinear.apply(x, weight, groups)
    return y


class _GroupedFrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: FrozenExperts, groups: Groups) -> Tensor:
        ctx.weight, ctx.groups = weight, groups  # no weight is kept
        return _by_pieces(x, weight, groups, turned=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _by_pieces(grad.contiguous(), ctx.weight, ctx.groups, turned=False), None, None


def _by_pieces(x: Tensor, weight: FrozenExperts, groups: Groups, turned: bool) -> Tensor:
    """x (n, in) · W_eᵀ → (n, out) where `turned`, else x (n, out) · W_e → (n, in)."""
    out, width = weight.shape[1:]
    at_once = min(max(1, PIECE_BYTES // (out * width * x.element_size())), _MOST_GROUPS)
    result, start = None, 0
    for first, stop in pieces(groups.counts, at_once):
        part = groups.part(first, stop)
        rows = slice(start, start := start + sum(part.counts))
        dense = weight.dense_experts(x.dtype, first, stop)
        y = grouped_matmul(part.ends, x[rows], dense.transpose(1, 2) if turned else dense, part.counts)
        del dense  # before the next piece's is made
        if len(y) == len(x):
            return y
        if result is None:
            result = x.new_empty(len(x), out if turned else width)
        result[rows] = y
        del y
    return x.new_empty(len(x), out if turned else width) if result is None else result


def grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """x (n, in), rows grouped by expert, · W_eᵀ of each one's expert → (n, out), with gradients of both.

    Args:
        weight: W (experts, out, in), contiguous, in the dtype of `x`.
    """
    y: Tensor = _GroupedLinear.apply(x, weight, groups)
    return y


def of_whole_rows(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """A (experts, r, in) and B (experts, out, r) with zeros after the rank where the kernel would not take it: its rows
    are of whole multiples of 16 bytes."""
    more = -lora_A.shape[1] % (16 // lora_A.element_size()) if lora_A.dtype == torch.bfloat16 else 0
    if not more:
        return lora_A, lora_B
    return torch.nn.functional.pad(lora_A, (0, 0, 0, more)), torch.nn.functional.pad(lora_B, (0, more))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        return grouped_matmul(groups.ends, x, weight.transpose(1, 2), groups.counts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), groups = ctx.saved_tensors, ctx.groups
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        dx = grouped_matmul(groups.ends, grad, weight, groups.counts) if needs_x else None
        return dx, grouped_gradient(groups.ends, grad, x, groups.counts) if needs_weight else None, None
