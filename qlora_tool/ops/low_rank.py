"""Best low-rank fits of a matrix, plain and weighted by the second moments of what it is multiplied with."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 8  # columns beyond the rank (Halko et al. 2011, section 4.2: 5 or 10)
LARGEST, ITERATIONS = 1024, 8  # a decomposition of a larger matrix takes seconds, and a model has hundreds


def best_fit(matrix: Tensor, r: int, iterations: int | None = None, generator: torch.Generator | None = None) -> tuple[
    Tensor, Tensor
]:
    """B (out, r) and A (r, in), fp32, such that BA is the best fit of rank r (Eckart and Young): B = U·√Σ, A = √Σ·Vᵀ.

    Args:
        matrix: (out, in).
        iterations: None: by the exact decomposition; else by a randomized one with this many power iterations (Halko et
            al. 2011, arXiv 0909.4061, algorithms 4.4 and 5.1).
        generator: what the randomized one draws from, a CPU one.
    """
    matrix = matrix.float()
    if iterations is None:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _range(matrix, min(r + OVERSAMPLING, *matrix.shape), iterations, generator)  # (out, columns)
        inner, sizes, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ inner
    roots = sizes[:r].sqrt()
    return (left[:, :r] * roots).contiguous(), (roots.unsqueeze(1) * right[:r]).contiguous()


def _range(matrix: Tensor, columns: int, iterations: int, generator: torch.Generator | None) -> Tensor:
    """Orthonormal columns that nearly span what the largest singular vectors do."""
    drawn = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ drawn).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis


def weighted_fit(
    error: Tensor, moments: Tensor, r: int, generator: torch.Generator | None = None, largest: int = LARGEST
) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in), fp32, such that E‖(error − BA)·x‖² is least.

    QERA-exact (Zhang et al. 2024, arXiv 2410.06040, theorem 1; CLoQ, arXiv 2501.18475, theorem 3.1, is the same fit):
    BA = U·Uᵀ·error, U the first r left singular vectors of error·R^½. R needs no inverse that way, so inputs that span
    less than the whole space are no exception.

    Args:
        error: (out, in).
        moments: R = E[x·xᵀ], (in, in), or any multiple of it.
        generator: what the vectors of larger matrices are drawn from, a CPU one.
        largest: the smaller side up to which U is exact; above, it is what `ITERATIONS` of subspace iteration give.
    """
    if min(error.shape) > largest:
        vectors = _dominant(error.float(), moments.float(), r, generator)
    else:
        vectors = _singular_vectors(error.double(), moments.double(), r)
    projected = vectors.T @ error.to(vectors.dtype)  # (r, in)
    roots = projected.norm(dim=1).sqrt()  # so that a row of A is as long as B's column
    safe = torch.where(roots > 0, roots, 1.0)
    return (vectors * roots).float().contiguous(), (projected / safe.unsqueeze(1)).float().contiguous()


def _singular_vectors(error: Tensor, moments: Tensor, r: int) -> Tensor:
    """The first r left singular vectors of error·R^½, (out, r), by the smaller of the two matrices of its squares."""
    out_features, in_features = error.shape
    if out_features <= in_features:
        return torch.linalg.eigh(error @ moments @ error.T).eigenvectors[:, -r:].flip(1)
    sizes, axes = torch.linalg.eigh(moments)
    scaled = error @ (axes * sizes.clamp(min=0).sqrt())  # error·R^½, turned by `axes`
    right = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -r:].flip(1)
    return torch.linalg.qr(scaled @ right).Q


def _dominant(error: Tensor, moments: Tensor, r: int, generator: torch.Generator | None) -> Tensor:
    """The same, nearly, by subspace iteration: error·R·errorᵀ is never made, and nothing costs more than a product."""
    columns = min(2 * r + OVERSAMPLING, *error.shape)
    basis = torch.randn(error.shape[0], columns, generator=generator).to(error.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(error @ (moments @ (error.T @ basis))).Q
    inner = error.T @ basis  # (in, columns)
    return basis @ torch.linalg.eigh((inner.T @ (moments @ inner)).double()).eigenvectors[:, -r:].flip(1).float()


def less_product(weight: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
    """W − s·BA, fp32, (out, in), the same bits on every machine where A and B are in 16 bits.

    Their products are then exact in fp64, and so are sums of some of those, in whatever order a machine takes them;
    each value is rounded once, to fp32.
    """
    result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows = max(1, (1 << 24) // weight.shape[1])  # of the product, at a time: 128 MB of it
    right = A.to(weight.device, torch.float64)
    for begin in range(0, weight.shape[0], rows):
        part = slice(begin, begin + rows)
        product = B[part].to(weight.device, torch.float64) @ right
        result[part] = weight[part].double() - product.mul_(scaling)
    return result
