"""LoKr (Yeh et al. 2023, LyCORIS, arXiv 2309.14859): an update that is the Kronecker product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from qlora_tool.methods.keys import MOST, WHOLE, MethodKeys
from qlora_tool.methods.method import Adapter, Method, SavedWith, Settings, keys_of_file, number_in, refuse_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.weights.handles import WeightHandle

# What PEFT's LoKr may have beside, and the value with which it changes nothing here.
_NOT_READ = {"rank_dropout": 0.0, "module_dropout": 0.0, "layer_replication": None}
_Start = Literal["default", "lycoris"]


def _to_start(value: Any) -> Any:
    """PEFT's true is what we call default."""
    return "default" if value is True else value


def _to_factor(value: Any) -> Any:
    if value == 0 or (isinstance(value, int) and value < -1):
        raise ValueError("expected -1 (near the square root) or a whole number above 0")
    return value


class LokrKeys(MethodKeys):
    """LoKr's own keys; PEFT's has neither dropout on the input nor biases."""

    not_read = frozenset({"lora_dropout", "bias"})

    decompose_both: bool = False
    """LoKr: the small factor is a product of rank r too, where r is below half of its size."""
    decompose_factor: Annotated[int, Field(ge=-1, le=MOST), WHOLE, BeforeValidator(_to_factor)] = -1
    """LoKr: the size of the small factor, as far as it divides the weight's; -1: near the square root."""
    init_weights: Annotated[
        _Start, BeforeValidator(_to_start, json_schema_input_type=_Start | Literal[True])
    ] = "default"
    """LoKr: what starts at 0: the small factor; lycoris: the large one."""


