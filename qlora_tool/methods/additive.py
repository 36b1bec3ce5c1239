"""The additive update (Su Jianlin 2023, "LoRA from the gradient's viewpoint"): to each row and column a sum of its own,
or of its own place in blocks of r × r."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_tool.methods.keys import MethodKeys
from qlora_tool.methods.lora import METHOD as LORA
from qlora_tool.methods.method import Adapter, Method, PeftForm, SavedWith, Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.weights.handles import WeightHandle


class AdditiveKeys(MethodKeys):
    """It has no keys of its own, and no scale."""

    not_read = frozenset({"lora_alpha", "alpha_pattern"})


class Additive(Method):
    """y = x·W₀ᵀ + (x·Tᵢᵀ)·Aᵀ + (x·Bᵀ)·Tₒᵀ, A (out, r), B (r, in).

    Tᵢ (r, in) is r × r identities side by side, Tₒ (out, r) the same one below the other, so that
    Δw_oi = A_o,(i mod r) + B_(o mod r),i; at r = 1 that is u_o + v_i, a sum for each row and each column. Where r does
    not divide in or out, the last identity is cut off there, which that formula has as well. Neither T is ever made:
    x·Tᵢᵀ adds the blocks of x, and Tₒ repeats what it is given.

    There is no scale: nothing is multiplied, so a scale would only be another learning rate. PEFT has no form of it; as
    a LoRA of rank 2r at scale 1 it is exactly [A, Tₒ]·[Tᵢ; B].
    """

    name = "additive"
    usual_rates = (1e-5, 1e-3)
    peft_type = LORA.peft_type
    keys = AdditiveKeys
    scales = frozenset({"additive_A", "additive_B"})
    peft_names: ClassVar[Mapping[str, str]] = {}  # see `peft_form`

    def shapes(self, out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"additive_A": (out_features, r), "additive_B": (r, in_features)}

    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Zeros on the trained side of each product.

        The other side is an identity that stays, so the gradients, (∂L/∂W)·Tᵢᵀ and Tₒᵀ·(∂L/∂W), are there from the
        first step, which LoRA with two zeros would never have; and the first step computes as the base does.
        """
        import torch

        return {name: torch.zeros(shape) for name, shape in self.shapes(out_features, in_features, settings.r).items()}

    def branch(self, adapter: Adapter, x: Tensor) -> Tensor:
        import torch
        from torch.nn.functional import linear

        A, B = (adapter.tensors[name].to(x.dtype) for name in ("additive_A", "additive_B"))
        out_features, r = A.shape
        y, repeated = linear(block_sums(x, r), A), linear(x, B)  # (…, out), (…, r)
        blocks = out_features // r
        head: Tensor = (y[..., : blocks * r].unflatten(-1, (blocks, r)) + repeated.unsqueeze(-2)).flatten(-2)
        if blocks * r == out_features:
            return head
        return torch.cat([head, y[..., blocks * r :] + repeated[..., : out_features % r]], -1)

    def scaling(self, settings: Settings) -> float:
        return 1.0

    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        import torch

        A, B = tensors["additive_A"].float(), tensors["additive_B"].float()
        rows, columns = torch.arange(A.shape[0], device=A.device), torch.arange(B.shape[1], device=A.device)
        return A[:, columns % A.shape[1]].add_(B[rows % B.shape[0]])

    # PEFT's files

    def peft_form(self, tensors: Mapping[str, Tensor], settings: Settings) -> PeftForm:
        """The LoRA of rank 2r that equals it: A and B with the identities beside and above."""
        import torch

        A, B = tensors["additive_A"].detach(), tensors["additive_B"].detach()
        one = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        rows, columns = torch.arange(A.shape[0], device=A.device), torch.arange(B.shape[1], device=A.device)
        lora = {
            "lora_A": torch.cat([one[:, columns % len(one)], B]),  # (2r, in)
            "lora_B": torch.cat([A, one[rows % len(one)]], 1),  # (out, 2r)
        }
        method, equal = self.peft_settings(settings)
        return PeftForm(method, lora, equal)

    def peft_settings(self, settings: Settings) -> tuple[Method, Settings]:
        return LORA, Settings(2 * settings.r, 2 * settings.r, settings.dropout, LORA.keys())

    def to_peft(self, settings: Settings, saved: SavedWith) -> dict[str, Any]:
        return LORA.to_peft(self.peft_settings(settings)[1], saved)

    def from_peft(self, file: Path, config: Mapping[str, Any]) -> Settings | None:
        """None: what was saved is a LoRA, and read as one."""
        return None

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
        A, B = tensors["additive_A"], tensors["additive_B"]
        return A.shape[0], B.shape[-1], A.shape[-1]


def block_sums(x: Tensor, r: int) -> Tensor:
    """x·Tᵢᵀ: x (…, in) → (…, r), the sum of the blocks of r values, the last of which may be shorter."""
    from torch.nn.functional import pad

    blocks, rest = divmod(x.shape[-1], r)
    sums: Tensor = x[..., : blocks * r].unflatten(-1, (blocks, r)).sum(-2)
    return sums if not rest else sums + pad(x[..., blocks * r :], (0, r - rest))


METHOD = Additive()
