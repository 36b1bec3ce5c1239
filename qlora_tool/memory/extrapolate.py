"""The memory of a deep model from the traces of two shallow ones: fast enough to search with.

Layers repeat, so a peak grows by the same bytes with each of them. Which moment is the highest may change with the
depth, though, and the plain peak is then no line. So the peak of every kind of moment (phase, step, operator, module,
and how far the layer is from the first or the last) is extrapolated on its own, and the largest is taken.

The length and the number of rows are not extrapolated: fake tensors cost the same at any size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_tool.memory.breakdown import PHASES
from qlora_tool.memory.predict import BatchShape, predict
from qlora_tool.model.load import build_skeleton

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.trace import Trace

_WEIGHTS = "weights"


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        peak_bytes: the most that is allocated at once.
        phase_peak_bytes: the same within each of PHASES.
        weights_bytes: what is allocated before the first step: base, scales, adapters.
        traced_layers: depths of the models that were traced; the model's own alone where nothing was extrapolated.
    """

    peak_bytes: int
    phase_peak_bytes: dict[str, int]
    weights_bytes: int
    traced_layers: tuple[int, ...]


def estimate_peak(config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype) -> Estimate:
    """The peak that a full trace (`predict`) would show, from the traces of two shallow models.

    Traces are kept, so that to ask again costs nothing.

    Args:
        config: the run's configuration.
        model_config: the model's transformers configuration.
        shape: of the batch.
        compute_dtype: what products run in.

    Raises:
        UserError: no causal language model can be made of `model_config`, or it has no layers to recompute.
    """
    stack = _layer_stack(_text_of(model_config), config.model.trust_remote_code)
    peaks = [_peaks(_Case.of(config, model_config, shape, compute_dtype, stack, count)) for count in stack.traced]
    if len(peaks) == 1:
        found = dict(peaks[0])
    else:
        found = _extend(*peaks, *stack.traced, stack.layers)
    weights = found.pop(_WEIGHTS)
    phases = dict.fromkeys(PHASES, 0)
    for moment, size in found.items():
        phases[moment.phase] = max(phases[moment.phase], size)
    return Estimate(max(phases.values()), phases, weights, stack.traced)


def _extend(
    shallow: Mapping[Hashable, int], deep: Mapping[Hashable, int], at_shallow: int, at_deep: int, layers: int
) -> dict[Hashable, int]:
    """Each peak at `layers`, on the line through two depths. What only one of the two has stays as it is."""
    found = {**shallow, **deep}
    for moment in shallow.keys() & deep.keys():
        slope = (deep[moment] - shallow[moment]) / (at_deep - at_shallow)
        found[moment] = round(deep[moment] + slope * (layers - at_deep))
    return found


# The layers of a model


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
        """Two depths whose last layer is of the kind that the model's last is; the model's own if it is no deeper."""
        repeated = max(2, self.period)
        shallow = self.first + (self.layers - self.first) % self.period + repeated
        deep = shallow + repeated
        return (shallow, deep) if self.path and deep < self.layers else (self.layers,)

    @property
    def last(self) -> int:
        """Layers that are told by their distance from the end; the others by that from the beginning."""
        return max(1, (self.traced[0] - self.first) // 2)

    def place(self, module: str, depth: int) -> tuple[str, int] | None:
        """A module's name without its layer's number, and the layer: 0, 1, … from the first, -1, -2, … from the last.

        None for layers between: what they take lies between the two ends.
        """
        match = re.match(rf"{re.escape(self.path)}\.(\d+)(.*)", module) if self.path else None
        if match is None:
            return module, 0
        number = int(match[1])
        if number >= depth - self.last:
            return match[2], number - depth
        return (match[2], number) if number < self.traced[0] - self.last else None


def layer_stack(model_config, trust_remote_code: bool = False) -> LayerStack:
    """How the layers of a model repeat: by the shapes of their weights, and by what its configuration lists for each."""
    text = model_config.get_text_config()
    layers = text.num_hidden_layers
    skeleton = build_skeleton(copy.deepcopy(model_config), trust_remote_code)
    lists = [(name, module) for name, module in skeleton.named_modules() if isinstance(module, nn.ModuleList)]
    path, found = next(((name, module) for name, module in lists if len(module) == layers), ("", []))
    listed = [value for _, value in sorted(_layer_lists(text).items())]
    kinds = [(_weights_of(layer), *(str(value[number]) for value in listed)) for number, layer in enumerate(found)]
    if not kinds:
        return LayerStack(layers, "", 0, 1)
    choices = [(first, period) for first in range(layers) for period in range(1, layers - first + 1)]
    first, period = next(
        (first, period) for first, period in sorted(choices, key=lambda choice: (sum(choice), choice))
        if all(one == other for one, other in zip(kinds[first:], kinds[first + period :], strict=False))
    )  # fmt: skip
    return LayerStack(layers, path, first, period)


def _weights_of(layer: nn.Module) -> tuple:
    return tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())


