"""LoRA (Hu et al. 2021, arXiv 2106.09685), with the rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732) and
LoRA+'s two learning rates (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from qlora_tool.errors import UserError
from qlora_tool.methods.keys import Mark, MethodKeys, Positive
from qlora_tool.methods.method import Adapter, Method, SavedWith, Settings, refuse_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.ops.lora import LoraWeights
    from qlora_tool.weights.handles import WeightHandle
    from qlora_tool.weights.modules import FrozenLinear

# What changes a LoRA layer's forward pass, its places or the base beside A and B, and is not done here.
_NOT_READ = dict.fromkeys(
    (
        "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "layer_replication", "arrow_config",
        "use_qalora", "use_bdlora", "monteclora_config", "kasa_config",
    )
)  # fmt: skip
_STARTS_READ = (True, False, None, "gaussian", "eva", "orthogonal")  # the others take something out of the base


_Start = Literal["default", "gaussian"]


def _to_start(value: Any) -> Any:
    """PEFT's true is what we call default."""
    return "default" if value is True else value


class LoraKeys(MethodKeys):
    """Keys that LoRA and DoRA read."""

    use_rslora: bool = False
    """Scale the update by lora_alpha / sqrt(r) instead."""
    init_lora_weights: Annotated[
        _Start, BeforeValidator(_to_start, json_schema_input_type=_Start | Literal[True])
    ] = "default"
    """How A and B start."""
    loraplus_lr_ratio: Annotated[Positive | None, Mark.NOT_IN_MEMORY] = None
    """LoRA+: the learning rate of B over that of A; null: one for both."""


