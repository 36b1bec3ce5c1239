"""Starts that are made of the unquantized weights, and bases that are quantized without what an adapter took over."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_tool.adapters.adapter import generator_for
from qlora_tool.adapters.targets import find_targets, own_keys, settings_for
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Method, Settings
from qlora_tool.model.load import frozen_skeleton
from qlora_tool.model.slots import Quantization, Slot, find_embedding_slots, find_slots
from qlora_tool.weights.quantized import quantize

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig

Tensors = dict[str, Tensor]


@dataclass
class WeightStart:
    """The step before quantizing of a run whose adapters start from the weights: makes their tensors as weights pass.

    Attributes:
        method: of the adapters.
        settings: of each module that takes one.
        slots: of the weights that may be quantized, by parameter name.
        quantization: of the base.
        dtype: of the adapters.
        seed: of their starts.
        tensors: what was made, by module.
    """

    method: Method
    settings: Mapping[str, Settings]
    slots: Mapping[str, Slot]
    quantization: Quantization
    dtype: torch.dtype
    seed: int
    tensors: dict[str, Tensors] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: AdapterConfig, model_config: Any, quantization: Quantization, dtype: torch.dtype, seed: int,
        trust_remote_code: bool = False,
    ) -> WeightStart | None:  # fmt: skip
        """The step that a configuration asks for; None where its adapters start without weights."""
        method = METHODS[config.method]
        if not reads_weights(config):
            return None
        plain, frozen = frozen_skeleton(model_config, trust_remote_code)
        slots = find_slots(plain, quantization) | find_embedding_slots(plain, quantization)
        settings = {name: settings_for(name, config) for name in find_targets(frozen, config)}
        return cls(method, settings, slots, quantization, dtype, seed)

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """See `slots.Prepare`."""
        module = name.removesuffix(".weight")
        if module not in self.settings:
            return weight
        settings, kind = self.settings[module], self.slots[name].kind or self.quantization.kind
        self.tensors[module] = tensors = self.method.from_weight(
            weight, settings, self.dtype, generator_for(self.seed, module), self._quantized(kind)
        )
        return self.method.without(tensors, settings, weight)

    def _quantized(self, kind: str) -> Callable[[Tensor], Tensor]:
        if kind == "none":
            return lambda weight: weight.float()
        return lambda weight: quantize(weight, kind, self.quantization.double_quant).dequantize(torch.float32)

    @property
    def identity(self) -> str:
        """What the tensors and the changed weights depend on, beside the weights and how they are quantized."""
        settings = {name: [each.r, self.method.scaling(each), each.keys.model_dump()]
                    for name, each in self.settings.items()}  # fmt: skip
        return json.dumps([self.method.name, settings, str(self.dtype), self.seed], sort_keys=True)

    def made(self) -> dict[str, Tensor]:
        """`tensors` by one name each, for a file."""
        return {f"{module}.{name}": tensor for module, own in self.tensors.items() for name, tensor in own.items()}

    def take(self, made: Mapping[str, Tensor]) -> None:
        """Take over what `made` gave once."""
        for name, tensor in made.items():
            module, _, own = name.rpartition(".")
            self.tensors.setdefault(module, {})[own] = tensor

    def not_reached(self) -> list[str]:
        """The modules whose weights are not among those that may be quantized: they start as `default` does."""
        return [name for name in self.settings if name not in self.tensors]


@dataclass(frozen=True)
class TakenOut:
    """The same step made again, from what the adapters kept."""

    method: Method
    kept: Mapping[str, tuple[Mapping[str, Tensor], Settings]]

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """See `slots.Prepare`."""
        found = self.kept.get(name.removesuffix(".weight"))
        return weight if found is None else self.method.without(*found, weight)


@dataclass
class Repeated:
    """The step of an adapter that PEFT made: its start is repeated, as PEFT does whenever it loads one."""

    method: Method
    settings: Mapping[str, Settings]
    reached: set[str] = field(default_factory=set)  # names of weights

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """See `slots.Prepare`."""
        self.reached.add(name)
        settings = self.settings.get(name.removesuffix(".weight"))
        if settings is None:
            return weight
        tensors = self.method.from_weight(weight, settings, torch.float32, torch.Generator(), Tensor.float)
        return self.method.without(tensors, settings, weight)


def taken_out(start: WeightStart, tensors: Mapping[str, Tensor]) -> TakenOut:
    """The step of a run that goes on from a checkpoint.

    Args:
        start: as it would be made anew.
        tensors: the checkpoint's, by their names in it.
    """
    kept = {}
    for module, settings in start.settings.items():
        own = {name: tensors[f"{module}.{name}"] for name in start.method.kept if f"{module}.{name}" in tensors}
        kept[module] = own, settings
    return TakenOut(start.method, kept)


def reads_weights(config: AdapterConfig) -> bool:
    """Whether adapters start from the unquantized weights."""
    return METHODS[config.method].reads_weights(Settings(config.r, config.lora_alpha, keys=own_keys(config)))


def start_facts(config: AdapterConfig) -> dict[str, Any] | None:
    """What the provenance of an adapter has to say of its start; None for nothing."""
    settings = Settings(config.r, config.lora_alpha, keys=own_keys(config))
    return METHODS[config.method].start_facts(settings)


README = """\
# An adapter of a base that is not the published one

It was trained by qlora-tool with `init_lora_weights: {start}`. The base was quantized (`{kind}`) after a low-rank part
of each adapted weight had been taken out of it, so no other program has this base. The files hold one LoRA of rank 2r
for the published base: what was trained, less what was taken out.

- `qlora-tool generate`, `evaluate`, `export-merged` and `adapter.init_from` make the base again, to the bit, from these
  files and `qlora_tool.json`: keep them together.
- PEFT, vLLM and others read the adapter on the published base. In 16 bits that gives what was trained up to the
  quantization's error, as with any adapter of a quantized base; on a base quantized to {kind} it gives what was trained
  with other quantization errors than those that were trained against.
- `qlora-tool export-merged` writes a model that computes exactly what was trained, for any program.
"""
ELSEWHERE = (
    "adapter.init_lora_weights: %s: the base was quantized without what the adapter took over; other programs, on a "
    "base that they quantize themselves, meet other errors than those that were trained against (README.md beside the "
    "adapter): qlora-tool export-merged gives them what was trained"
)


def readme(config: AdapterConfig, quantization: str) -> str | None:
    """What those who read the adapter elsewhere have to know of its base; None for nothing."""
    facts = start_facts(config)
    if not facts or not facts["taken_out_of_base"] or quantization == "none":
        return None
    return README.format(start=facts["init_lora_weights"], kind=quantization)
