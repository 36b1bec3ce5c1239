"""DoRA (Liu et al. 2024, arXiv 2402.09353): the weight split into a trained length and a LoRA-trained direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_tool.adapters.lora import LoraAdapter
from qlora_tool.adapters.method import AdapterSettings

if TYPE_CHECKING:
    from qlora_tool.weights.handles import WeightHandle
    from qlora_tool.weights.modules import FrozenLinear


class DoraAdapter(LoraAdapter):
    """y = m/‖W₀ + s·BA‖ · (x·W₀ᵀ + s·(x·Aᵀ)·Bᵀ), m (out,), the norm by output row.

    The norm takes no gradient (section 4.3 of the paper). It is computed from ‖W₀‖² + 2s·⟨W₀, BA⟩ + s²·‖BA‖² by row,
    which never makes BA: nothing of size out × in beside the weight itself.
    """

    method = "dora"
    branch = None  # its effect is no sum: no other adapter can be active beside it

    def __init__(self, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, settings: AdapterSettings):
        super().__init__(lora_A, lora_B, settings)
        self.magnitude = nn.Parameter(magnitude)  # (out,)

    @classmethod
    def start(
        cls, linear: FrozenLinear, settings: AdapterSettings, dtype: torch.dtype, generator: torch.Generator
    ) -> DoraAdapter:
        """As LoRA, with m = ‖W₀‖ by row."""
        lora = LoraAdapter.start(linear, settings, dtype, generator)
        magnitude = linear.weight.dense(torch.float32).norm(dim=1).to(dtype)
        return cls(lora.lora_A.detach(), lora.lora_B.detach(), magnitude, settings)

    @classmethod
    def from_peft(cls, tensors: Mapping[str, Tensor], settings: AdapterSettings) -> DoraAdapter:
        return cls(tensors["lora_A.weight"], tensors["lora_B.weight"], tensors["lora_magnitude_vector"], settings)

    def forward(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        factor = (self.magnitude / self.weight_norm(linear.weight, x.dtype)).to(x.dtype)  # (out,)
        if self.dropout is None or not self.training:
            y = factor * (self.update(x) + linear.product(x))
        else:
            dropped = self.dropout(x)  # the base keeps the whole input, what training adds to it does not
            y = linear.product(x) + (factor - 1) * linear.product(dropped) + factor * self.update(dropped)
        return y if linear.bias is None else y + linear.bias.to(y.dtype)

    @torch.no_grad()
    def weight_norm(self, weight: WeightHandle, dtype: torch.dtype) -> Tensor:
        """‖W₀ + s·BA‖ by row, fp32, (out,)."""
        s = self.settings.scaling
        dense = weight.dense(dtype)
        lora_A, lora_B = self.lora_A.float(), self.lora_B.float()
        cross = (lora_B * (dense @ lora_A.T.to(dtype)).float()).sum(1)  # ⟨W₀, BA⟩ by row
        square = ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(1)  # ‖BA‖² by row
        rows = torch.linalg.vector_norm(dense, dim=1, dtype=torch.float32)  # ‖W₀‖ by row, without its squares
        return (rows.square() + 2 * s * cross + s * s * square).sqrt()

    def delta(self, weight: Tensor) -> Tensor:
        direction = weight + super().delta(weight)
        return (self.magnitude.float() / direction.norm(dim=1)).unsqueeze(1) * direction - weight

    def peft_tensors(self) -> dict[str, nn.Parameter]:
        return super().peft_tensors() | {"lora_magnitude_vector": self.magnitude}