class Lora(Method):
    """y = x·W₀ᵀ + s·(x·Aᵀ)·Bᵀ, A (r, in), B (out, r), s = α/r.

    An adapter that PEFT made with `lora_bias` also adds s·b, b (out,).

    Class attributes:
        fused: whether the fused operations are taken where they can be; False is the plain path, for comparisons.
    """

    name = "lora"
    peft_type = "LORA"
    keys = LoraKeys
    peft_names: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"
    }  # fmt: skip
    peft_unread: ClassVar[Mapping[str, str]] = {".lora_embedding_": "LoRA on embeddings"}
    optional = frozenset({"lora_B_bias"})
    fused: ClassVar[bool] = True

    def scaling(self, settings: Settings) -> float:
        """s: α/r, or α/√r where it is rank-stabilised."""
        stabilised = getattr(settings.keys, "use_rslora", False)
        return settings.alpha / math.sqrt(settings.r) if stabilised else super().scaling(settings)

    def shapes(self, out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_B_bias": (out_features,)}

    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """B = 0. A is Kaiming-uniform(√5): uniform within ±1/√in; `gaussian`: normal of deviation 1/r, as in PEFT."""
        import torch

        lora_A = torch.empty(settings.r, in_features)
        if getattr(settings.keys, "init_lora_weights", "default") == "gaussian":
            torch.nn.init.normal_(lora_A, std=1 / settings.r, generator=generator)
        else:
            torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        return {"lora_A": lora_A, "lora_B": torch.zeros(out_features, settings.r)}

    def branch(self, adapter: Adapter, x: Tensor) -> Tensor:
        """s·(x·Aᵀ)·Bᵀ."""
        from torch.nn.functional import linear

        tensors = adapter.tensors
        bias = tensors.get("lora_B_bias")
        z = linear(x, tensors["lora_A"].to(x.dtype))  # (…, r)
        y = linear(z, tensors["lora_B"].to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y * self.scaling(adapter.settings)

    def forward(self, adapter: Adapter, x: Tensor, linear: FrozenLinear) -> Tensor:
        if (weights := self.fused_weights(adapter, linear)) is None:
            return super().forward(adapter, x, linear)
        if adapter.shared is not None:
            return adapter.shared.output(x, linear)
        from qlora_tool.ops.lora import lora_linear

        return lora_linear(x, [weights])[0]

    def fused_weights(self, adapter: Adapter, linear: FrozenLinear) -> LoraWeights | None:
        tensors = adapter.tensors
        if not self.fused or adapter.drops or "lora_B_bias" in tensors or linear.weight.is_trained:
            return None
        from qlora_tool.ops.lora import LoraWeights

        return LoraWeights(
            linear.weight, tensors["lora_A"], tensors["lora_B"], self.scaling(adapter.settings), linear.bias
        )

    def rates(self, settings: Settings) -> dict[str, float]:
        """LoRA+ gives B a learning rate of its own (equation 8 of the paper: λ times A's)."""
        ratio = getattr(settings.keys, "loraplus_lr_ratio", None)
        return {} if ratio is None else {"lora_B": ratio, "lora_B_bias": ratio}

    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        return tensors["lora_B"].float() @ tensors["lora_A"].float() * self.scaling(settings)

    def merge(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        # In one pass, without a Δ of the weight's size beside it.
        return weight.addmm_(tensors["lora_B"].float() * self.scaling(settings), tensors["lora_A"].float())

    def factors(
        self, tensors: Mapping[str, Tensor], settings: Settings, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """s·B and A."""
        return tensors["lora_B"].double() * self.scaling(settings), tensors["lora_A"].double()

    def bias_delta(self, tensors: Mapping[str, Tensor], settings: Settings) -> Tensor | None:
        bias = tensors.get("lora_B_bias")
        return None if bias is None else bias.float() * self.scaling(settings)

    def to_peft(self, settings: Settings, saved: SavedWith) -> dict[str, Any]:
        keys = settings.keys
        return {
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "use_rslora": getattr(keys, "use_rslora", False),
            "use_dora": False,
            "init_lora_weights": "gaussian" if getattr(keys, "init_lora_weights", "") == "gaussian" else True,
            "bias": saved.bias,
            "lora_bias": "lora_B_bias" in saved.tensors,
            "fan_in_fan_out": saved.transposed,
        }

    def from_peft(self, file: Path, config: Mapping[str, Any]) -> Settings | None:
        if config.get("peft_type") != self.peft_type or bool(config.get("use_dora")) != (self.name == "dora"):
            return None
        refuse_keys(file, config, _NOT_READ)
        if (start := config.get("init_lora_weights", True)) not in _STARTS_READ:
            raise UserError(
                f"{file}: init_lora_weights {start!r} changed the base too, which cannot be repeated here; save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion, which makes a plain one of it"
            )
        for key in ("r", "lora_alpha"):
            if key not in config:
                raise UserError(f"{file}: no key {key!r}; the PEFT configuration is incomplete: save the adapter again")
        keys = self.keys(use_rslora=bool(config.get("use_rslora")))
        return Settings(config["r"], config["lora_alpha"], config.get("lora_dropout") or 0.0, keys)

    def portable(self, name: str, tensor: Tensor, settings: Settings, r: int) -> Tensor:
        """One tensor of an adapter as it is at scale 1 and rank `r`, which is not lower than its own: the scale is in
        B, zeros fill up. It stays in its dtype where that holds the scaled values exactly (a scale that is a power of
        two), else it is fp32."""
        if name in ("lora_B", "lora_B_bias"):
            exact = tensor.double() * self.scaling(settings)
            rounded = exact.to(tensor.dtype)
            tensor = rounded if bool((rounded.double() == exact).all()) else exact.float()
        dim = {"lora_A": 0, "lora_B": 1}.get(name)
        if dim is None or tensor.shape[dim] == r:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = r
        filled = tensor.new_zeros(shape)
        filled.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        return filled

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
        lora_A, lora_B = tensors["lora_A"], tensors["lora_B"]
        return lora_B.shape[0], lora_A.shape[-1], lora_A.shape[0]


METHOD = Lora()
