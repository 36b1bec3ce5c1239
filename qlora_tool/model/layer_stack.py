"""How a model's layers repeat, told by the shapes of their weights and by what its configuration lists of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import Quantization, Slot, find_slots
from qlora_tool.model.text_part import text_modules


@dataclass(frozen=True)
class LayerStack:
    """How a model's layers repeat, and which depths are traced in its place.

    Attributes:
        layers: of the model.
        path: of the list of layers in the model, e.g. `model.layers`; empty where none was found.
        first: layers that come once, before the repetition begins (dense ones before experts).
        period: layers in one repetition: 6 where five with sliding attention precede one with full attention.
    """

    layers: int
    path: str
    first: int
    period: int

    @property
    def traced(self) -> tuple[int, ...]:
        """Two depths whose last layer is of the kind that the model's last is, and that have each kind near either end;
        the model's own if it is no deeper.

        The layers near the first have each kind once more after the first layer of all: that one is unlike others, as
        nothing below it wants a gradient, and in the backward of those next to it nearly all gradients are there.
        """
        rest = (self.layers - self.first) % self.period
        shallow = self.first + rest + self.period * (2 if rest == 0 else 1)
        while shallow < max(self.first, 1) + self.period + 1:
            shallow += self.period
        deep = shallow + max(2, self.period)
        return (shallow, deep) if self.path and deep < self.layers else (self.layers,)

    def places(self, module: str, depth: int) -> list[tuple[str, int]]:
        """A module's name without its layer's number, and the layer: 0, 1, … from the first, -1, -2, … from the last.

        The last layer is not counted from the first, nor the other way round, as it may be unlike those in between. A
        layer far from both ends has no place: what it takes lies between theirs. Where nothing is extrapolated, each
        layer is a module like any other.
        """
        match = re.match(rf"{re.escape(self.path)}\.(\d+)(.*)", module) if self.path else None
        if match is None or len(self.traced) == 1:
            return [(module, 0)]
        number, near = int(match[1]), self.traced[0] - 1
        places = []
        if number < near:
            places.append((match[2], number))
        if depth - number <= near and number >= max(1, self.first):
            places.append((match[2], number - depth))
        return places


def layer_stack(
    model_config, trust_remote_code: bool = False, quantization: Quantization | None = None, told_apart: bool = False
) -> LayerStack:
    """How the layers of a model repeat: by the shapes of their weights, by which of these are quantized, and by what
    its configuration lists of each.

    Args:
        quantization: how the base is quantized: weights that stay unquantized in some layers make these of another
            kind. By default the checkpoint's own exceptions alone.
        told_apart: whether an adapter may be another in each layer, so that nothing repeats.
    """
    text = model_config.get_text_config()
    layers = text.num_hidden_layers
    skeleton = build_skeleton(copy.deepcopy(model_config), trust_remote_code)
    lists = [(name, module) for name, module in text_modules(skeleton).items() if isinstance(module, nn.ModuleList)]
    path, found = next(((name, module) for name, module in lists if len(module) == layers), ("", []))
    listed = [value for _, value in sorted(_layer_lists(text).items())]
    slots = find_slots(skeleton, quantization)
    seen: dict[tuple, int] = {}  # kinds, numbered: they are compared often
    kinds = [
        seen.setdefault((_weights_of(layer, f"{path}.{number}.", slots), *(str(value[number]) for value in listed)),
                        len(seen))
        for number, layer in enumerate(found)
    ]  # fmt: skip
    if not kinds or told_apart or not _takes_depth(model_config, layers):
        return LayerStack(layers, "", 0, 1)
    choices = [(first, period) for first in range(layers) for period in range(1, layers - first + 1)]
    first, period = next(
        (first, period) for first, period in sorted(choices, key=lambda choice: (sum(choice), choice))
        if all(one == other for one, other in zip(kinds[first:], kinds[first + period :], strict=False))
    )  # fmt: skip
    return LayerStack(layers, path, first, period)


def _weights_of(layer: nn.Module, prefix: str, slots: Mapping[str, Slot]) -> tuple:
    return tuple(
        (name, tuple(weight.shape), (slot := slots.get(f"{prefix}{name}")) and slot.kind)
        for name, weight in layer.named_parameters()
    )


def _layer_lists(text_config) -> dict[str, list]:
    """What a configuration says of each layer (`layer_types`, `no_rope_layers`)."""
    return {
        name: value for name, value in vars(text_config).items()
        if isinstance(value, (list, tuple)) and len(value) == text_config.num_hidden_layers
    }  # fmt: skip


def _takes_depth(model_config, layers: int) -> bool:
    """Whether another depth can be set (prophetnet's encoder and decoder have one each, and it cannot)."""
    try:
        with_layers(model_config, layers + 1)
    except NotImplementedError:
        return False
    return True


def with_layers(model_config, layers: int):
    """A copy of a model's configuration with its first `layers` layers alone."""
    copied = copy.deepcopy(model_config)
    text = copied.get_text_config()
    if layers != text.num_hidden_layers:
        for name, value in _layer_lists(text).items():
            setattr(text, name, value[:layers])
        text.num_hidden_layers = layers  # by whatever name the family has for it: attribute_map knows
    return copied
