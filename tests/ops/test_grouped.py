"""Products of rows grouped by expert: against one expert after the other in fp64, in pieces, by PyTorch's kernel."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qlora_tool.ops import grouped
from qlora_tool.ops.declare import Target, meant_for
from qlora_tool.ops.grouped import GAP, Groups, grouped_frozen_linear, grouped_linear, pieces
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.quantized import quantize

HOPPER = Target("cuda", (9, 0))
EXPERTS, OUT, IN = 6, 32, 64
ROUTINGS = {
    "even": (4, 4, 4, 4, 4, 4), "uneven": (1, 0, 7, 0, 0, 3), "one": (0, 0, 0, 9, 0, 0), "a row": (0, 1, 0, 0, 0, 0),
    "none": (0,) * 6,
}  # fmt: skip


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def groups_of(counts: tuple[int, ...]) -> Groups:
    return Groups(counts, torch.tensor(counts).cumsum(0).to(torch.int32))


def by_expert(x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
    return torch.cat([rows @ one.T for rows, one in zip(x.split(list(counts)), weight, strict=True)])


def assert_sums(found: Tensor, exact: Tensor, sizes: Tensor, terms: int):
    """Sums of `terms` products in fp32, `sizes` being those of absolute values."""
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= sizes * (terms + 2) * 2**-24).all()


@pytest.mark.parametrize("at_once", [1, 2, 1000])
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_frozen_products_are_autograds(kind, counts, at_once, monkeypatch):
    monkeypatch.setattr(grouped, "PIECE_BYTES", at_once * OUT * IN * 4)
    value = drawn(EXPERTS, OUT, IN)
    weight = WeightHandle(value if kind == "none" else quantize(value, kind))
    x = drawn(sum(counts), IN).requires_grad_()
    grad = drawn(sum(counts), OUT, seed=1)
    y = grouped_frozen_linear(x, weight, groups_of(counts))
    assert not y.grad_fn.saved_tensors
    (found,) = torch.autograd.grad(y, x, grad)
    dense, exact_x = weight.dense(torch.float64), x.detach().double().requires_grad_()
    expected = by_expert(exact_x, dense, counts)
    (wanted,) = torch.autograd.grad(expected, exact_x, grad.double())
    assert_sums(y, expected, by_expert(exact_x.abs(), dense.abs(), counts), IN)
    assert_sums(found, wanted, by_expert(grad.double().abs(), dense.abs().mT, counts), OUT)


@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS)
def test_products_with_trained_weights_are_autograds(counts):
    x, weight = drawn(sum(counts), IN).requires_grad_(), drawn(EXPERTS, OUT, IN).requires_grad_()
    grad = drawn(sum(counts), OUT, seed=1)
    y = grouped_linear(x, weight, groups_of(counts))
    found = torch.autograd.grad(y, (x, weight), grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = by_expert(*exact, counts)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    assert_sums(y, expected, by_expert(*(one.abs() for one in exact), counts), IN)
    assert_sums(found[0], wanted[0], by_expert(grad.double().abs(), exact[1].abs().mT, counts), OUT)
    sizes = [of_grad.abs().T @ rows.abs() for of_grad, rows in
             zip(grad.double().split(list(counts)), exact[0].split(list(counts)), strict=True)]  # fmt: skip
    assert_sums(found[1], wanted[1], torch.stack(sizes), max(counts))


@pytest.mark.parametrize("at_once", [1, 3, 8, 100])
def test_pieces_cover_what_has_rows_and_little_else(at_once):
    draw = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        counts = (torch.rand(60, generator=draw) < share).long().tolist()
        found = pieces(counts, at_once)
        covered = [index for first, stop in found for index in range(first, stop)]
        assert covered == sorted(set(covered)) and {i for i, count in enumerate(counts) if count} <= set(covered)
        assert all(stop - first <= at_once and counts[first] and counts[stop - 1] for first, stop in found)
        for first, stop in found:
            used = [index for index in range(first, stop) if counts[index]]
            assert all(later - earlier <= GAP + 1 for earlier, later in pairwise(used))
    assert pieces([1] * 60, at_once) == [(first, min(first + at_once, 60)) for first in range(0, 60, at_once)]


def test_a_few_experts_of_many_are_asked_for(monkeypatch):
    """As when tokens are generated one by one."""
    weight, asked = WeightHandle(quantize(drawn(64, OUT, IN), "nf4")), []
    dense = weight.dense_experts
    monkeypatch.setattr(weight, "dense_experts", lambda dtype, *some: asked.append(some) or dense(dtype, *some))
    counts = tuple(int(index in (3, 4, 40)) for index in range(64))
    grouped_frozen_linear(drawn(3, IN), weight, groups_of(counts))
    assert asked == [(3, 5), (40, 41)]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("double", [True, False])
def test_several_experts_are_those_one_by_one_to_the_bit(kind, double):
    value = drawn(4, 20, 48)
    handle = WeightHandle(value if kind == "none" else quantize(value, kind, double))
    for dtype in (torch.float32, torch.bfloat16):
        expected = torch.stack([handle.dense(dtype, index) for index in (1, 2, 3)])
        assert torch.equal(handle.dense_experts(dtype, 1, 4), expected)
        handle.lend(value.to(dtype))
        assert torch.equal(handle.dense_experts(dtype, 1, 4), value[1:].to(dtype))
        handle.release()


# ------------------------------------------------------------------------------------------------- PyTorch's kernel


@pytest.fixture
def kernel_calls(monkeypatch):
    """Shapes that PyTorch's grouped product was asked for, as on a card that has a kernel for it."""
    calls, function = [], torch.nn.functional.grouped_mm

    def watched(left, right, *, offs):
        calls.append((tuple(left.shape), tuple(right.shape)))
        return function(left, right, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", watched)
    monkeypatch.setattr(grouped, "_built", lambda: True)
    return calls


def both(target: Target, width: int, r: int, dtype: torch.dtype, counts=(3, 0, 5)) -> list[tuple[Tensor, Tensor]]:
    """The products that a LoRA of rank r takes, by the version for CUDA and by the reference."""
    ends, x = groups_of(counts).ends, drawn(sum(counts), width, dtype=dtype)
    z, A = drawn(sum(counts), r, dtype=dtype), drawn(len(counts), r, width, dtype=dtype)
    cases = [(grouped.grouped_matmul, x, A.transpose(1, 2)), (grouped.grouped_matmul, z, A),
             (grouped.grouped_gradient, z, x)]  # fmt: skip
    with meant_for(target):
        return [(operation.versions["cuda"](ends, left, right, counts),
                 operation.reference(ends, left, right, counts)) for operation, left, right in cases]  # fmt: skip


def test_the_kernel_gives_what_the_reference_gives(kernel_calls):
    for found, expected in both(HOPPER, 64, 8, torch.bfloat16):
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-6)  # either rounds sums of up to 64 once
    assert kernel_calls == [((8, 64), (3, 64, 8)), ((8, 8), (3, 8, 64)), ((8, 8), (8, 64))]