class Lokr(Method):
    """y = x·W₀ᵀ + x·Δᵀ, Δ = s·(C ⊗ D), C (o₁, i₁), D (o₂, i₂), out = o₁·o₂, in = i₁·i₂, s = α/r.

    D is trained whole, or as D₁D₂ of rank r where r is below half of its longer side; with `decompose_both` so is C.
    Δ is never made: with x as a matrix X (i₁, i₂) for each token, x·(C ⊗ D)ᵀ is C·X·Dᵀ (the vec identity of the
    Kronecker product), two small products.
    """

    name = "lokr"
    usual_rates = (1e-4, 2e-2)
    peft_type = "LOKR"
    keys = LokrKeys
    peft_takes_conv1d = False
    scales = frozenset({"lokr_w1", "lokr_w1_a"})
    peft_names: ClassVar[Mapping[str, str]] = {
        name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    }
    peft_unread: ClassVar[Mapping[str, str]] = {".lokr_t2": "LoKr of convolutions (lokr_t2)"}
    optional = frozenset(peft_names)  # of each factor it has the whole or both parts: see `missing`

    def shapes(
        self, out_features: int, in_features: int, r: int, keys: MethodKeys | None = None
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that it has on a weight (out, in) with these keys."""
        factor, both = getattr(keys, "decompose_factor", -1), getattr(keys, "decompose_both", False)
        pairs = zip(factors(out_features, factor), factors(in_features, factor), strict=True)
        found: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns), decomposed in zip(("lokr_w1", "lokr_w2"), pairs, (both, True), strict=True):
            if decomposed and r < max(rows, columns) / 2:
                found |= {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}
            else:
                found[name] = (rows, columns)
        return found

    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """C = 0 (its left part, where it has two), or D with `lycoris` (its right part); the others
        Kaiming-uniform(√5), as in PEFT."""
        import torch

        shapes = self.shapes(out_features, in_features, settings.r, settings.keys)
        lycoris = getattr(settings.keys, "init_weights", "default") == "lycoris"
        zeros = ("lokr_w2", "lokr_w2_b") if lycoris else ("lokr_w1", "lokr_w1_a")
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for name, tensor in tensors.items():
            if name not in zeros:
                torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        return tensors

    def branch(self, adapter: Adapter, x: Tensor) -> Tensor:
        """C·X·Dᵀ for each token, by the parts that there are, so that what is between stays small."""
        from torch.nn.functional import linear

        tensors = {name: tensor.to(x.dtype) for name, tensor in adapter.tensors.items()}
        small, large = parts(tensors, "lokr_w1"), parts(tensors, "lokr_w2")
        z = x.unflatten(-1, (small[-1].shape[1], large[-1].shape[1]))  # (…, i₁, i₂)
        if len(large) == 1 and small[0].shape[0] * large[0].shape[1] < small[-1].shape[1] * large[0].shape[0]:
            z = z.mT  # o₁·i₂ values between, against i₁·o₂: C first
            for part in reversed(small):
                z = linear(z, part)  # (…, i₂, o₁)
            y = linear(z.mT, large[0])
        else:
            z = linear(z, large[-1]).mT  # (…, r or o₂, i₁)
            for part in reversed(small):
                z = linear(z, part)  # (…, r or o₂, o₁)
            y = linear(z.mT, large[0]) if len(large) == 2 else z.mT
        return y.flatten(-2) * self.scaling(adapter.settings)

    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        import torch

        small, large = (whole(tensors, name) for name in ("lokr_w1", "lokr_w2"))
        return torch.kron(small, large).mul_(self.scaling(settings))

    def factors(
        self, tensors: Mapping[str, Tensor], settings: Settings, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """C ⊗ (D₁D₂) = (C ⊗ D₁)(I ⊗ D₂), or (I ⊗ D₁)(C ⊗ D₂) where C has fewer rows than columns."""
        import torch

        small = whole({name: tensor.double() for name, tensor in tensors.items()}, "lokr_w1").double()
        large = [part.double() for part in parts(tensors, "lokr_w2")]
        if len(large) == 1 or min(small.shape) * large[1].shape[0] > min(shape):
            return None
        one = torch.eye(min(small.shape), dtype=small.dtype)
        left, right = (one, small) if small.shape[0] < small.shape[1] else (small, one)
        return torch.kron(left, large[0]) * self.scaling(settings), torch.kron(right, large[1])

    def to_peft(self, settings: Settings, saved: SavedWith) -> dict[str, Any]:
        keys = settings.keys
        return {
            "alpha": settings.alpha,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "decompose_both": getattr(keys, "decompose_both", False),
            "decompose_factor": getattr(keys, "decompose_factor", -1),
            "init_weights": "lycoris" if getattr(keys, "init_weights", "") == "lycoris" else True,
        }

    def from_peft(self, file: Path, config: Mapping[str, Any]) -> Settings | None:
        if config.get("peft_type") != self.peft_type:
            return None
        refuse_keys(file, config, _NOT_READ)
        given = {key: config[key] for key in ("decompose_both", "decompose_factor") if config.get(key) is not None}
        keys = keys_of_file(file, self.keys, given)
        return Settings(number_in(file, config, "r", whole=True), number_in(file, config, "alpha"), keys=keys)

    def missing(self, tensors: Mapping[str, Tensor]) -> list[str]:
        return [f"{name}{part}" for name in ("lokr_w1", "lokr_w2") if name not in tensors
                for part in (("_a", "_b") if {f"{name}_a", f"{name}_b"} & tensors.keys() else ("",))
                if f"{name}{part}" not in tensors]  # fmt: skip

    def fits(self, tensors: Mapping[str, Tensor], settings: Settings) -> bool:
        """Whether the tensors are those that PEFT makes on a weight of their size with these keys."""
        out_features, in_features, r = self.sizes(tensors)
        expected = self.shapes(out_features, in_features, r or settings.r, settings.keys)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
        small, large = parts(tensors, "lokr_w1"), parts(tensors, "lokr_w2")
        r = next((pair[0].shape[-1] for pair in (large, small) if len(pair) == 2), 0)
        return small[0].shape[0] * large[0].shape[0], small[-1].shape[-1] * large[-1].shape[-1], r


def factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`: PEFT's choice of the sides of LoKr's two matrices.

    The first is `factor` where that divides `size`, else the largest divisor up to √size and `factor`; -1 is no bound.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next((number for number in range(bound, 1, -1) if size % number == 0), 1)
    return first, size // first


def parts(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """One of the two matrices: itself, or the two that it is the product of."""
    return (tensors[name],) if name in tensors else (tensors[f"{name}_a"], tensors[f"{name}_b"])


def whole(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """One of the two matrices, fp32."""
    found = [part.float() for part in parts(tensors, name)]
    return found[0] if len(found) == 1 else found[0] @ found[1]


METHOD = Lokr()
