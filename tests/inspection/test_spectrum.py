"""Singular values from factors, against numpy's of the product; what is derived from them, against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qlora_tool.inspection.spectrum import Spectrum, best_factors, spectrum

SHAPES = [(40, 24, 6), (24, 40, 6), (24, 24, 1), (5, 30, 16), (30, 5, 16)]  # the last two: r above the matrix


def factors(out: int, width: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out + width + r)
    return torch.randn(out, r, generator=generator), torch.randn(r, width, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_numpys(shape: tuple[int, int, int]):
    B, A = factors(*shape)
    expected = np.linalg.svd((B.double() @ A.double()).numpy(), compute_uv=False)[: min(shape)]
    np.testing.assert_allclose(spectrum(B, A).values, expected, rtol=1e-12, atol=1e-12 * expected[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("r", [1, 3, 20])
def test_the_best_factors_are_the_best_rank_r(shape: tuple[int, int, int], r: int):
    B, A = factors(*shape)
    U, values, Vh = np.linalg.svd((B.double() @ A.double()).numpy(), full_matrices=False)
    expected = (U[:, :r] * values[:r]) @ Vh[:r]
    best_B, best_A = best_factors(B, A, r)
    assert (best_B.shape, best_A.shape) == ((shape[0], r), (r, shape[1]))
    np.testing.assert_allclose((best_B @ best_A).numpy(), expected, atol=1e-12 * values[0])


def test_what_ranks_keep_by_hand():
    found = Spectrum((3.0, 2.0, 1.0, 0.0))  # squares 9, 4, 1 of 14
    assert found.norm == pytest.approx(math.sqrt(14))
    assert [found.kept(r) for r in range(5)] == pytest.approx([0, 9 / 14, 13 / 14, 1, 1])
    assert [found.rank_for(share) for share in (0.5, 9 / 14, 0.9, 0.93, 1.0)] == [1, 1, 2, 3, 3]
    entropy = -sum(share * math.log(share) for share in (1 / 2, 1 / 3, 1 / 6))
    assert found.effective_rank == pytest.approx(math.exp(entropy))
    assert Spectrum((2.0,) * 5).effective_rank == pytest.approx(5)


def test_no_update():
    found = spectrum(torch.zeros(4, 2), torch.ones(2, 3))
    assert (found.norm, found.effective_rank, found.rank_for(0.9), found.kept(0)) == (0, 0, 0, 1)
