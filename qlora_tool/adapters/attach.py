"""Put adapters on a model, and gather what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_tool.adapters.dora import DoraAdapter
from qlora_tool.adapters.fusion import fuse
from qlora_tool.adapters.lora import LoraAdapter
from qlora_tool.adapters.method import Adapter, generator_for
from qlora_tool.adapters.targets import find_targets, settings_for
from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenEmbedding, FrozenLinear

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig

METHODS: dict[str, type[Adapter]] = {method.method: method for method in (LoraAdapter, DoraAdapter)}


@dataclass
class AdapterSet:
    """All that is trained on one model.

    Attributes:
        layers: the adapters by the name of their linear module.
        saved: whole tensors that are trained (`modules_to_save`), by parameter name.
        biases: biases that are trained, by parameter name; under `bias: lora_only` those of adapted modules.
        transposed: those of `saved` that the model's own module keeps as (in, out) (transformers' Conv1D).
    """

    layers: dict[str, Adapter] = field(default_factory=dict)
    saved: dict[str, nn.Parameter] = field(default_factory=dict)
    biases: dict[str, nn.Parameter] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter once, in a fixed order."""
        found = [parameter for layer in self.layers.values() for parameter in layer.parameters()]
        found += [*self.saved.values(), *self.biases.values()]
        return list(dict.fromkeys(found))

    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by the name it has in PEFT's file, without the prefix, in the file's orientation."""
        found = {
            f"{name}.{suffix}": tensor
            for name, layer in self.layers.items()
            for suffix, tensor in layer.peft_tensors().items()
        }
        found |= {name: tensor.T if name in self.transposed else tensor for name, tensor in self.saved.items()}
        for name, bias in self.biases.items():
            owner = name.removesuffix(".bias")
            found[f"{owner}.base_layer.bias" if owner in self.layers else name] = bias
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy values into the trained tensors.

        Raises:
            UserError: names or shapes that do not fit, all of them in one report.
        """
        own = self.tensors()
        faults = [f"{source}: tensor {name} is missing" for name in own if name not in tensors]
        faults += [f"{source}: tensor {name} fits nothing in the adapter" for name in tensors if name not in own]
        faults += [
            f"{source}: tensor {name} has shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ]
        if faults:
            more = [f"{source}: and {len(faults) - 10} more tensors that do not fit"] if len(faults) > 10 else []
            raise UserError(faults[:10] + more)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def adapter_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """What A and B are kept in: the dtype of the products, bf16 on most devices."""
    return compute_dtype


def attach(model: nn.Module, config: AdapterConfig, compute_dtype: torch.dtype, seed: int) -> AdapterSet:
    """Put fresh adapters on the modules that the configuration names.

    Args:
        model: a transformers model read by `load_base`.
        config: the adapter's section.
        compute_dtype: what products run in.
        seed: of the adapters' starts.

    Raises:
        UserError: names that match nothing.
    """
    dtype = adapter_dtype(compute_dtype)
    layers = {}
    for name, linear in find_targets(model, config).items():
        generator = generator_for(seed, name)
        layers[name] = METHODS[config.method].start(linear, settings_for(name, config), dtype, generator)
    put_on(model, layers)
    saved = train_whole(model, config.modules_to_save, dtype)
    biases = train_biases(model, config.bias, layers, dtype)
    return AdapterSet(layers, saved, biases, transposed_names(model, saved))


def put_on(model: nn.Module, layers: Mapping[str, Adapter]) -> None:
    """Let each linear module compute with its adapter."""
    for name, layer in layers.items():
        model.get_submodule(name).add_adapter("default", layer.train(model.training))
    fuse(model)


def train_whole(model: nn.Module, names: list[str], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Make the tensors of the named modules trained, by parameter name; tied ones stay tied.

    Args:
        names: of modules, whole or their last parts; all that is inside of them is trained.

    Raises:
        UserError: a name that is no module of the model, or a module that cannot be trained whole.
    """
    trained: dict[str, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for wanted in names:
        chosen = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not chosen:
            last_parts = sorted({name.rpartition(".")[2] for name in modules if name})
            raise UserError(f"adapter.modules_to_save: no module {wanted!r}{did_you_mean(wanted, last_parts)}")
        found = [parameter for name in chosen for parameter in parameter_names(modules[name], name)]
        if not found:
            raise UserError(f"adapter.modules_to_save: {wanted!r} has no weights; leave it out")
        trained |= {name: train_parameter(model, name, dtype) for name in found if name not in trained}
    for target, source in tied_names(model).items():
        if source in trained:
            trained |= tie(model, target, trained[source])
        elif target in trained:
            trained |= tie(model, source, trained[target])
    return trained


def tie(model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, nn.Parameter]:
    """Let the parameter `name` be `parameter`, another's; {name: parameter}."""
    _set_parameter(model, name, parameter)
    return {name: parameter}


def parameter_names(module: nn.Module, prefix: str) -> list[str]:
    """The parameters of a module and of all inside it, by their names in the checkpoint.

    Raises:
        UserError: there are frozen weights among them that are no linear module's.
    """
    found = []
    for name, part in module.named_modules(prefix=prefix):
        if isinstance(part, FrozenLinear | FrozenEmbedding):
            found += [f"{name}.weight"] + ([] if getattr(part, "bias", None) is None else [f"{name}.bias"])
        elif not isinstance(part, WeightHandle):
            found += [f"{name}.{attribute}" for attribute, _ in part.named_parameters(recurse=False)]
            if any(isinstance(child, WeightHandle) for child in part.children()):
                raise UserError(f"adapter.modules_to_save: {name} holds experts, which cannot be trained whole")
    return found


def train_parameter(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Parameter:
    """Put a trained copy of one parameter, in `dtype`, in its place."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    frozen = getattr(module, attribute)
    value = frozen.dense(dtype) if isinstance(frozen, WeightHandle) else frozen.detach()
    parameter = nn.Parameter(value.to(dtype, copy=True))
    _set_parameter(model, name, parameter)
    return parameter


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, FrozenEmbedding):
        raise UserError(
            f"adapter.modules_to_save: {name} cannot be trained whole, as model.embeddings: int8 keeps it; leave one "
            "of the two out"
        )
    linear_weight = isinstance(module, FrozenLinear) and attribute == "weight"
    setattr(module, attribute, WeightHandle(parameter) if linear_weight else parameter)


def transposed_names(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of the parameters that the model's own modules keep as (in, out)."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    return frozenset(
        name for name in names
        if name.endswith(".weight") and (owner := linears.get(name.removesuffix(".weight"))) and owner.transposed
    )  # fmt: skip


def train_biases(
    model: nn.Module, which: str, layers: Mapping[str, Adapter], dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    """Make biases trained that are not yet: none, those of adapted modules (`lora_only`), or all."""
    trained = {}
    if which == "none":
        return trained
    for name, module in model.named_modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and not bias.requires_grad and (which == "all" or name in layers):
            trained[f"{name}.bias"] = train_parameter(model, f"{name}.bias", dtype)
    return trained
