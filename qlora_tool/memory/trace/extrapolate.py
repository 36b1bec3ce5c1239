"""The memory of a deep model from the traces of two shallow ones: fast enough to search with.

Layers repeat, so a peak grows by the same bytes with each of them. Which moment is the highest may change with the
depth, though, and the plain peak is then no line. So the peak of every kind of moment (phase, operator, module, and how
far the layer is from the first or the last) is extrapolated on its own, and the largest is taken.

The length is not extrapolated as long as it need not be: fake tensors cost the same at any size. What grows with it is
the number of chunks of the loss, so that batches of more than LONG_BATCH tokens are extrapolated from shorter ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from qlora_tool.adapters.targets import tells_layers_apart
from qlora_tool.collection import without_collection
from qlora_tool.config import memory_settings, with_values
from qlora_tool.memory.allocator.target import CudaTarget, device_of
from qlora_tool.memory.allocator.timeline import replay_on
from qlora_tool.memory.breakdown import PHASES
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.deepen import deepened
from qlora_tool.memory.trace.flops import flops_of_step
from qlora_tool.memory.trace.on_meta import forget_answers
from qlora_tool.memory.trace.predict import STEPS, BatchShape, predict
from qlora_tool.memory.trace.second_step import NotRepeated, repeats, with_second_step
from qlora_tool.model.checkpointing import ALL_RECOMPUTED, Recomputation
from qlora_tool.model.layer_stack import LayerStack, layer_stack, with_layers
from qlora_tool.model.slots import Quantization
from qlora_tool.ops.declare import CPU

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.trace.timeline import Timeline
    from qlora_tool.memory.trace.tracer import Trace
    from qlora_tool.ops.declare import Target

LONG_BATCH = 16384  # tokens
WORTH_A_LOOK = 3  # times the layers of the shallowest model: both of its steps are less than one of this one
WORTH_IT = 0.6  # of a model's layers: as many may the three shallow models have that its trace is put together from


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        peak_bytes: the most that is allocated at once.
        phase_peak_bytes: the same within each of PHASES.
        weights_bytes: what is allocated before the first step: base, scales, adapters, optimizer masters, one batch.
        traced_layers: depths of the models that were traced; the model's own alone where nothing was extrapolated.
        layer_bytes: of each layer that is streamed (`model.weights`), in the order of a forward pass.
        flops: floating point operations of a forward and a backward pass, products and attention forward.
    """

    peak_bytes: int
    phase_peak_bytes: dict[str, int]
    weights_bytes: int
    traced_layers: tuple[int, ...]
    layer_bytes: tuple[int, ...] = ()
    flops: int = 0


class Moment(NamedTuple):
    """A kind of moment: allocations that are alike in models of any depth.

    Attributes:
        phase: one of PHASES, or `weights` for the end of loading.
        span: which of the phases in order it is; forward of the second step is another than that of the first.
        operator, module: what allocates, and in whose forward pass; a layer's modules without its number.
        layer: 0, 1, … from the first, -1, -2, … from the last; 0 outside of layers.
    """

    phase: str
    span: int = 0
    operator: str = ""
    module: str = ""
    layer: int = 0


WEIGHTS = Moment("weights")


