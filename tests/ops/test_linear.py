"""Products on frozen weights: autograd's gradients, nothing kept for them, and no product that nobody needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_tool.ops.linear import frozen_linear
from qlora_tool.weights.quantized import quantize

OUT, IN, EXPERTS = 96, 64, 3


class Handle:
    """A quantized weight that counts how often it is asked for."""

    def __init__(self, quantized):
        self.quantized, self.asked = quantized, []

    def dense(self, dtype, expert=None):
        self.asked.append((dtype, expert))
        return (self.quantized if expert is None else self.quantized.expert(expert)).dequantize(dtype)


def handle(*shape: int, kind: str = "nf4", seed: int = 0) -> Handle:
    return Handle(quantize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), kind))


def inputs(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("expert", [None, 2])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (0,)])
def test_output_and_gradient_are_autograds(kind, expert, leading):
    weight = handle(*(() if expert is None else (EXPERTS,)), OUT, IN, kind=kind)
    x = inputs(*leading, IN).requires_grad_()
    y = frozen_linear(x, weight, expert)
    grad = inputs(*leading, OUT)
    (found,) = torch.autograd.grad(y, x, grad)

    dense = weight.dense(torch.float64, expert)
    exact_x = x.detach().double().requires_grad_()
    expected = nn.functional.linear(exact_x, dense)
    (exact_grad,) = torch.autograd.grad(expected, exact_x, grad.double())
    # A sum of n fp32 products is off by at most n·2⁻²⁴ times the sum of their sizes.
    for value, exact, size in (
        (y, expected, x.detach().double().abs() @ dense.abs().T * IN),
        (found, exact_grad, grad.double().abs() @ dense.abs() * OUT),
    ):
        assert value.shape == exact.shape
        assert ((value.double() - exact).abs() <= size * 2**-24).all()


def test_family_code_may_add_to_the_product_in_place():
    """llama4 adds what its experts give to what the shared one gives."""
    weight, x, more = handle(OUT, IN), inputs(2, 5, IN).requires_grad_(), inputs(2, 5, OUT)
    y = frozen_linear(x, weight)
    expected = y.detach() + more
    y.add_(more)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(y.detach(), expected)
    torch.testing.assert_close(found, 2 * expected @ weight.dense(torch.float32), rtol=0, atol=1e-4)


def test_the_product_runs_in_the_dtype_of_its_input():
    weight = handle(OUT, IN)
    x = inputs(4, IN, dtype=torch.bfloat16).requires_grad_()
    y = frozen_linear(x, weight)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert [dtype for dtype, _ in weight.asked] == [torch.bfloat16] * 2


def test_nothing_is_kept_for_backward():
    weight = handle(OUT, IN)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = frozen_linear(inputs(4, IN).requires_grad_(), weight)
    assert kept == []
    ((function, _),) = y.grad_fn.next_functions  # behind a view
    assert function.saved_tensors == ()
    assert not [name for name, value in vars(function).items() if isinstance(value, torch.Tensor)]
    # A plain product keeps the dequantized weight: the assertion above would see it.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        nn.functional.linear(inputs(4, IN).requires_grad_(), weight.dense(torch.float32))
    assert [sorted(shape) for shape in kept] == [[IN, OUT]]


def test_without_a_gradient_to_make_backward_asks_for_no_weight():
    weight = handle(OUT, IN)
    y = frozen_linear(inputs(4, IN), weight)
    assert not y.requires_grad
    assert len(weight.asked) == 1


def _branch(x, down, up):
    return nn.functional.linear(nn.functional.linear(x, down), up)


@pytest.mark.parametrize("nonlinear", [False, True])
def test_a_checkpointed_region_does_not_recompute_the_product_it_ends_in(nonlinear):
    """Two linear modules; nobody needs the second one's output in backward, so recomputing stops before it."""
    first, second = handle(OUT, IN), handle(IN, OUT, seed=3)
    adapters = [inputs(4, IN), inputs(OUT, 4), inputs(4, OUT), inputs(IN, 4)]
    adapters = [tensor.requires_grad_() for tensor in adapters]

    def region(x):
        a1, b1, a2, b2 = adapters
        h = _branch(x, a1, b1)
        h = frozen_linear(x, first) + h
        if nonlinear:
            h = nn.functional.silu(h)
        branch = _branch(h, a2, b2)
        return frozen_linear(h, second) + branch

    x = inputs(5, IN).requires_grad_()
    plain = torch.autograd.grad(region(x).sum(), [x, *adapters])
    first.asked.clear()
    second.asked.clear()
    y = checkpoint(region, x, use_reentrant=False)
    assert (len(first.asked), len(second.asked)) == (1, 1)
    found = torch.autograd.grad(y.sum(), [x, *adapters])
    # Forward, recomputation (the second branch needs its output), backward; the second: forward and backward alone.
    assert (len(first.asked), len(second.asked)) == (3, 2)
    for value, expected in zip(found, plain, strict=True):
        assert torch.equal(value, expected)
