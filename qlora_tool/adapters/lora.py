"""LoRA (Hu et al. 2021, arXiv 2106.09685), with the rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from qlora_tool.adapters.method import Adapter, AdapterSettings
from qlora_tool.ops.lora import LoraPart, lora_linear

if TYPE_CHECKING:
    from qlora_tool.adapters.fusion import SharedInput
    from qlora_tool.weights.modules import FrozenLinear


class LoraAdapter(Adapter):
    """y = x·W₀ᵀ + s·(x·Aᵀ)·Bᵀ, A (r, in), B (out, r).

    An adapter that PEFT made with `lora_bias` also adds s·b, b (out,).

    Attributes:
        fused: whether the fused operations are taken where they can be; False is the plain path, for comparisons.
        shared: the modules that this one's input goes to as well, or None.
    """

    method = "lora"
    fused: ClassVar[bool] = True

    def __init__(self, lora_A: Tensor, lora_B: Tensor, settings: AdapterSettings, lora_B_bias: Tensor | None = None):
        super().__init__()
        self.settings = settings
        self.lora_A = nn.Parameter(lora_A)  # (r, in)
        self.lora_B = nn.Parameter(lora_B)  # (out, r)
        self.lora_B_bias = None if lora_B_bias is None else nn.Parameter(lora_B_bias)  # (out,)
        self.dropout = nn.Dropout(settings.dropout) if settings.dropout else None
        self.shared: SharedInput | None = None

    @classmethod
    def start(
        cls, linear: FrozenLinear, settings: AdapterSettings, dtype: torch.dtype, generator: torch.Generator
    ) -> LoraAdapter:
        """B = 0. A is Kaiming-uniform(√5): uniform within ±1/√in; `gaussian`: normal of deviation 1/r, as in PEFT."""
        device = linear.weight.device
        lora_A = torch.empty(settings.r, linear.in_features)
        if settings.init == "gaussian":
            nn.init.normal_(lora_A, std=1 / settings.r, generator=generator)
        else:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        lora_B = torch.zeros(linear.out_features, settings.r, dtype=dtype, device=device)
        return cls(lora_A.to(device, dtype), lora_B, settings)

    @classmethod
    def from_peft(cls, tensors: Mapping[str, Tensor], settings: AdapterSettings) -> LoraAdapter:
        return cls(tensors["lora_A.weight"], tensors["lora_B.weight"], settings, tensors.get("lora_B.bias"))

    def part(self, linear: FrozenLinear) -> LoraPart:
        """What the fused operations take."""
        return LoraPart(linear.weight, self.lora_A, self.lora_B, self.settings.scaling, linear.bias)

    def is_fusable(self, linear: FrozenLinear) -> bool:
        """Whether the fused operations compute what this adapter does."""
        drops = self.dropout is not None and self.training
        plain = type(self) is LoraAdapter and self.lora_B_bias is None
        return self.fused and plain and not drops and not linear.weight.is_trained

    def forward(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        if self.is_fusable(linear):
            return lora_linear(x, [self.part(linear)])[0] if self.shared is None else self.shared.output(x, linear)
        # The branch comes first: it is all that backward needs, so recomputation ends before the base product.
        branch = self.branch(x)
        y = linear.product(x) + branch
        return y if linear.bias is None else y + linear.bias.to(y.dtype)

    def branch(self, x: Tensor) -> Tensor:
        """What the adapter adds to the product, dropout included: (…, in) → (…, out)."""
        return self.update(x if self.dropout is None else self.dropout(x))

    def update(self, x: Tensor) -> Tensor:
        """s·(x·Aᵀ)·Bᵀ: (…, in) → (…, out)."""
        z = nn.functional.linear(x, self.lora_A.to(x.dtype))  # (…, r)
        bias = None if self.lora_B_bias is None else self.lora_B_bias.to(x.dtype)
        return nn.functional.linear(z, self.lora_B.to(x.dtype), bias) * self.settings.scaling

    def delta(self, weight: Tensor) -> Tensor:
        return self.lora_B.float() @ self.lora_A.float() * self.settings.scaling

    def bias_delta(self) -> Tensor | None:
        """What merging adds to the linear's bias, fp32, (out,); None where nothing."""
        return None if self.lora_B_bias is None else self.lora_B_bias.float() * self.settings.scaling

    def peft_tensors(self) -> dict[str, nn.Parameter]:
        tensors = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        return tensors if self.lora_B_bias is None else tensors | {"lora_B.bias": self.lora_B_bias}
