"""The singular values of a low-rank update, from its factors: nothing of the weight's size is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one update Δ.

    Attributes:
        values: σ₁ ≥ σ₂ ≥ …, as many as the factors allow for.
    """

    values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """‖Δ‖, Frobenius: √Σσ²."""
        return math.sqrt(math.fsum(value * value for value in self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σᵢ/Σσ (Roy and Vetterli 2007, "The effective rank"): n equal singular values give n; 0
        where there is no update."""
        total = math.fsum(self.values)
        shares = [value / total for value in self.values if value > 0] if total > 0 else []
        return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0

    def kept(self, r: int) -> float:
        """Share of ‖Δ‖² that the best rank r keeps (Eckart and Young 1936); 1 where there is no update."""
        squares = [value * value for value in self.values]
        total = math.fsum(squares)
        return math.fsum(squares[:r]) / total if total > 0 else 1.0

    def rank_for(self, share: float) -> int:
        """The lowest rank that keeps `share` of ‖Δ‖²; 0 where there is no update."""
        if not any(self.values):
            return 0
        return next(r for r in range(1, len(self.values) + 1) if self.kept(r) >= share - 1e-12)


def spectrum(factor_B: Tensor, factor_A: Tensor) -> Spectrum:
    """The singular values of B·A, B (out, k), A (k, in)."""
    values = torch.linalg.svdvals(_core(factor_B, factor_A)[1])
    return Spectrum(tuple(float(value) for value in values))


def best_factors(factor_B: Tensor, factor_A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B·A of rank r, as factors of its own: (out, r) and (r, in), fp64, the root of each
    singular value in either. Zeros fill them up where B·A has a lower rank than r."""
    left, core, right = _core(factor_B, factor_A)
    U, values, Vh = torch.linalg.svd(core, full_matrices=False)
    kept = min(r, len(values))
    roots = values[:kept].sqrt()
    best_B, best_A = left @ U[:, :kept] * roots, roots.unsqueeze(1) * (Vh[:kept] @ right.T)
    if kept == r:
        return best_B, best_A
    more = r - kept
    return torch.nn.functional.pad(best_B, (0, more)), torch.nn.functional.pad(best_A, (0, 0, 0, more))


def _core(factor_B: Tensor, factor_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L, K, R with B·A = L·K·Rᵀ, L and R of orthonormal columns: by QR of both factors, K is at most k × k."""
    left, upper_B = torch.linalg.qr(factor_B.double())
    right, upper_A = torch.linalg.qr(factor_A.double().T)
    return left, upper_B @ upper_A.T, right
