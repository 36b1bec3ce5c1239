"""What a step takes where its code cannot run on fake tensors: small real steps, measured, and a line through them.

Random weights of the model's own width, its shallowest depths that have every kind of layer, and a few tokens. Bytes
grow by the same with each layer and with each token, but for what grows with the square of a length: so this is an
estimate, where `predict` is a count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qlora_tool.adapters.targets import tells_layers_apart
from qlora_tool.config import with_values
from qlora_tool.memory.allocator.available import available_bytes
from qlora_tool.memory.breakdown import ACTIVATIONS, CATEGORIES, PHASES, Breakdown
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.measure import measure_categories
from qlora_tool.memory.trace.predict import BatchShape
from qlora_tool.model.layer_stack import layer_stack, with_layers
from qlora_tool.model.load import build_skeleton
from qlora_tool.sizes import memory_size

if TYPE_CHECKING:
    from qlora_tool.config import Config

TOKENS = (64, 128)  # of the steps that are measured, where the batch has more
MOST_OF_HOST = 0.5  # of the memory that is free here, that the weights may take


class NotMeasured(Exception):
    """Not even small steps can be run here; its text says why."""


def estimate(config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype) -> Breakdown:
    """The memory of a step, from steps on small models on this machine's CPU; for a card it is what tensors ask for.

    Args:
        config: of the run; `gradient_checkpointing: auto` counts as true.
        model_config: the model's transformers configuration.
        shape: of the largest batch; an adapters' start, which may take hours, is not made.
        compute_dtype: what products run in.

    Raises:
        NotMeasured: see there.
    """
    config = with_values(config, {
        "adapter.init_from": None, "model.device": "cpu",
        "training.gradient_checkpointing": bool(config.training.gradient_checkpointing),
    })  # fmt: skip
    try:
        stack = layer_stack(model_config, config.model.trust_remote_code, told_apart=tells_layers_apart(config.adapter))
        shape = replace(shape, start_tokens=None)
        depths, whole = stack.traced, shape.rows * shape.length
        _refuse_large(with_layers(model_config, max(depths)), config)
        found = {}
        for tokens in TOKENS if whole > max(TOKENS) else (whole,):
            batch = shape if tokens == whole else _cut(shape, tokens)
            for depth in depths:
                trace = measure_categories(config, with_layers(model_config, depth), batch, compute_dtype)
                found[depth, tokens] = timeline(trace).breakdown()
    except Exception as error:  # what an unknown architecture's code raises can be anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise NotMeasured(reason) from error
    return _extrapolated(found, stack.layers, whole)


def _refuse_large(model_config, config: Config) -> None:
    """
    Raises:
        MemoryError: weights of this shallow model would take more than this machine has to spare.
    """
    skeleton = build_skeleton(copy.deepcopy(model_config), config.model.trust_remote_code)
    needed = 2 * sum(parameter.numel() for parameter in skeleton.parameters())
    free = available_bytes(torch.device("cpu"), 0)
    if needed > MOST_OF_HOST * free:
        raise MemoryError(f"the weights of a few layers take {memory_size(needed)}, and {memory_size(free)} are free")


def _cut(shape: BatchShape, tokens: int) -> BatchShape:
    """One row of `tokens`, with the batch's share of trained ones, cut as it is."""
    trained = max(1, shape.trained_tokens * tokens // (shape.rows * shape.length))
    segments = None if shape.segments is None else (tokens,)
    return replace(shape, rows=1, length=tokens, trained_tokens=min(trained, tokens - 1), segments=segments)


def _extrapolated(found: dict[tuple[int, int], Breakdown], layers: int, tokens: int) -> Breakdown:
    """A breakdown at another depth and number of tokens: every part on the plane (with a twist) through those found."""

    def at(read: Callable[[Breakdown], int]) -> int:
        by_tokens = {}
        for count in {count for _, count in found}:
            by_depth = {depth: read(one) for (depth, of), one in found.items() if of == count}
            by_tokens[count] = _on_line(by_depth, layers)
        return max(0, round(_on_line(by_tokens, tokens)))

    parts = {part: at(lambda one, part=part: one.at_peak[part]) for part in CATEGORIES if part != "activations"}
    activations = {part: at(lambda one, part=part: one.activations[part]) for part in ACTIVATIONS}
    at_peak = {part: parts.get(part, sum(activations.values())) for part in CATEGORIES}
    peak = sum(at_peak.values())
    highest = max(found.items(), key=lambda item: item[0])[1].peak_phase
    phases = {phase: min(peak, at(lambda one, phase=phase: one.phase_peak_bytes[phase])) for phase in PHASES}
    return Breakdown(peak, None, None, at_peak, activations, phases | {highest: peak})


def _on_line(values: dict[int, float], where: int) -> float:
    """On the line through two values, or the only one."""
    (begin, first), *rest = sorted(values.items())
    if not rest:
        return first
    [(end, second)] = rest
    return second + (second - first) / (end - begin) * (where - end)
