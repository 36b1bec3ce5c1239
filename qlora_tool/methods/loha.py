"""LoHa, or FedPara (Hyeon-Woo et al. 2021, arXiv 2108.06098): an update that is the elementwise product of two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_tool.methods.keys import MethodKeys
from qlora_tool.methods.method import Adapter, Method, SavedWith, Settings, number_in, refuse_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.weights.handles import WeightHandle

CHUNK = 1 << 20  # values of Δ that are made at a time
# What PEFT's LoHa may have beside, and the value with which it changes nothing here.
_NOT_READ = {"rank_dropout": 0.0, "module_dropout": 0.0, "layer_replication": None}


class LohaKeys(MethodKeys):
    """LoHa has no keys of its own; PEFT's has neither dropout on the input nor biases."""

    not_read = frozenset({"lora_dropout", "bias"})


class Loha(Method):
    """y = x·W₀ᵀ + x·Δᵀ, Δ = s·(A₁B₁)∘(A₂B₂), A (out, r), B (r, in), s = α/r: of rank up to r².

    Unlike LoRA's, Δ has to be made to be multiplied with: some rows of it at a time, forward and once more in backward,
    so that nothing of the weight's size is ever held.
    """

    name = "loha"
    usual_rates = (1e-4, 2e-2)
    peft_type = "LOHA"
    keys = LohaKeys
    peft_takes_conv1d = False
    scales = frozenset({"hada_w1_a"})
    peft_names: ClassVar[Mapping[str, str]] = {
        name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    }

    def shapes(self, out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        return {f"hada_w{number}_{part}": (out_features, r) if part == "a" else (r, in_features)
                for number in (1, 2) for part in "ab"}  # fmt: skip

    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """B₂ = 0, the others Kaiming-uniform(√5), as in PEFT."""
        import torch

        shapes = self.shapes(out_features, in_features, settings.r)
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a"):
            torch.nn.init.kaiming_uniform_(tensors[name], a=math.sqrt(5), generator=generator)
        return tensors

    def branch(self, adapter: Adapter, x: Tensor) -> Tensor:
        """x·Δᵀ, by rows of Δ."""
        import torch
        from torch.utils.checkpoint import checkpoint

        first, second, left, right = (adapter.tensors[name].to(x.dtype) for name in
                                      ("hada_w1_a", "hada_w2_a", "hada_w1_b", "hada_w2_b"))  # fmt: skip
        rows = max(1, CHUNK // left.shape[1])
        pairs = zip(first.split(rows), second.split(rows), strict=True)
        outputs = [checkpoint(_rows_product, x, *pair, left, right, use_reentrant=False, preserve_rng_state=False)
                   for pair in pairs]  # fmt: skip
        return torch.cat(outputs, -1) * self.scaling(adapter.settings)

    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        first = tensors["hada_w1_a"].float() @ tensors["hada_w1_b"].float()
        second = tensors["hada_w2_a"].float() @ tensors["hada_w2_b"].float()
        return first.mul_(second).mul_(self.scaling(settings))

    def factors(
        self, tensors: Mapping[str, Tensor], settings: Settings, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """(A₁B₁)∘(A₂B₂) is a product of rank r²: rows of A₁ by rows of A₂ (out, r²), times columns by columns of B₁ and
        B₂ (r², in); Hyeon-Woo et al. 2021, proposition 1."""
        first, second, left, right = (tensors[name].double() for name in
                                      ("hada_w1_a", "hada_w2_a", "hada_w1_b", "hada_w2_b"))  # fmt: skip
        if settings.r**2 > min(shape):
            return None
        rows = (first[:, :, None] * second[:, None, :]).flatten(1)  # (out, r²)
        return rows * self.scaling(settings), (left[:, None, :] * right[None, :, :]).flatten(0, 1)

    def to_peft(self, settings: Settings, saved: SavedWith) -> dict[str, Any]:
        return {"alpha": settings.alpha, "rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True}

    def from_peft(self, file: Path, config: Mapping[str, Any]) -> Settings | None:
        if config.get("peft_type") != self.peft_type:
            return None
        refuse_keys(file, config, _NOT_READ)
        return Settings(number_in(file, config, "r", whole=True), number_in(file, config, "alpha"), keys=self.keys())

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
        return tensors["hada_w1_a"].shape[0], tensors["hada_w1_b"].shape[-1], tensors["hada_w1_b"].shape[0]


def _rows_product(x: Tensor, first: Tensor, second: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (…, in) · ((A₁B₁)∘(A₂B₂))ᵀ → (…, rows): A₁, A₂ (rows, r), B₁, B₂ (r, in)."""
    return x @ ((first @ left) * (second @ right)).T


METHOD = Loha()
