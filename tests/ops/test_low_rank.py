"""Best low-rank fits against numpy, and against all that could be better; the exact product that is taken away."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch
from torch import Tensor

from qlora_tool.ops.low_rank import best_fit, less_product, weighted_fit


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def truncated(matrix: Tensor, r: int) -> numpy.ndarray:
    left, sizes, right = numpy.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return left[:, :r] * sizes[:r] @ right[:r]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_best_fit_is_the_truncated_decomposition_with_both_sides_alike(shape):
    # Of known singular values, the sixth far below the fifth: where they lie close, the vectors of every decomposition
    # in fp32 are as unsure as the gap is small.
    sizes = torch.tensor([2.0, 1.7, 1.4, 1.2, 1.0, *[0.3] * 19], dtype=torch.float64)
    left, right = (torch.linalg.qr(noise(size, 24, seed=size).double()).Q for size in shape)
    matrix = (left * sizes @ right.T).float()
    torch.testing.assert_close(torch.from_numpy(truncated(matrix, 5)), left[:, :5] * sizes[:5] @ right[:, :5].T,
                               rtol=0, atol=1e-6)  # fmt: skip
    B, A = best_fit(matrix, 5)
    assert (B.shape, A.shape, B.dtype) == ((shape[0], 5), (5, shape[1]), torch.float32)
    assert numpy.abs((B @ A).numpy() - truncated(matrix, 5)).max() < 1e-5  # sums of 40 products in fp32
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-5)


def test_the_randomized_fit_comes_near_with_its_iterations_and_depends_on_the_generator_alone():
    matrix = noise(60, 8, seed=1) @ noise(8, 80, seed=2) + 0.3 * noise(60, 80, seed=3)

    def fit(iterations: int, seed: int) -> Tensor:
        B, A = best_fit(matrix, 4, iterations, torch.Generator().manual_seed(seed))
        return B @ A

    best = float((matrix - torch.from_numpy(truncated(matrix, 4)).float()).norm())
    over = [float((matrix - fit(iterations, 0)).norm()) / best - 1 for iterations in (0, 4)]
    assert over[1] < 1e-3 and over[1] < over[0]
    torch.manual_seed(5)
    assert torch.equal(fit(2, 7), fit(2, 7)) and not torch.equal(fit(2, 7), fit(2, 8))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_weighted_fit_is_qeras_closed_form(shape):
    """SVD_r(E·R^½)·R^-½, theorem 1 of the paper, in fp64 with an inverse root."""
    error, x = noise(*shape, seed=1), noise(200, shape[1], seed=2) @ noise(shape[1], shape[1], seed=3)
    moments = x.T @ x
    sizes, axes = numpy.linalg.eigh(moments.double().numpy())
    root = axes * numpy.sqrt(sizes) @ axes.T
    expected = truncated(torch.from_numpy(error.double().numpy() @ root), 5) @ numpy.linalg.inv(root)
    B, A = weighted_fit(error, moments, 5)
    assert numpy.abs((B @ A).numpy() - expected).max() < 1e-4 * numpy.abs(expected).max()
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_inputs_that_span_less_than_the_rank_are_made_good_whole(shape):
    error, x = noise(*shape, seed=1), noise(200, 3, seed=2) @ noise(3, shape[1], seed=3)
    B, A = weighted_fit(error, x.T @ x, 5)
    assert torch.isfinite(B).all() and torch.isfinite(A).all()
    left = float(((error - B @ A) @ x.T).norm() / (error @ x.T).norm())
    assert left < 1e-4  # R's small eigenvalues are known to fp32's 6e-8 of its largest, and their roots to 2.4e-4


def test_nothing_to_fit_is_a_fit_of_zeros():
    B, A = weighted_fit(torch.zeros(6, 9), torch.eye(9), 2)
    assert not (B @ A).any() and torch.isfinite(B).all() and torch.isfinite(A).all()


def test_what_is_taken_away_is_the_exact_product_rounded_once():
    weight, B, A = noise(7, 9, seed=1), noise(7, 12, seed=2).bfloat16(), noise(12, 9, seed=3).bfloat16()
    found = less_product(weight.bfloat16(), B, A, 1.75)
    for row in range(7):
        for column in range(9):
            terms = (Fraction(float(b)) * Fraction(float(a)) for b, a in zip(B[row], A[:, column], strict=True))
            exact = Fraction(float(weight[row, column].bfloat16())) - Fraction(1.75) * sum(terms)
            assert float(found[row, column]) == float(torch.tensor(float(exact), dtype=torch.float32))


def test_the_order_of_the_sum_makes_no_difference_to_a_bit():
    """As another machine's library takes it in another order."""
    weight, B, A = noise(64, 96, seed=1), noise(64, 32, seed=2).bfloat16(), noise(32, 96, seed=3).bfloat16()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    found = less_product(weight, B, A, 2 / 3)
    assert torch.equal(found, less_product(weight, B[:, order].contiguous(), A[order].contiguous(), 2 / 3))


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_of_larger_matrices_the_weighted_fit_comes_near(shape):
    """It leaves at most 0.1 % more of the outputs than the exact one does: of errors as quantizing makes them, without
    singular values of their own to speak of, on inputs of which some directions are much larger."""
    error = noise(*shape, seed=1)
    x = noise(400, shape[1], seed=2) * torch.linspace(0, 3, shape[1]).exp()
    moments = x.T @ x
    left = []
    for largest in (1000, 10):
        B, A = weighted_fit(error, moments, 8, torch.Generator().manual_seed(3), largest)
        left.append(float(((error - B @ A) @ x.T).norm()))
    assert left[1] < 1.001 * left[0] < 0.999 * float((error @ x.T).norm())
    again = weighted_fit(error, moments, 8, torch.Generator().manual_seed(3), 10)
    assert torch.equal(again[0], B) and torch.equal(again[1], A)
