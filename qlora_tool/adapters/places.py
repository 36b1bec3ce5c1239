"""Where an adapter can sit: linear modules, embeddings, the three-dimensional weights of experts, attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from qlora_tool.adapters.adapter import Adapter, AttentionAdapter, EmbeddingAdapter, ExpertsAdapter, PartsAdapter
from qlora_tool.adapters.attention import find_attention, is_attention, prompted, query_weight
from qlora_tool.adapters.targets import find_parts, find_target_parameters, find_targets
from qlora_tool.methods import METHODS
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import Adaptable, ExpertsWeight, FrozenEmbedding, FrozenLinear

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig


@dataclass(frozen=True)
class Place:
    """One weight that takes an adapter.

    Attributes:
        module: a linear module, embeddings, the module of the experts, or attention.
        parameter: the name of the experts' weight; None elsewhere.
        parts: the rows of the parts of a fused projection that are adapted; empty for all of it.
    """

    module: nn.Module
    parameter: str | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weight(self) -> WeightHandle:
        """Its handle: (out, in), (vocabulary, dim), or (experts, out, in); of attention that of its queries."""
        if self.adapter_class is AttentionAdapter:
            return query_weight(self.module)
        weight = getattr(self.module, self.parameter or "weight")
        return weight if isinstance(weight, WeightHandle) else WeightHandle(weight)

    @property
    def adapter_class(self) -> type[Adapter]:
        """What is put there."""
        if self.parameter:
            return ExpertsAdapter
        if self.parts:
            return PartsAdapter
        if isinstance(self.module, nn.Embedding):
            return EmbeddingAdapter
        return AttentionAdapter if is_attention(self.module) else Adapter


def find_places(model: nn.Module, config: AdapterConfig) -> dict[str, Place]:
    """The weights that a configuration wants adapted, by the name of their module, or of their parameter where they are
    of experts.

    Raises:
        UserError: see `find_targets` and `find_target_parameters`.
    """
    if METHODS[config.method].on_attention:
        return {name: Place(module) for name, module in find_attention(model, config).items()}
    parts = find_parts(model, config)
    places = {name: Place(module, parts=parts.get(name, {})) for name, module in find_targets(model, config).items()}
    parameters = find_target_parameters(model, config)
    return places | {name: Place(module, name.rpartition(".")[2]) for name, module in parameters.items()}


def place_of(model: nn.Module, name: str) -> Place:
    """The place with a name that `find_places` gives.

    Raises:
        KeyError: nothing there takes an adapter.
    """
    owner, _, parameter = name.rpartition(".")
    try:
        module = model.get_submodule(name)
        if isinstance(module, WeightHandle):
            return Place(model.get_submodule(owner), parameter)
    except AttributeError as error:
        raise KeyError(name) from error
    known = isinstance(module, FrozenLinear | FrozenEmbedding) or is_attention(module)
    if known or FrozenEmbedding.can_take_over(module):
        return Place(module)
    raise KeyError(name)


def adaptable(model: nn.Module, name: str) -> Adaptable:
    """What an adapter is added to at a place; embeddings and experts are made ready for it."""
    place = place_of(model, name)
    module = place.module
    if place.adapter_class is AttentionAdapter:
        return prompted(module)
    if place.parameter:
        if "adapted" not in module._modules:
            module.add_module("adapted", nn.ModuleDict())
        adapted = cast(nn.ModuleDict, module.adapted)
        if place.parameter not in adapted:
            adapted[place.parameter] = ExpertsWeight(place.weight)
        return cast(Adaptable, adapted[place.parameter])
    if isinstance(module, nn.Embedding) and not isinstance(module, FrozenEmbedding):
        weight = module.weight
        linear = next(one for one in model.modules() if isinstance(one, FrozenLinear))
        FrozenEmbedding.take_over(module, linear.weight.dtype, weight.device)
        module.weight = WeightHandle(weight)  # type: ignore[assignment]
    assert isinstance(module, Adaptable)
    return module
