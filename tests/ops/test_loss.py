"""The loss in chunks against the cross-entropy of full logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_tool.ops import loss
from qlora_tool.ops.declare import Target, meant_for
from qlora_tool.ops.loss import LogitsTransform, frozen_cross_entropy, linear_cross_entropy

HIDDEN, VOCABULARY = 16, 50


def case(rows: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    return hidden.requires_grad_(), weight, labels


def whole(hidden, weight, labels, transform=lambda logits: logits, label_smoothing=0.0):
    """Sum and gradient from full logits in fp64."""
    hidden = hidden.detach().double().requires_grad_()
    logits = transform(hidden @ weight.double().T)
    total = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return total.detach(), torch.autograd.grad(total, hidden)[0]


def assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    """As close as the fp32 that the loss is taken in allows: a few roundings of the largest value."""
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2**-20 * max(float(exact.abs().max()), 1.0))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "chunk_rows"), [(1, 256), (1, 1), (7, 3), (8, 4), (300, 256), (5, 500)])
def test_sum_and_gradient_are_those_of_full_logits(rows, chunk_rows, label_smoothing):
    hidden, weight, labels = case(rows)
    found = linear_cross_entropy(
        hidden, labels, lambda x: x @ weight.T, label_smoothing=label_smoothing, chunk_rows=chunk_rows
    )
    total, grad = whole(hidden, weight, labels, label_smoothing=label_smoothing)
    assert found.dtype == torch.float32
    assert_close(found.detach(), total)
    found.backward()
    assert_close(hidden.grad, grad)


@pytest.mark.parametrize("transform", [LogitsTransform(0.25), LogitsTransform(8.0, 3.0), LogitsTransform(softcap=2.0)])
def test_what_a_family_does_to_its_logits_is_differentiated(transform):
    hidden, weight, labels = case(9)
    found = linear_cross_entropy(hidden, labels, lambda x: transform(x @ weight.T), chunk_rows=4)

    def by_definition(logits):
        logits = logits * transform.scale
        return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)

    total, grad = whole(hidden, weight, labels, by_definition)
    found.backward()
    assert_close(found.detach(), total)
    assert_close(hidden.grad, grad)


def test_without_rows_the_sum_is_zero_and_so_is_the_gradient():
    hidden, weight, labels = case(0)
    found = linear_cross_entropy(hidden, labels, lambda x: x @ weight.T)
    assert found.item() == 0.0
    found.backward()
    assert hidden.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_evaluation_gives_the_same_sum(grad_enabled):
    hidden, weight, labels = case(9)
    trained = linear_cross_entropy(hidden, labels, lambda x: x @ weight.T, chunk_rows=4)
    with torch.set_grad_enabled(grad_enabled):
        evaluated = linear_cross_entropy(hidden.detach(), labels, lambda x: x @ weight.T, chunk_rows=4)
    assert not evaluated.requires_grad
    assert evaluated.item() == trained.item()


def test_the_upstream_gradient_scales_without_rounding():
    """1/3 is no bf16 number: rounding it first would shift every gradient of a step by the same 0.2 %."""
    hidden, weight, labels = case(6, torch.bfloat16)
    (linear_cross_entropy(hidden, labels, lambda x: x @ weight.T) / 3).backward()
    other = hidden.detach().requires_grad_()
    linear_cross_entropy(other, labels, lambda x: x @ weight.T).backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert torch.equal(hidden.grad, (other.grad.float() / 3).to(torch.bfloat16))


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_logits_of_more_rows_than_a_chunk_are_made(with_gradient):
    hidden, weight, labels = case(10)
    seen = []

    def project(x):
        seen.append(x.shape[0])
        return x @ weight.T

    kept = []
    with (
        torch.set_grad_enabled(with_gradient),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t),
    ):
        linear_cross_entropy(hidden, labels, project, chunk_rows=4)
    assert seen == [4, 4, 2]
    # A chunk's own logits are kept while it is differentiated; for the caller's backward, (rows, hidden) alone.
    large = [shape for shape in kept if shape and shape[0] > 4 and shape != (HIDDEN, VOCABULARY)]
    assert large == ([(10, HIDDEN)] if with_gradient else [])


class Handle:
    """A frozen projection that counts how often it is asked for."""

    def __init__(self, weight):
        self.weight, self.shape, self.asked = weight, tuple(weight.shape), 0

    def dense(self, dtype, expert=None):
        self.asked += 1
        return self.weight.to(dtype)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "transform", [LogitsTransform(), LogitsTransform(0.25), LogitsTransform(8.0, 3.0), LogitsTransform(softcap=2.0)]
)
@pytest.mark.parametrize(("rows", "chunk_rows"), [(1, 256), (7, 3), (0, 4)])
def test_a_frozen_projection_gives_the_sum_and_gradient_of_full_logits(
    rows, chunk_rows, transform, bias, label_smoothing
):
    hidden, weight, labels = case(rows)
    added = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64) if bias else None
    head = Handle(weight)
    options = {"transform": transform, "label_smoothing": label_smoothing, "chunk_rows": chunk_rows}
    found = frozen_cross_entropy(hidden, labels, head, added, **options)
    found.backward()

    def transformed(logits):
        logits = (logits + (0 if added is None else added)) * transform.scale
        return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)

    total, grad = whole(hidden, weight, labels, transformed, label_smoothing) if rows else (torch.zeros(()), hidden)
    assert (found.dtype, head.asked) == (torch.float32, 1)
    assert_close(found.detach(), total.double())
    if rows:
        assert_close(hidden.grad, grad)
    with torch.no_grad():
        assert frozen_cross_entropy(hidden, labels, head, added, **options).item() == found.item()


def test_a_frozen_projection_in_bf16_keeps_the_loss_in_fp32():
    hidden, weight, labels = case(40, torch.bfloat16)
    found = frozen_cross_entropy(hidden, labels, Handle(weight), chunk_rows=16)
    logits = hidden.detach() @ weight.T  # rounded to bf16, as every path has them
    expected = nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    assert_close(found.detach(), expected)
    found.backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("device", "vocabulary", "expected"), [
    ("cpu", 32000, 262), ("cuda", 32000, 512), ("cuda", 128256, 261), ("cpu", 128256, 128), ("cuda", 262144, 128),
])  # fmt: skip
def test_a_card_is_given_more_rows_at_a_time(device, vocabulary, expected, monkeypatch):
    """By bytes of fp32 logits, from 128 rows on, and on a card no more than 512; seen in what is given to the products.
    Nothing is computed: meta tensors."""
    seen = []

    def product(left, right):
        seen.append(left.shape[0])
        return left @ right

    monkeypatch.setattr(loss, "matmul", product)
    hidden, labels = torch.empty(1100, 8, device="meta"), torch.empty(1100, dtype=torch.int64, device="meta")
    with meant_for(Target(device, (8, 9))), torch.no_grad():
        frozen_cross_entropy(hidden, labels, Handle(torch.empty(vocabulary, 8, device="meta")))
    assert seen[0] == expected and sum(seen) == 1100