def estimate_peak(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype, target: CudaTarget | None, *,
    replayed: bool = True,
) -> Estimate:  # fmt: skip
    """The peak that a full trace (`predict`) would show, from the traces of two shallow models.

    Traces are cached, so that to ask again costs nothing.

    Args:
        config: the run's configuration.
        model_config: the model's transformers configuration.
        shape: of the batch.
        compute_dtype: what products run in.
        target: the card it is for: what its caching allocator has then allocated (not reserved). None: a CPU.
        replayed: False counts, for a card too, what tensors ask for and not what its allocator gives.

    Raises:
        UserError: no causal language model can be made of `model_config`, it cannot be traced, or it has no layers to
            recompute.
    """
    if config.model.resident_layers:
        return _with_resident_layers(config, model_config, shape, compute_dtype, target, replayed)
    stack = _layer_stack(_text_of(model_config), *_layer_kinds(config))
    make = partial(_Case.of, config, model_config, compute_dtype, device_of(target), stack)
    card = target if replayed else None
    if shape.rows * shape.length <= LONG_BATCH:
        found = _by_phase(_peaks_at_depth(make, shape, card))
        streamed, flops = _work_at_depth(make, shape)
    else:
        alike = make(shape, stack.traced[0]).alike
        shares = (3, 4) if shape.rows >= _straight.get(alike, math.inf) else (2, 3, 4)
        shorter = [max(64, LONG_BATCH * share // 4 // shape.rows // 64 * 64) for share in shares]
        shapes = [resized(shape, shape.rows, length) for length in shorter]
        points = [(shape.length, _peaks_at_depth(make, shape, None)) for shape in shapes]
        if len(points) == 3 and not _bends(points):
            _straight[alike] = shape.rows
        found = _by_phase(_lengthen(points, shape.length))
        if card is not None:  # its allocator rounds, which no line follows; most of what it adds is the weights' share
            here, there = _by_phase(points[-1][1]), _by_phase(_peaks_at_depth(make, shapes[-1], card))
            found = {phase: found[phase] + there[phase] - here[phase] for phase in found}
        streamed, flops = _work_at_depth(make, shapes[-1])
        flops = flops * shape.length // shapes[-1].length
    weights = found.pop(WEIGHTS.phase)
    return Estimate(max(found.values()), found, weights, stack.traced, streamed, flops)


def _with_resident_layers(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype, target: CudaTarget | None,
    replayed: bool,
) -> Estimate:  # fmt: skip
    """The same where the first layers stay on the device: shallow models would keep all of theirs there."""
    streamed, resident = (
        estimate_peak(with_values(config, {"model.resident_layers": 0} | changes), model_config, shape, compute_dtype,
                      target, replayed=replayed)
        for changes in ({}, {"model.weights": "resident"})
    )  # fmt: skip
    layers = _layer_stack(_text_of(model_config), *_layer_kinds(config)).layers
    staying = config.model.resident_layers
    if streamed == resident or staying >= layers:
        return resident
    # Two layers are in buffers, as large as the largest: what the others take is the difference.
    sizes = streamed.layer_bytes
    others = max(1, sum(sizes) - 2 * max(sizes))
    added = (resident.weights_bytes - streamed.weights_bytes) * sum(sizes[:staying]) // others
    phases = {phase: size + added for phase, size in streamed.phase_peak_bytes.items()}
    return Estimate(max(phases.values()), phases, streamed.weights_bytes + added, streamed.traced_layers,
                    sizes[staying:], streamed.flops)  # fmt: skip


def _by_phase(peaks: Mapping[Moment, int]) -> dict[str, int]:
    phases = (*PHASES, WEIGHTS.phase)
    return {phase: max((peaks[at] for at in peaks if at.phase == phase), default=0) for phase in phases}


def resized(shape: BatchShape, rows: int, length: int) -> BatchShape:
    """A batch of another size and the same kind: padded or packed as before, the same share of its tokens trained."""
    if (rows, length) == (shape.rows, shape.length):
        return shape
    if replace(shape, start_tokens=None, processes=1) == BatchShape.full(shape.rows, shape.length):
        return replace(BatchShape.full(rows, length), start_tokens=shape.start_tokens, processes=shape.processes)
    trained = max(1, shape.trained_tokens * rows * length // (shape.rows * shape.length))
    segments = None if shape.segments is None else (length,)
    return replace(shape, rows=rows, length=length, trained_tokens=trained, segments=segments)


def _peaks_at_depth(make: partial[_Case], shape: BatchShape, card: CudaTarget | None) -> Mapping[Moment, int]:
    """The peaks of a batch at the model's own depth: each on the line through the two that were traced."""
    stack = make.args[-1]
    shallow, *deep = (_peaks(make(shape, depth), card) for depth in stack.traced)
    if not deep:
        return shallow
    return _along_line(stack.traced, (shallow, deep[0]), stack.layers)


def _work_at_depth(make: partial[_Case], shape: BatchShape) -> tuple[tuple[int, ...], int]:
    """Bytes of streamed layers and operations (see `Estimate`) at the model's own depth: layers are as large as the one
    of their kind that was traced, operations on the line through both depths."""
    stack = make.args[-1]
    found = [_work(make(shape, depth)) for depth in stack.traced]
    sizes, flops = found[-1]
    if len(found) == 1:
        return sizes, flops
    begin, end = stack.traced
    kinds = (number if number < end else stack.first + (number - stack.first) % stack.period
             for number in range(stack.layers))  # fmt: skip
    more = (flops - found[0][1]) * (stack.layers - end) // (end - begin)
    return tuple(sizes[kind] for kind in kinds) if sizes else (), flops + more


def _along_line(places: tuple[int, ...], peaks: tuple[Mapping[Moment, int], ...], where: int) -> dict[Moment, int]:
    """Each peak on the line through two places. What only one of the two has stays as it is."""
    (begin, end), (first, second) = places, peaks
    found = {**first, **second}
    for moment in first.keys() & second.keys():
        slope = (second[moment] - first[moment]) / (end - begin)
        found[moment] = round(second[moment] + slope * (where - end))
    return found


_straight: dict[_Case, int] = {}
"""Of cases that differ in sizes alone (`_Case.alike`), those whose peaks lay on lines, and in batches of how many rows:
two lengths tell as much of as many rows or more, as masks of length × length are smaller there."""


def _lengthen(points: list[tuple[int, Mapping[Moment, int]]], length: int) -> dict[Moment, int]:
    """Each peak at a greater length: on the line through the two longest lengths, or on the parabola through all three
    where they do not lie on one line (masks of length × length)."""
    (s1, p1), (s2, p2) = points[-2:]
    found = _along_line((s1, s2), (p1, p2), length)
    for moment, bend in _bends(points).items():
        found[moment] += round(bend * (length - s1) * (length - s2))  # Newton's form
    return found


def _bends(points: list[tuple[int, Mapping[Moment, int]]]) -> dict[Moment, float]:
    """Of the peaks at three lengths, if so many are known, those that do not lie on a line, and by how much."""
    if len(points) < 3:
        return {}
    (s0, p0), (s1, p1), (s2, p2) = points
    found = {}
    for moment in p0.keys() & p1.keys() & p2.keys():
        slope = (p2[moment] - p1[moment]) / (s2 - s1)
        bend = (slope - (p1[moment] - p0[moment]) / (s1 - s0)) / (s2 - s0)
        if bend * (s2 - s0) ** 2 > 1e-3 * p2[moment]:
            found[moment] = bend
    return found


# Cached traces


@dataclass(frozen=True)
class _Text:
    """A model's configuration that is equal to another with the same text."""

    text: str
    model_config: object = field(compare=False)


def _text_of(model_config) -> _Text:
    return _Text(model_config.to_json_string(use_diff=False), model_config)


@lru_cache(maxsize=64)
def _layer_stack(
    model: _Text, trust_remote_code: bool, quantization: Quantization, told_apart: bool
) -> LayerStack:
    return layer_stack(model.model_config, trust_remote_code, quantization, told_apart)


def _layer_kinds(config: Config) -> tuple[bool, Quantization, bool]:
    return config.model.trust_remote_code, Quantization.of(config.model), tells_layers_apart(config.adapter)


@dataclass(frozen=True)
class _Case:
    """All that a trace depends on; equal cases have equal traces."""

    model: _Text
    shape: BatchShape
    compute_dtype: torch.dtype
    target: Target
    stack: LayerStack
    depth: int
    recomputation: Recomputation | None
    settings: str
    config: Config = field(compare=False)

    @classmethod
    def of(
        cls, config: Config, model_config, compute_dtype: torch.dtype, target: Target, stack: LayerStack,
        shape: BatchShape, depth: int, recomputation: Recomputation | None = None,
    ) -> _Case:  # fmt: skip
        if config.training.gradient_checkpointing is True and recomputation == Recomputation.uniform(
            ALL_RECOMPUTED, depth
        ):
            recomputation = None  # that is what the configuration says
        settings = json.dumps(memory_settings(config), sort_keys=True)
        return cls(_text_of(model_config), shape, compute_dtype, target, stack, depth, recomputation, settings, config)

    @property
    def shallowest(self) -> _Case:
        """The least that is like it: the fewest layers, of which one stays on the device where some do."""
        config = with_values(self.config, {"model.resident_layers": min(1, self.config.model.resident_layers)})
        return _Case.of(config, self.model.model_config, self.compute_dtype, self.target, self.stack, self.shape,
                        self.stack.traced[0])  # fmt: skip

    @cached_property
    def alike(self) -> _Case:
        """What cases have in common that differ in their depth, in what is recomputed and in the size of the batch."""
        shape, packed = self.shape, self.shape.segments is not None
        one = BatchShape(1, 1, 1, shape.padded, (1,) if packed else None, shape.start_tokens and 1, shape.processes)
        return replace(self.shallowest, shape=one, depth=0)


@lru_cache(maxsize=1024)
def _peaks(case: _Case, card: CudaTarget | None) -> Mapping[Moment, int]:
    return peaks_of(timeline_on(_trace(case), card), case.stack, case.depth)


@lru_cache(maxsize=1024)
def _work(case: _Case) -> tuple[tuple[int, ...], int]:
    trace, batches = _trace(case), min(2, case.config.training.gradient_accumulation_steps)
    return trace.layer_bytes, flops_of_step(trace, STEPS) // batches


@lru_cache(maxsize=4)  # of an estimate's two depths and of the full prediction after it, which begins with the same
def _trace(case: _Case) -> Trace:
    config, model_config = case.config, with_layers(case.model.model_config, case.depth)
    if case.depth != case.stack.layers:
        # What an adapter to start from decides stands in the configuration; it is on layers that are not there.
        config = with_values(config, {"adapter.init_from": None})
    run = config, model_config, case.shape, case.compute_dtype, case.recomputation, case.target
    with without_collection():
        return _both_steps(case, run)


def _both_steps(case: _Case, run: tuple) -> Trace:
    if case.depth >= WORTH_A_LOOK * case.stack.traced[0] and case.alike not in _repeating:
        _trace(case.shallowest)
    if _repeating.get(case.alike):
        with suppress(NotRepeated):
            return with_second_step(predict(*run, steps=1))
    trace = predict(*run)
    if case.alike not in _repeating:
        _repeating[case.alike] = repeats(trace)
    return trace


_repeating: dict[_Case, bool] = {}
"""Of cases that differ in sizes alone (`_Case.alike`): whether their second step is the first one again, as the first
trace of one of them shows."""


def forget_traces() -> None:
    """Give back what is kept for predictions that may follow: tens of megabytes, where a process goes on to train."""
    _trace.cache_clear()
    forget_answers()


def predict_deep(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype,
    recomputation: Recomputation | None = None, target: Target = CPU,
) -> Trace:  # fmt: skip
    """`predict`: the same trace, event by event, put together from those of three shallow models where that is less to
    trace and where they tell it (`deepen`).

    Raises:
        Untraceable: see `predict`.
    """
    stack = _layer_stack(_text_of(model_config), *_layer_kinds(config))
    make = partial(_Case.of, config, model_config, compute_dtype, target, stack, shape)
    # Streamed layers come to one of two buffers in turn.
    period = math.lcm(stack.period, 2) if config.model.weights in ("host", "disk") else stack.period
    start = next(depth for depth in range(stack.traced[0], stack.layers + 1, stack.period)
                 if (stack.layers - depth) % period == 0)  # fmt: skip
    depths = [start + turn * period for turn in range(3)]
    kinds = set(recomputation.layers) if recomputation else set()
    if (
        not stack.path or sum(depths) > WORTH_IT * stack.layers or len(kinds) > 1
        or config.adapter.init_from is not None or config.model.resident_layers
    ):  # fmt: skip
        return _trace(make(stack.layers, recomputation))
    traces = []
    for depth in depths:
        uniform = recomputation and Recomputation.uniform(kinds.copy().pop(), depth, recomputation.keeps_weights)
        traces.append(_trace(make(depth, uniform)))
    return deepened(traces, stack.path, depths, stack.layers) or _trace(make(stack.layers, recomputation))


def timeline_on(trace: Trace, target: CudaTarget | None) -> Timeline:
    """What a trace looks like on the card that it was made for; on a CPU where `target` is None."""
    if target is None:
        return timeline(trace)
    return replay_on(trace, target).timeline


def peaks_of(line: Timeline, stack: LayerStack, depth: int) -> dict[Moment, int]:
    """The most bytes allocated at once at each kind of moment of a model with `depth` layers."""
    places = [stack.places(module, depth) for module in line.module_names]
    totals, modules, operators = line.totals.tolist(), line.modules.tolist(), line.operators.tolist()
    found: dict[Moment, int] = {}
    for number, span in enumerate(line.phase_spans()):
        if span.phase == "forward" and WEIGHTS not in found:
            found[WEIGHTS] = totals[span.start - 1]
        for index in range(span.start, span.stop):
            for place in places[modules[index]]:
                moment = Moment(span.phase, number, line.operator_names[operators[index]], *place)
                if totals[index] > found.get(moment, 0):
                    found[moment] = totals[index]
    return found