def _layer_lists(text_config) -> dict[str, list]:
    """What a configuration says of each layer (`layer_types`, `no_rope_layers`)."""
    return {
        name: value for name, value in vars(text_config).items()
        if isinstance(value, (list, tuple)) and len(value) == text_config.num_hidden_layers
    }  # fmt: skip


def with_layers(model_config, layers: int):
    """A copy of a model's configuration with its first `layers` layers alone."""
    copied = copy.deepcopy(model_config)
    text = copied.get_text_config()
    if layers != text.num_hidden_layers:
        for name, value in _layer_lists(text).items():
            setattr(text, name, value[:layers])
        text.num_hidden_layers = layers  # by whatever name the family has for it: attribute_map knows
    return copied


# Traces that are kept


@dataclass(frozen=True)
class _Text:
    """A model's configuration that is equal to another with the same text."""

    text: str
    model_config: object = field(compare=False)


def _text_of(model_config) -> _Text:
    return _Text(model_config.to_json_string(use_diff=False), model_config)


@lru_cache(maxsize=64)
def _layer_stack(model: _Text, trust_remote_code: bool) -> LayerStack:
    return layer_stack(model.model_config, trust_remote_code)


@dataclass(frozen=True)
class _Case:
    """All that a trace depends on; equal cases have equal traces."""

    model: _Text
    shape: BatchShape
    compute_dtype: torch.dtype
    stack: LayerStack
    depth: int
    settings: str
    config: Config = field(compare=False)

    @classmethod
    def of(
        cls, config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype, stack: LayerStack, depth: int
    ) -> _Case:
        training = config.training
        settings = (
            config.model.quantization, config.model.double_quant, config.adapter.model_dump_json(), training.optim,
            bool(training.gradient_checkpointing), min(2, training.gradient_accumulation_steps),
            training.max_grad_norm > 0, training.label_smoothing_factor > 0,
        )  # fmt: skip
        return cls(_text_of(model_config), shape, compute_dtype, stack, depth, repr(settings), config)


@dataclass(frozen=True)
class _Moment:
    """A kind of moment: the allocations that are alike in models of any depth."""

    phase: str
    step: int
    operator: str
    module: str
    layer: int


@lru_cache(maxsize=4096)
def _peaks(case: _Case) -> Mapping[Hashable, int]:
    model_config = with_layers(case.model.model_config, case.depth)
    trace = predict(case.config, model_config, case.shape, case.compute_dtype)
    return peaks_of(trace, case.stack, case.depth)


def peaks_of(trace: Trace, stack: LayerStack, depth: int) -> dict[Hashable, int]:
    """The most bytes allocated at once at each kind of moment, and what the weights take."""
    found: dict[Hashable, int] = {}
    starts = iter([*trace.marks, (len(trace.events) + 1, "", 0)])
    _, phase, step = next(starts)
    upcoming = next(starts)
    total = 0
    for index, (storage, sign) in enumerate(trace.events):
        while index >= upcoming[0]:
            if upcoming[1] == "forward":
                found.setdefault(_WEIGHTS, total)
            (_, phase, step), upcoming = upcoming, next(starts)
        total += sign * storage.nbytes
        place = stack.place(storage.module, depth) if sign > 0 else None
        if place is not None:
            moment = _Moment(phase, step, storage.operator, *place)
            found[moment] = max(found.get(moment, 0), total)
    return found
