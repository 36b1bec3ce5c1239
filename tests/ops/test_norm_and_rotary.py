"""Norms and rotations with their gradients against autograd in fp64, and what they keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_tool.ops import norm
from qlora_tool.ops.norm import KINDS, add_and_norm, pass_and_norm, rms_norm, rms_norm_reference
from qlora_tool.ops.rotary import rotary, rotary_reference

EPS = 1e-5


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, exact: Tensor) -> None:
    """Within some roundings of the largest number's size."""
    assert found.shape == exact.shape
    error = (found.detach().double() - exact.detach()).abs().max()
    assert error <= 4 * torch.finfo(found.dtype).eps * exact.detach().abs().max()


def exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_norms_alone_and_beside_a_residual(kind, weighted, dtype):
    x, update = (drawn(2, 5, 48, seed=seed, dtype=dtype).requires_grad_() for seed in (0, 1))
    weight = drawn(48, seed=2, dtype=dtype) if weighted else None
    grads = [drawn(2, 5, 48, seed=seed, dtype=dtype) for seed in (3, 4)]
    exact_x, exact_update = exact(x), exact(update)
    wide, wide_grads = None if weight is None else weight.double(), [grad.double() for grad in grads]

    y = rms_norm(x, weight, EPS, kind)
    expected = rms_norm_reference(exact_x, wide, EPS, kind)
    assert_close(y, expected)
    (dx,) = torch.autograd.grad(y, x, grads[0])
    assert_close(dx, torch.autograd.grad(expected, exact_x, wide_grads[0], retain_graph=True)[0])

    passed, y = pass_and_norm(x, weight, EPS, kind)
    assert torch.equal(passed, x)
    (dx,) = torch.autograd.grad((passed, y), x, grads)
    assert_close(dx, torch.autograd.grad((exact_x * 1, expected), exact_x, wide_grads)[0])

    total, y = add_and_norm(x, update, weight, EPS, kind)
    assert torch.equal(total, x + update)
    exact_total = exact_x + exact_update
    expected = rms_norm_reference(exact_total, wide, EPS, kind)
    wanted = torch.autograd.grad((exact_total, expected), (exact_x, exact_update), wide_grads)
    for found, one in zip(torch.autograd.grad((total, y), (x, update), grads), wanted, strict=True):
        assert_close(found, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("weight", [None, "same", "wide"])
def test_a_card_without_triton_gets_the_same_from_pytorch(kind, weight, dtype):
    """What the reference gives, to a rounding; what PyTorch's kernel does not know goes to the reference."""
    x = drawn(2, 5, 48, dtype=dtype).transpose(0, 1)  # not laid out row by row
    weight = weight and drawn(48, seed=2, dtype=dtype if weight == "same" else torch.float32)
    arguments = x, weight, EPS, kind.offset, kind.rounds
    for found, wanted in zip(norm._forward_of_pytorch(*arguments), norm._forward_reference(*arguments), strict=True):
        assert (found.dtype, found.shape, found.is_contiguous()) == (wanted.dtype, wanted.shape, True)
        assert_close(found, wanted.double())


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_of_a_sum_only_what_is_asked_for_gets_a_gradient(needed):
    x, update = (drawn(3, 8, seed=seed).requires_grad_(one) for seed, one in enumerate(needed))
    total, y = add_and_norm(x, update, None, EPS, KINDS[0])
    (total.sum() + y.sum()).backward()
    assert (x.grad is not None, update.grad is not None) == needed


def test_a_norm_keeps_its_input_and_a_number_a_row():
    kept: list[Tensor] = []
    x, weight = drawn(6, 40).requires_grad_(), drawn(40, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rms_norm(x, weight, EPS, KINDS[0])
    assert {(tensor.data_ptr(), tensor.numel()) for tensor in kept} >= {(x.data_ptr(), 240), (weight.data_ptr(), 40)}
    assert sum(tensor.nbytes for tensor in kept) == x.nbytes + weight.nbytes + 6 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("width", [16, 6])
def test_rotations(width, heads_first, dtype):
    q, k = (drawn(2, 7, heads, 16, seed=heads, dtype=dtype).requires_grad_() for heads in (4, 2))
    cos, sin = drawn(2, 1, 7, width, seed=5, dtype=dtype)  # of no angle: each number is a term of its own
    given = [x.transpose(1, 2) if heads_first else x for x in (q, k)]
    found = rotary(*given, cos, sin, heads_first)
    exact_inputs = [exact(q), exact(k)]
    turned = [x.transpose(1, 2) if heads_first else x for x in exact_inputs]
    expected = rotary_reference(*turned, cos.double(), sin.double(), heads_first)
    grads = [drawn(*y.shape, seed=6, dtype=dtype) for y in found]
    wanted = torch.autograd.grad(expected, exact_inputs, [grad.double() for grad in grads])
    for one, other in zip([*found, *torch.autograd.grad(found, (q, k), grads)], [*expected, *wanted], strict=True):
        assert_close(one, other)


def test_a_rotation_keeps_its_angles_alone():
    kept: list[Tensor] = []
    q, k, (cos, sin) = drawn(1, 2, 5, 8).requires_grad_(), drawn(1, 1, 5, 8), drawn(2, 1, 5, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rotary(q, k, cos, sin)
    assert {tensor.data_ptr() for tensor in kept} == {cos.data_ptr(), sin.data_ptr()}
