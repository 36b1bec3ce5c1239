"""What recomputing a layer or children of it costs, and what storing takes instead, seen in shallow models: one trace
for each choice there is."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora_tool.adapters.targets import tells_layers_apart
from qlora_tool.config import with_values
from qlora_tool.memory.allocator.target import CudaTarget, device_of
from qlora_tool.memory.trace.extrapolate import Estimate, estimate_peak
from qlora_tool.memory.trace.flops import flops_of
from qlora_tool.memory.trace.predict import STEPS, BatchShape, predict
from qlora_tool.model.checkpointing import (
    ALL_RECOMPUTED,
    NOTHING_RECOMPUTED,
    Recomputation,
    Recomputed,
    choices_of,
    decoder_layers,
)
from qlora_tool.model.layer_stack import layer_stack, with_layers
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import Quantization

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.trace.tracer import Trace

TURNS = ("forward", "backward")


@dataclass(frozen=True)
class Cost:
    """What it costs to recompute some or all of one layer.

    Attributes:
        recomputed: which of the layer's children, or all, or nothing.
        kept_bytes: of the layer, alive between forward and backward.
        flops: of what is computed again: products and attention's scores and sums.
    """

    recomputed: Recomputed
    kept_bytes: int
    flops: int


def upgrades(layers: Sequence[Sequence[Cost]]) -> tuple[list[Cost], list[tuple[int, Cost]]]:
    """What to keep one after the other, from the least that can be kept to all that saves anything.

    Args:
        layers: the choices for every layer.

    Returns:
        For each layer the choice that keeps the least; and (layer, its next choice), that where a byte saves the most
        first. Among equals the last layer comes first.
    """
    start, steps = [], []
    for number, choices in enumerate(layers):
        now = min(choices, key=lambda cost: (cost.kept_bytes, cost.flops))
        start.append(now)
        while better := [cost for cost in choices if cost.flops < now.flops]:
            # From one corner of the convex hull to the next: the gain of a byte falls from step to step.
            then = max(better, key=lambda cost: (_gain(now, cost), -cost.flops))
            steps.append((_gain(now, then), number, then))
            now = then
    steps.sort(key=lambda step: (-step[0], -step[1]))
    return start, [(number, cost) for _, number, cost in steps]


def _gain(now: Cost, then: Cost) -> float:
    """Operations that each byte saves which is kept in addition."""
    more = then.kept_bytes - now.kept_bytes
    return (now.flops - then.flops) / more if more > 0 else math.inf


@dataclass(frozen=True)
class Costs:
    """What there is to choose from, seen in shallow models.

    Attributes:
        layers: the choices for every layer of the model.
        least, steps: see `upgrades`.
        whole: what the model takes with everything recomputed.
        turns: by phase (forward, backward) and what is recomputed of a layer: bytes at the peak of its turn above what
            the layers before it keep and what is there anyway.
        shallow: the trace of a shallow model with everything recomputed.
    """

    layers: list[list[Cost]]
    least: list[Cost]
    steps: list[tuple[int, Cost]]
    whole: Estimate
    turns: Mapping[str, Mapping[Recomputed, int]]
    shallow: Trace

    @classmethod
    def of(
        cls, config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype,
        target: CudaTarget | None = None, *, shallow: Shallow | None = None,
        seen: Callable[[], Mapping[Recomputed, Seen]] | None = None,
    ) -> Costs:  # fmt: skip
        """
        Args:
            target: the card it is for; None: a CPU. Bytes are counted as they are asked for, whatever it allocates.
            shallow, seen: of that model; what gives `seen_choices` of it, where another process is at it.
        """
        shallow = shallow or Shallow.of(config, model_config, compute_dtype)
        checkpointed = with_values(config, {"training.gradient_checkpointing": bool(shallow.choices)})
        whole = estimate_peak(checkpointed, model_config, shape, compute_dtype, target, replayed=False)
        found = seen() if seen else seen_choices(config, shape, compute_dtype, target, shallow)
        costs = [[Cost(choice, found[choice].kept_bytes[number], found[choice].flops[number]) for choice in layer]
                 for number, layer in enumerate(shallow.choices)]  # fmt: skip
        turns = {phase: {choice: one.turns[phase] for choice, one in found.items()} for phase in TURNS}
        layers = [costs[number] for number in shallow.alike]
        return cls(layers, *upgrades(layers), whole, turns, found[ALL_RECOMPUTED].trace)

    def peak(self, chosen: Sequence[Cost]) -> int:
        """The bytes allocated at the peak, estimated."""
        phases = self.whole.phase_peak_bytes
        if not chosen:
            return self.whole.peak_bytes
        recomputed = [next(cost for cost in layer if cost.recomputed == ALL_RECOMPUTED) for layer in self.layers]
        before = sum(cost.kept_bytes for cost in recomputed[:-1])
        highest = max(phases["load"], phases["optimizer"])
        for phase in TURNS:
            # Where all layers are alike the last one's turn takes the most, so this is what is there anyway.
            there = phases[phase] - before - self.turns[phase][ALL_RECOMPUTED]
            for cost in chosen:
                highest = max(highest, there + self.turns[phase][cost.recomputed])
                there += cost.kept_bytes
        return highest


def seen_choices(
    config: Config, shape: BatchShape, compute_dtype: torch.dtype, target: CudaTarget | None, shallow: Shallow
) -> dict[Recomputed, Seen]:
    """What the shallow form of a model shows with each choice there is, from a trace of each."""
    # What an adapter to start from decides stands in the configuration; it is on layers that are not there.
    one_batch = with_values(config, {"training.gradient_accumulation_steps": 1, "adapter.init_from": None})
    steps_alone = replace(shape, start_tokens=None)
    seen: dict[Recomputed, Seen] = {}
    for choice in dict.fromkeys([ALL_RECOMPUTED, *(choice for layer in shallow.choices for choice in layer)]):
        policy = Recomputation(tuple(choice if choice in layer else NOTHING_RECOMPUTED for layer in shallow.choices))
        # One step tells it, but where that makes optimizer state in the midst of backward.
        steps = 1 if seen and not config.training.optimizer_in_backward else STEPS
        trace = predict(one_batch, shallow.model_config, steps_alone, compute_dtype, policy, device_of(target), steps)
        found = Seen.of(trace, shallow.names)
        seen[choice] = found if choice == ALL_RECOMPUTED else replace(found, trace=None)
    return seen


@dataclass(frozen=True)
class Seen:
    """What a shallow model showed, with the same choice for all its layers.

    Attributes:
        trace: of the choice to recompute everything; None of the others.
        kept_bytes, flops: by layer; see `Cost`.
        turns: by phase; see `Costs.turns`.
    """

    trace: Trace | None
    kept_bytes: list[int]
    flops: list[int]
    turns: dict[str, int]

    @classmethod
    def of(cls, trace: Trace, layers: Sequence[str]) -> Seen:
        """
        Args:
            layers: names, in order.
        """
        last = max(step for _, _, step in trace.marks)

        def begin(phase: str) -> int:
            return next(event for event, name, step in trace.marks if (name, step) == (phase, last))

        def layer_of(module: str) -> int | None:
            return next((n for n, name in enumerate(layers) if f"{module}.".startswith(f"{name}.")), None)

        forward, backward, end = begin("forward"), begin("backward"), begin("optimizer")
        kept, flops = Counter(), Counter()
        for storage in trace.storages:
            if forward <= storage.birth < backward and (storage.death is None or storage.death >= backward):
                kept[layer_of(storage.module)] += storage.nbytes
        for call in trace.calls:
            if call.recomputed and forward <= call.event:
                flops[layer_of(call.module)] += flops_of(call)
        totals = np.cumsum([sign * storage.nbytes for storage, sign in trace.events])
        numbers = range(len(layers))
        anyway = int(totals[forward - 1]) + sum(kept[n] for n in numbers[:-1])
        peaks = totals[forward:backward].max(), totals[backward:end].max()
        turns = {phase: int(peak) - anyway for phase, peak in zip(TURNS, peaks, strict=True)}
        return cls(trace, [kept[n] for n in numbers], [flops[n] for n in numbers], turns)


@dataclass(frozen=True)
class Shallow:
    """The first layers of a model, enough of them to have one of each kind that repeats.

    Attributes:
        model_config: its configuration.
        names: of its layers.
        choices: for each of them.
        alike: for every layer of the whole model the number of the one that is like it.
    """

    model_config: Any
    names: list[str]
    choices: list[list[Recomputed]]
    alike: list[int]

    @classmethod
    def of(cls, config: Config, model_config, compute_dtype: torch.dtype) -> Shallow:
        """
        Args:
            model_config: of the whole model.
        """
        stack = layer_stack(model_config, config.model.trust_remote_code, Quantization.of(config.model),
                            tells_layers_apart(config.adapter))  # fmt: skip
        for depth in (min(stack.layers, stack.first + 2 * stack.period), stack.layers):
            shallow = with_layers(model_config, depth)
            skeleton = build_skeleton(copy.deepcopy(shallow), config.model.trust_remote_code, compute_dtype)
            layers = decoder_layers(skeleton)
            if stack.path and depth == len(layers):
                second = stack.first + stack.period  # the first is unlike others: nothing below it wants a gradient
                alike = [n if n < second else second + (n - second) % stack.period for n in range(stack.layers)]
                break
            alike = list(range(len(layers)))
        return cls(shallow, list(layers), [choices_of(layer) for layer in layers.values()], alike)
