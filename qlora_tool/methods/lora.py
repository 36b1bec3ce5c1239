"""LoRA (Hu et al. 2021, arXiv 2106.09685), with the rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732) and
LoRA+'s two learning rates (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from qlora_tool.errors import UserError
from qlora_tool.methods import starts
from qlora_tool.methods.keys import MOST, WHOLE, Count, Mark, MethodKeys, NotEmpty, Positive
from qlora_tool.methods.method import Adapter, Method, PeftForm, SavedWith, Settings, refuse_keys
from qlora_tool.sizes import noun_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from qlora_tool.ops.grouped import Groups
    from qlora_tool.ops.lora import LoraWeights
    from qlora_tool.weights.handles import WeightHandle
    from qlora_tool.weights.modules import FrozenLinear

# What changes a LoRA layer's forward pass, its places or the base beside A and B, and is not done here.
_NOT_READ = dict.fromkeys(
    (
        "alora_invocation_tokens", "layer_replication", "arrow_config",
        "use_qalora", "use_bdlora", "monteclora_config", "kasa_config",
    )
)  # fmt: skip
# The others take something out of the base; PiSSA's part can be told again from it.
_STARTS_READ = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa")


TokenId = Annotated[int, Field(ge=0, le=MOST), WHOLE]
_Start = starts.Named | Annotated[str, Field(pattern=rf"^{starts.NITER}[1-9]\d{{0,2}}$", title="pissa_niter_N")]


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
    """How A and B start; see docs/methods.md. pissa and loftq read the 16-bit weights, calibrated the data as well."""
    loftq_iter: Count = 1
    """Steps of loftq, as in PEFT; from 2 on the base changes too."""
    calibration_rows: Annotated[Count, Mark.NOT_IN_MEMORY] = 256
    """Training rows, of 16384 tokens together at most, by whose inputs `calibrated` weighs the quantization's error."""
    target_parameters: list[NotEmpty] = Field(default_factory=list)
    """Weights of experts that are adapted too, an A and a B an expert: names that parameters end in."""
    trainable_token_indices: list[TokenId] | dict[str, list[TokenId]] = Field(default_factory=list)
    """Tokens whose embeddings are trained, all others frozen: ids, or by the module's name {embed_tokens: [5], …}."""
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
    peft_embedding_names: ClassVar[Mapping[str, str]] = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
    on_experts = on_parts = groups_experts = True
    scales = frozenset({"lora_B", "lora_B_bias", "start_B"})
    optional = frozenset({"lora_B_bias", "start_A", "start_B"})
    frozen = kept = frozenset({"start_A", "start_B"})
    fused: ClassVar[bool] = True

    def scaling(self, settings: Settings) -> float:
        """s: α/r, or α/√r where it is rank-stabilised."""
        stabilised = getattr(settings.keys, "use_rslora", False)
        return settings.alpha / math.sqrt(settings.r) if stabilised else super().scaling(settings)

    def shapes(self, out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        lora_A, lora_B = (r, in_features), (out_features, r)
        return {"lora_A": lora_A, "lora_B": lora_B, "lora_B_bias": (out_features,), "start_A": lora_A,
                "start_B": lora_B}  # fmt: skip

    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As `starts` has it by name. Where the weight itself has a part in it this is only what has the right shapes:
        `from_weight` gives the values."""
        start = _start_of(settings)
        if starts.needs_weights(start) or start == "calibrated":
            self._refuse_rank(out_features, in_features, settings)
        tensors = starts.drawn(start, out_features, in_features, settings.r, generator)
        if starts.keeps_frozen(start, _steps_of(settings)):
            tensors |= {f"start_{name[-1]}": tensor.clone() for name, tensor in tensors.items()}
        return tensors

    def reads_weights(self, settings: Settings) -> bool:
        return starts.needs_weights(_start_of(settings))

    def from_weight(
        self, weight: Tensor, settings: Settings, dtype: torch.dtype, generator: torch.Generator,
        quantized: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        return starts.of_weight(_start_of(settings), weight, settings.r, self.scaling(settings), dtype, generator,
                                quantized, _steps_of(settings))  # fmt: skip

    def without(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        """W − s·B₀A₀, where that is what is quantized."""
        if "start_A" not in tensors or not starts.takes_out(_start_of(settings), _steps_of(settings)):
            return weight
        from qlora_tool.ops.low_rank import less_product

        return less_product(weight, tensors["start_B"], tensors["start_A"], self.scaling(settings))

    def _refuse_rank(self, out_features: int, in_features: int, settings: Settings) -> None:
        most = min(out_features, in_features)
        if settings.r > most:
            parts = noun_of(settings.r, "largest part", f"{settings.r} largest parts")
            raise UserError(
                f"adapter.init_lora_weights: {_start_of(settings)} takes the {parts} of a weight, "
                f"but one of {out_features} x {in_features} is adapted; set adapter.r: {most} or less, or give it a "
                "rank of its own in adapter.rank_pattern"
            )

    def computing(self, tensors: Mapping[str, Tensor], settings: Settings) -> tuple[Tensor, Tensor]:
        """A and B as they compute: of a symmetric start [A; A₀] (2r, in) and [B, −B₀] (out, 2r), one LoRA for both, in
        which what is equal cancels before it is rounded."""
        return _halves(tensors) if self._subtracts(tensors, settings) else (tensors["lora_A"], tensors["lora_B"])

    def _subtracts(self, tensors: Mapping[str, Tensor], settings: Settings) -> bool:
        """Whether −s·B₀A₀ is part of the product, and not of the base."""
        return "start_A" in tensors and _start_of(settings) == "symmetric"

    def start_on_embedding(
        self, dim: int, vocabulary: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A = 0, B normal, as in PEFT: rows of A that no token asks for then stay 0."""
        import torch

        return {
            "lora_A": torch.zeros(settings.r, vocabulary),
            "lora_B": torch.empty(dim, settings.r).normal_(generator=generator),
        }

    def rows(self, adapter: Adapter, index: Tensor, dtype: torch.dtype) -> Tensor:
        """s·A[:, index]ᵀ·Bᵀ, A (r, vocabulary), B (dim, r)."""
        from torch.nn.functional import embedding, linear

        z = embedding(index, adapter.tensors["lora_A"].T).to(dtype)  # (…, r)
        return linear(z, adapter.tensors["lora_B"].to(dtype)) * self.scaling(adapter.settings)

    def branch(self, adapter: Adapter, x: Tensor) -> Tensor:
        """s·(x·Aᵀ)·Bᵀ."""
        from torch.nn.functional import linear

        tensors = adapter.tensors
        bias = tensors.get("lora_B_bias")
        lora_A, lora_B = self.computing(tensors, adapter.settings)
        z = linear(x, lora_A.to(x.dtype))  # (…, r)
        y = linear(z, lora_B.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y * self.scaling(adapter.settings)

    def grouped_branch(self, adapter: Adapter, x: Tensor, groups: Groups) -> Tensor:
        from qlora_tool.ops.grouped import grouped_linear, of_whole_rows

        tensors, scaling = adapter.tensors, self.scaling(adapter.settings)
        lora_A, lora_B = of_whole_rows(*(tensor.to(x.dtype) for tensor in self.computing(tensors, adapter.settings)))
        # Scaled where it is small: (n, r).
        y = grouped_linear(grouped_linear(x, lora_A, groups) * scaling, lora_B, groups)
        bias = tensors.get("lora_B_bias")
        return y if bias is None else y + groups.of_experts(bias.to(x.dtype) * scaling)

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

        frozen = (tensors["start_A"], tensors["start_B"]) if self._subtracts(tensors, adapter.settings) else None
        return LoraWeights(
            linear.weight, tensors["lora_A"], tensors["lora_B"], self.scaling(adapter.settings), linear.bias, frozen
        )

    def rates(self, settings: Settings) -> dict[str, float]:
        """LoRA+ gives B a learning rate of its own (equation 8 of the paper: λ times A's)."""
        ratio = getattr(settings.keys, "loraplus_lr_ratio", None)
        return {} if ratio is None else {"lora_B": ratio, "lora_B_bias": ratio}

    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        lora_A, lora_B = self.computing(tensors, settings)
        return lora_B.float() @ lora_A.float() * self.scaling(settings)

    def merge(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        # In one pass, without a Δ of the weight's size beside it.
        lora_A, lora_B = self.computing(tensors, settings)
        return weight.addmm_(lora_B.float() * self.scaling(settings), lora_A.float())

    def factors(
        self, tensors: Mapping[str, Tensor], settings: Settings, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """s·B and A; with A₀ and B₀ those of s·(BA − B₀A₀), the update of the base as the checkpoint has it."""
        lora_A, lora_B = _halves(tensors) if "start_A" in tensors else (tensors["lora_A"], tensors["lora_B"])
        return lora_B.double() * self.scaling(settings), lora_A.double()

    def bias_delta(self, tensors: Mapping[str, Tensor], settings: Settings) -> Tensor | None:
        bias = tensors.get("lora_B_bias")
        return None if bias is None else bias.float() * self.scaling(settings)

    def peft_form(self, tensors: Mapping[str, Tensor], settings: Settings) -> PeftForm:
        """With A₀ and B₀ one LoRA of rank 2r on the base as the checkpoint has it: s·(BA − B₀A₀)."""
        if "start_A" not in tensors:
            return super().peft_form(tensors, settings)
        lora_A, lora_B = _halves(tensors)
        others = {name: tensor for name, tensor in tensors.items() if name == "lora_B_bias"}
        return PeftForm(self, {"lora_A": lora_A.detach(), "lora_B": lora_B.detach()} | others, self._doubled(settings))

    def peft_settings(self, settings: Settings) -> tuple[Method, Settings]:
        frozen = starts.keeps_frozen(_start_of(settings), _steps_of(settings))
        return self, self._doubled(settings) if frozen else settings

    def _doubled(self, settings: Settings) -> Settings:
        """Twice the rank at the same scale, which is written as plain α/r."""
        stabilised = getattr(settings.keys, "use_rslora", False)
        alpha = 2 * (settings.r * self.scaling(settings) if stabilised else settings.alpha)
        return Settings(2 * settings.r, alpha, settings.dropout, self.keys())

    def start_facts(self, settings: Settings) -> dict[str, Any] | None:
        start, steps = _start_of(settings), _steps_of(settings)
        if start in ("default", "gaussian"):
            return None
        return {
            "init_lora_weights": start, "loftq_iter": steps, "use_rslora": getattr(settings.keys, "use_rslora", False),
            "taken_out_of_base": starts.takes_out(start, steps),
            # The file has twice the rank, and in its second half what is not trained.
            "frozen_half": starts.keeps_frozen(start, steps),
        }  # fmt: skip

    def from_peft_form(
        self, tensors: Mapping[str, Tensor], settings: Settings, start: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Settings]:
        if not start.get("frozen_half"):
            return tensors, settings
        r = settings.r // 2
        found = {
            "lora_A": tensors["lora_A"][:r], "start_A": tensors["lora_A"][r:],
            "lora_B": tensors["lora_B"][:, :r], "start_B": -tensors["lora_B"][:, r:],
        }  # fmt: skip
        halves = {name: tensor.contiguous() for name, tensor in found.items()}
        others = {name: tensor for name, tensor in tensors.items() if name not in halves}
        return halves | others, self.trained_settings(settings, start)

    def trained_settings(self, settings: Settings, start: Mapping[str, Any]) -> Settings:
        if not start.get("frozen_half"):
            return settings
        r, alpha, stabilised = settings.r // 2, settings.alpha / 2, bool(start.get("use_rslora"))
        if stabilised:  # α/√r again; alphas are short numbers, which the way there and back leaves to 15 digits
            alpha = float(f"{alpha / math.sqrt(r):.12g}")
        keys = self.keys(use_rslora=stabilised, init_lora_weights=start["init_lora_weights"],
                         loftq_iter=start.get("loftq_iter", 1))  # fmt: skip
        return Settings(r, alpha, settings.dropout, keys)

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
        start_again = {"init_lora_weights": start} if start == "pissa" else {}
        keys = self.keys(use_rslora=bool(config.get("use_rslora")), **start_again)
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


def _start_of(settings: Settings) -> str:
    return getattr(settings.keys, "init_lora_weights", "default")


def _steps_of(settings: Settings) -> int:
    return getattr(settings.keys, "loftq_iter", 1)


def _halves(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """[A; A₀] and [B, −B₀]; of experts, of each."""
    import torch

    return (torch.cat([tensors["lora_A"], tensors["start_A"]], dim=-2),
            torch.cat([tensors["lora_B"], -tensors["start_B"]], dim=-1))  # fmt: skip


METHOD = Lora()
