"""DoRA (Liu et al. 2024, arXiv 2402.09353): the weight split into a trained length and a LoRA-trained direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_tool.methods.lora import Lora
from qlora_tool.methods.method import Adapter, SavedWith, Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.ops.lora import LoraWeights
    from qlora_tool.weights.handles import WeightHandle
    from qlora_tool.weights.modules import FrozenLinear


class Dora(Lora):
    """y = m/‖W₀ + s·BA‖ · (x·W₀ᵀ + s·(x·Aᵀ)·Bᵀ), m (out,), the norm by output row.

    The norm takes no gradient (section 4.3 of the paper). It is computed from ‖W₀‖² + 2s·⟨W₀, BA⟩ + s²·‖BA‖² by row,
    which never makes BA: nothing of size out × in beside the weight itself. m is fp32: in bf16 the first step would
    already be 0.2 % off the base.
    """

    name = "dora"
    peft_names: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"
    }  # fmt: skip
    peft_embedding_names: ClassVar[Mapping[str, str]] = {
        **Lora.peft_embedding_names, "magnitude": "lora_magnitude_vector"
    }  # fmt: skip
    on_experts = on_parts = groups_experts = False
    optional = frozenset()
    additive = False  # it scales the whole output
    scales = frozenset()
    fp32 = frozenset({"magnitude"})

    def shapes(self, out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (r, in_features), "lora_B": (out_features, r), "magnitude": (out_features,)}

    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As LoRA, with m = ‖W₀‖ by row."""
        import torch

        magnitude = weight.dense(torch.float32).norm(dim=1)
        return super().start(out_features, in_features, settings, weight, generator) | {"magnitude": magnitude}

    def start_on_embedding(
        self, dim: int, vocabulary: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As LoRA, with m (dim,) the norm of each column of the embeddings, as in PEFT."""
        import torch

        start = super().start_on_embedding(dim, vocabulary, settings, weight, generator)
        return start | {"magnitude": weight.dense(torch.float32).norm(dim=0)}

    def looked_up(self, adapter: Adapter, index: Tensor, rows: Tensor, weight: WeightHandle) -> Tensor:
        """m/‖W₀ + s·BA‖ · (W₀ + s·BA), of (dim, vocabulary), in the columns that `index` names."""
        scaling = self.scaling(adapter.settings)
        norm = weight_norm(weight, adapter.tensors, scaling, rows.dtype, turned=True)
        factor = (adapter.tensors["magnitude"] / norm).to(rows.dtype)  # (dim,)
        return factor * super().looked_up(adapter, index, rows, weight)

    def forward(self, adapter: Adapter, x: Tensor, linear: FrozenLinear) -> Tensor:
        norm = weight_norm(linear.weight, adapter.tensors, self.scaling(adapter.settings), x.dtype)
        factor = (adapter.tensors["magnitude"] / norm).to(x.dtype)  # (out,)
        dropped = adapter.dropped(x)
        if dropped is x:
            return linear.with_bias(factor * (self.branch(adapter, x) + linear.product(x)))
        # The base keeps the whole input, what training adds to it does not.
        y = linear.product(x) + (factor - 1) * linear.product(dropped) + factor * self.branch(adapter, dropped)
        return linear.with_bias(y)

    def fused_weights(self, adapter: Adapter, linear: FrozenLinear) -> LoraWeights | None:
        return None

    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        direction = weight + super().delta(tensors, settings, weight)
        factor: Tensor = tensors["magnitude"].float() / direction.norm(dim=1)  # (out,)
        return factor.unsqueeze(1) * direction - weight

    def merge(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        return self.delta(tensors, settings, weight).add_(weight)

    def to_peft(self, settings: Settings, saved: SavedWith) -> dict[str, Any]:
        return super().to_peft(settings, saved) | {"use_dora": True}


def weight_norm(
    weight: WeightHandle, tensors: Mapping[str, Tensor], scaling: float, dtype: torch.dtype, *, turned: bool = False
) -> Tensor:
    """‖W₀ + s·BA‖ by row, without a gradient, fp32, (out,).

    Args:
        dtype: of the products with W₀.
        turned: whether `weight` is (in, out), as embeddings are.
    """
    import torch

    with torch.no_grad():
        dense = weight.dense(dtype).T if turned else weight.dense(dtype)
        lora_A, lora_B = tensors["lora_A"].float(), tensors["lora_B"].float()
        cross = (lora_B * (dense @ lora_A.T.to(dtype)).float()).sum(1)  # ⟨W₀, BA⟩ by row
        square = ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(1)  # ‖BA‖² by row
        rows = torch.linalg.vector_norm(dense, dim=1, dtype=torch.float32)  # ‖W₀‖ by row, without its squares
        squares: Tensor = rows.square() + 2 * scaling * cross + scaling * scaling * square
        return squares.sqrt()


METHOD = Dora()
