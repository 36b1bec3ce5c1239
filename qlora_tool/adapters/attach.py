"""Put adapters on a model, and gather what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_tool.adapters.dora import DoraAdapter
from qlora_tool.adapters.lora import LoraAdapter
from qlora_tool.adapters.method import Adapter, generator_for
from qlora_tool.adapters.targets import find_targets, settings_for
from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.model.layers import FrozenLinear, FrozenWeight
from qlora_tool.model.load import tied_names

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
    """

    layers: dict[str, Adapter] = field(default_factory=dict)
    saved: dict[str, nn.Parameter] = field(default_factory=dict)
    biases: dict[str, nn.Parameter] = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter once, in a fixed order."""
        found = [parameter for layer in self.layers.values() for parameter in layer.parameters()]
        found += [*self.saved.values(), *self.biases.values()]
        return list(dict.fromkeys(found))

    def tensors(self) -> dict[str, nn.Parameter]:
        """Every trained tensor by the name it has in PEFT's file, without the prefix."""
        found = {
            f"{name}.{suffix}": tensor
            for name, layer in self.layers.items()
            for suffix, tensor in layer.peft_tensors().items()
        }
        found |= self.saved
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
    return AdapterSet(layers, train_whole(model, config.modules_to_save, dtype),
                      train_biases(model, config.bias, layers, dtype))  # fmt: skip


def put_on(model: nn.Module, layers: Mapping[str, Adapter]) -> None:
    """Let each linear module compute with its adapter."""
    for name, layer in layers.items():
        model.get_submodule(name).adapter = layer.train(model.training)


def train_whole(model: nn.Module, names: list[str], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Make the tensors of the named modules trained, by parameter name; tied ones stay tied.

    Raises:
        UserError: a name that is no module of the model.
    """
    trained: dict[str, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for wanted in names:
        chosen = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not chosen:
            last_parts = sorted({name.rpartition(".")[2] for name in modules if name})
            raise UserError(f"adapter.modules_to_save: no module {wanted!r}{did_you_mean(wanted, last_parts)}")
        for name in chosen:
            trained |= _train_module(modules[name], name, dtype)
    for target, source in tied_names(model).items():
        pair = {target, source}
        if found := pair & trained.keys():
            shared = trained[found.pop()]
            for name in pair:
                _set_parameter(model, name, shared)
                trained[name] = shared
    return trained


def _train_module(module: nn.Module, name: str, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    trained = {}
    if isinstance(module, FrozenLinear):
        parameter = nn.Parameter(module.weight.dense(dtype).clone())
        module.weight = FrozenWeight(parameter)
        trained[f"{name}.weight"] = parameter
        if module.bias is not None:
            module.bias = trained[f"{name}.bias"] = nn.Parameter(module.bias.to(dtype, copy=True))
        return trained
    for parameter_name, parameter in list(module.named_parameters(recurse=False)):
        trained[f"{name}.{parameter_name}"] = nn.Parameter(parameter.detach().to(dtype, copy=True))
        setattr(module, parameter_name, trained[f"{name}.{parameter_name}"])
    return trained


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, FrozenLinear) and attribute == "weight":
        module.weight = FrozenWeight(parameter)
    else:
        setattr(module, attribute, parameter)


def train_biases(model: nn.Module, which: str, layers: dict[str, Adapter], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Make biases trained: none, those of adapted modules (`lora_only`), or all."""
    trained = {}
    if which == "none":
        return trained
    for name, module in model.named_modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and (which == "all" or name in layers):
            module.bias = trained[f"{name}.bias"] = nn.Parameter(bias.detach().to(dtype, copy=True))
    return trained
