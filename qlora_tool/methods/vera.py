"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): two vectors a module, between random matrices that all share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from qlora_tool.methods.keys import WHOLE, MethodKeys, Positive
from qlora_tool.methods.method import Adapter, Method, SavedWith, Settings, keys_of_file, number_in, refuse_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.weights.handles import WeightHandle

_NOT_READ: dict[str, Any] = {"layer_replication": None, "rank_pattern": {}, "alpha_pattern": {}}


class VeraKeys(MethodKeys):
    """VeRA's own keys. It has one rank, as all modules share the matrices, and no scale."""

    not_read = frozenset({"lora_alpha", "rank_pattern", "alpha_pattern"})

    projection_prng_key: Annotated[int, Field(ge=0, le=2**63 - 1), WHOLE] = 0
    """VeRA: the seed of the shared random matrices."""
    save_projection: bool = True
    """VeRA: save the shared matrices with the adapter; false: they are made again from projection_prng_key."""
    d_initial: Positive = 0.1
    """VeRA: what every value of the vector d starts at."""


class Vera(Method):
    """y = x·W₀ᵀ + b∘((d∘(x·Aᵀ))·Bᵀ), b (out,), d (r,) trained, A (r, in) and B (out, r) frozen.

    A and B are the first columns and rows of one pair of matrices (r, widest in) and (widest out, r), drawn from a
    seed, that all adapted modules share (section 3.1 of the paper; one pair for all shapes, as in PEFT). b is
    multiplied into B before the product, so that backward keeps out × r values and not an output of the module.
    """

    name = "vera"
    usual_rates = (1e-3, 5e-2)  # vectors alone are trained
    peft_type = "VERA"
    scales = frozenset({"vera_lambda_b"})
    keys = VeraKeys
    peft_names: ClassVar[Mapping[str, str]] = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
    frozen = frozenset({"vera_A", "vera_B"})
    shared_names: ClassVar[Mapping[str, str]] = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}
    shared_saved_by = "save_projection"

    def shapes(self, out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_b": (out_features,), "vera_lambda_d": (r,)}

    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """b = 0, d = 0.1, or what `d_initial` says."""
        import torch

        d_initial = float(getattr(settings.keys, "d_initial", 0.1))
        return {"vera_lambda_b": torch.zeros(out_features), "vera_lambda_d": torch.full((settings.r,), d_initial)}

    def shared_shapes(self, shapes: Collection[tuple[int, int]], settings: Settings) -> dict[str, tuple[int, ...]]:
        return {"vera_A": (settings.r, max(shape[1] for shape in shapes)),
                "vera_B": (max(shape[0] for shape in shapes), settings.r)}  # fmt: skip

    def shared(self, shapes: Collection[tuple[int, int]], settings: Settings) -> dict[str, Tensor]:
        """Both drawn from `projection_prng_key`, A first: Kaiming-uniform, within ±√6/√columns, as PEFT draws them."""
        import torch

        generator = torch.Generator().manual_seed(getattr(settings.keys, "projection_prng_key", 0))
        tensors = {}
        for name, shape in self.shared_shapes(shapes, settings).items():
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))  # PEFT's order: the last bit counts
            tensors[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return tensors

    def branch(self, adapter: Adapter, x: Tensor) -> Tensor:
        from torch.nn.functional import linear

        b, d, A, B = (tensor.to(x.dtype) for tensor in _parts(adapter.tensors, x.shape[-1]))
        return linear(linear(x, A) * d, b.unsqueeze(1) * B)

    def scaling(self, settings: Settings) -> float:
        return 1.0

    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        b, d, A, B = (tensor.float() for tensor in _parts(tensors, weight.shape[1]))
        return (b.unsqueeze(1) * B) @ (d.unsqueeze(1) * A)

    def factors(
        self, tensors: Mapping[str, Tensor], settings: Settings, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """b∘B and d∘A."""
        b, d, A, B = (tensor.double() for tensor in _parts(tensors, shape[1]))
        return b.unsqueeze(1) * B, d.unsqueeze(1) * A

    def to_peft(self, settings: Settings, saved: SavedWith) -> dict[str, Any]:
        keys = settings.keys
        return {
            "vera_dropout": settings.dropout,
            "projection_prng_key": getattr(keys, "projection_prng_key", 0),
            "save_projection": getattr(keys, "save_projection", True),
            "d_initial": getattr(keys, "d_initial", 0.1),
            "init_weights": True,
            "bias": "vera_only" if saved.bias == "lora_only" else saved.bias,
            "fan_in_fan_out": saved.transposed,
        }

    def from_peft(self, file: Path, config: Mapping[str, Any]) -> Settings | None:
        if config.get("peft_type") != self.peft_type:
            return None
        refuse_keys(file, config, _NOT_READ)
        given = {key: config[key] for key in ("projection_prng_key", "save_projection") if config.get(key) is not None}
        keys = keys_of_file(file, self.keys, given)
        r, dropout = number_in(file, config, "r", whole=True), number_in(file, config, "vera_dropout", default=0.0)
        return Settings(r, r, dropout, keys)

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
        return tensors["vera_lambda_b"].shape[0], 0, tensors["vera_lambda_d"].shape[0]


def _parts(tensors: Mapping[str, Tensor], in_features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b (out,), d (r,), and of the shared matrices A (r, in), B (out, r)."""
    b, d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
    return b, d, tensors["vera_A"][:, :in_features], tensors["vera_B"][: b.shape[0]]


METHOD = Vera()