@pytest.mark.parametrize(
    ("target", "width", "r", "dtype"),
    [
        (Target("cuda", (8, 9)), 64, 8, torch.bfloat16),  # PyTorch itself goes from expert to expert
        (HOPPER, 64, 8, torch.float32),
        (HOPPER, 64, 4, torch.bfloat16),  # rows of 8 bytes
        (HOPPER, 60, 8, torch.bfloat16),
    ],
)
def test_what_the_kernel_does_not_take_goes_expert_by_expert(kernel_calls, target, width, r, dtype):
    for found, expected in both(target, width, r, dtype):
        assert torch.equal(found, expected)
    assert kernel_calls == []


def test_rows_that_the_kernel_does_not_take_go_expert_by_expert(kernel_calls):
    ends, left, right = groups_of((1,)).ends, drawn(1, 64, dtype=torch.bfloat16), drawn(1, 64, 8, dtype=torch.bfloat16)
    buffer = drawn(65, dtype=torch.bfloat16)
    with meant_for(HOPPER):
        for odd in (buffer[1:].view(1, 64), left[:, :1].expand(1, 64), buffer[:64].as_strided((1, 64), (0, 1))):
            found = grouped.grouped_matmul.versions["cuda"](ends, odd, right, (1,))
            assert torch.equal(found, grouped.grouped_matmul.reference(ends, odd, right, (1,)))
    assert kernel_calls == []
