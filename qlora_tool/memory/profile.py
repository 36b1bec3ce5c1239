"""What `profile-memory` shows: a run predicted, and measured where that is asked for, for one device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_tool.adapters.initial import started_from
from qlora_tool.adapters.resized import fitting_config
from qlora_tool.build.resolve import resolve as resolve_run
from qlora_tool.errors import UserError
from qlora_tool.files.reading import json_value
from qlora_tool.memory.allocator.target import CudaTarget, device_of, target_on
from qlora_tool.memory.allocator.timeline import replay_on
from qlora_tool.memory.breakdown import PARTS, Breakdown, MemoryReport
from qlora_tool.memory.show.legend import limit
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.extrapolate import predict_deep
from qlora_tool.memory.trace.measure import measure_categories, measure_peak
from qlora_tool.memory.trace.predict import BatchShape, Untraceable
from qlora_tool.memory.trace.small_steps import NotMeasured, estimate
from qlora_tool.memory.trace.timeline import Timeline
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.open import check_length, choose_dtype
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.model.slots import Quantization, find_embedding_slots, find_slots, is_linear
from qlora_tool.model.source import read_model_config, resolve
from qlora_tool.sizes import memory_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.cards import Card
    from qlora_tool.memory.trace.tracer import Trace
    from qlora_tool.model.checkpointing import Recomputation

logger = logging.getLogger(__name__)

# The sizes of a model, with names that configurations had for them before transformers named them in `attribute_map`.
_SIZES = {
    "hidden_size": ("n_embed", "n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "vocab_size": (),
}
FROM_SMALL_STEPS = "the whole prediction, by smaller steps"
# What several processes take beside that, by device and `training.sharding`.
_NCCL = "what NCCL keeps for the links between processes (not counted)"
_ESTIMATED_BETWEEN: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("cuda", "none"): (_NCCL,),
    ("cuda", "fsdp"): (_NCCL, "what the allocator keeps unused of the queue that gathers shares (not counted)"),
    ("cpu", "none"): (),
    ("cpu", "fsdp"): ("for how long gloo holds what was gathered (up to 17 % more was seen for a moment)",),
}
_BASE = ("base_weights", "quantization_state", "other_weights")


@dataclass(frozen=True)
class Prediction:
    """What a device will give: over time, at the peak, and what of it is an estimate, in words."""

    timeline: Timeline
    breakdown: Breakdown
    estimated: tuple[str, ...] = ()

    @classmethod
    def of(cls, trace: Trace, target: CudaTarget | None) -> Prediction:
        """What a trace, made for the same target, takes on a card, or on a CPU where `target` is None."""
        if target is None:
            line = timeline(trace)
            return cls(line, replace(line.breakdown(), elsewhere=trace.elsewhere))
        found = replay_on(trace, target)
        return cls(found.timeline, replace(found.breakdown(), elsewhere=trace.elsewhere), found.estimated)


@dataclass(frozen=True)
class Profile:
    """A profiled run.

    Attributes:
        report: the numbers of `memory.json`, as `MemoryReport` has them.
        timelines: by `predicted` and `measured`, those that there are.
        unquantized: bytes of each weight that is left unquantized, by parameter name.
        target: the card that it is predicted for; None: a CPU.
        estimated: what of the prediction is neither read from a source nor measured, in words.
        allocator_peak: what the allocator itself counted in a measured run, no tracer near it; None where not measured.
    """

    report: MemoryReport
    timelines: dict[str, Timeline]
    unquantized: Mapping[str, int]
    target: CudaTarget | None = None
    estimated: tuple[str, ...] = ()
    allocator_peak: int | None = None


def model_config_of(config: Config) -> PreTrainedConfig:
    """The model's configuration, checked against the run's; no weights are needed.

    Raises:
        UserError: see `read_model_config` and `check_length`; or its sizes are not in the file.
    """
    folder = resolve(config.model.name_or_path, config.model.revision, weights=False, by_key=True)
    model_config = read_model_config(folder, config.model.trust_remote_code)
    _check_sizes(folder / "config.json", model_config)
    check_length(model_config, config.data.max_length)
    return fitting_config(model_config, started_from(config.adapter), config.model.trust_remote_code)


def _check_sizes(file: Path, model_config: PreTrainedConfig) -> None:
    """Refuse a file without sizes, in whose place transformers puts some model's of the family.

    A configuration within another (a model of text and images) leaves out what is as the family has it, by design.
    """
    if model_config.get_text_config() is not model_config:
        return
    given = json_value(file.read_text(encoding="utf-8"))
    missing = [
        name for name, earlier in _SIZES.items()
        if hasattr(model_config, name)
        and not given.keys() & {name, model_config.attribute_map.get(name, name), *earlier}
    ]  # fmt: skip
    if missing:
        raise UserError(
            f"{file}: no {', '.join(missing)} in it, so the model's size is unknown; download the model again, or give "
            "its sizes there"
        )
    sizes = {name: getattr(model_config, name, None) for name in _SIZES}
    wrong = [f"{name}: {size}" for name, size in sizes.items() if isinstance(size, int) and size < 1]
    if wrong:
        raise UserError(f"{file}: {', '.join(wrong)}; expected at least 1; download the model again")


def compute_dtype_on(config: Config, device: str, card: Card | None = None) -> torch.dtype:
    """The dtype of products on a device that need not be here: a card's bf16 where it has it; this CPU's faster one."""
    if device == "cuda" and config.model.compute_dtype == "auto":
        if card is None and torch.cuda.is_available():
            return choose_dtype("auto", torch.device("cuda"))
        return torch.bfloat16 if card is None or card.bf16 else torch.float16
    return choose_dtype(config.model.compute_dtype, torch.device("cpu"))


def profile(
    config: Config,
    device: str,
    *,
    measure: bool = False,
    card: Card | None = None,
    recomputation: Recomputation | None = None,
    prediction: Prediction | None = None,
    processes: int = 1,
) -> Profile:
    """Predict a run on `device` (cuda or cpu), and measure it too where asked for.

    Args:
        config: with every `auto` of the training section decided, but for what `recomputation` decides.
        measure: on the device that is here.
        card: to predict for; None: the one that is here, if any.
        recomputation: what `gradient_checkpointing: auto` chose; see `memory.plan.budget`.
        prediction: of this run, where that was made to choose it.
        processes: that train together; one of them is predicted.

    Raises:
        UserError: a measurement on a device that is not here, or a model that cannot be predicted.
    """
    if measure and device == "cuda" and not torch.cuda.is_available():
        raise UserError("--measure --device cuda: PyTorch sees no CUDA device here; leave --measure out, or use cpu")
    model_config, dtype = model_config_of(config), compute_dtype_on(config, device, card)
    config = resolve_run(config, model_config, device, dtype)
    shape = BatchShape.assumed(config, model_config, processes)
    run = config, model_config, shape, dtype, recomputation
    target = target_on(device, card)
    lines, measured, allocator_peak = {}, None, None
    try:
        prediction = prediction or Prediction.of(predict_deep(*run, device_of(target)), target)
        predicted, estimated = prediction.breakdown, prediction.estimated
        lines["predicted"] = prediction.timeline
    except Untraceable as error:
        predicted, estimated = _from_small_steps(error, *run[:4], measure=measure), (FROM_SMALL_STEPS,)
    if measure and device == "cuda":
        from qlora_tool.memory.trace.measure_cuda import measure_on_cuda

        measured = measure_on_cuda(*run).breakdown
        allocator_peak = measured.peak_bytes
    elif measure:
        seen = Prediction.of(measure_categories(*run), None)
        lines["measured"], measured = seen.timeline, seen.breakdown
        allocator_peak = measure_peak(*run)
    if processes > 1:
        estimated = (*estimated, *_ESTIMATED_BETWEEN[device, config.training.sharding])
    report = MemoryReport(device, config.model_dump(mode="json"), predicted, measured,
                          FROM_SMALL_STEPS in estimated, processes)  # fmt: skip
    unquantized = unquantized_bytes(config, model_config, dtype)
    return Profile(report, lines, unquantized, target, estimated, allocator_peak)


def _from_small_steps(
    error: Untraceable, config: Config, model_config: PreTrainedConfig, shape: BatchShape, dtype: torch.dtype, *,
    measure: bool,
) -> Breakdown | None:  # fmt: skip
    """What there is in the place of a prediction, with a warning; None where there is nothing but a measurement."""
    try:
        found = estimate(config, model_config, shape, dtype)
    except NotMeasured as failure:
        if not measure:
            raise error from failure
        logger.warning("%s, and small steps cannot be measured either: %s", error.why, failure)
        return None
    advice = "" if measure else "; --measure measures this one, on random weights"
    logger.warning("%s; what is predicted is an estimate from small steps that were measured%s", error.why, advice)
    return found


def refuse_small_budget(profiled: Profile, budget: int, budget_name: str = "") -> None:
    """Refuse a device that the frozen weights alone do not fit on: no batch is small enough for it.

    Raises:
        UserError: naming both sizes.
    """
    predicted = profiled.timelines.get("predicted")
    if predicted is None:  # no more than an estimate: nothing to refuse by
        return
    loaded = predicted.phase_spans()[0].stop - 1
    held = dict(zip(PARTS, predicted.part_bytes[loaded].tolist(), strict=True))
    weights = sum(held[part] for part in _BASE)
    context = profiled.report.predicted.context_bytes or 0
    if weights + context > budget:
        beside = f" and the CUDA context {memory_size(context)}" if context else ""
        kind = profiled.report.config["model"]["quantization"]
        less = [] if kind in ("nf4", "fp4") else ["model.quantization: nf4"]
        if profiled.report.config["model"]["weights"] == "resident":
            less.append("model.weights: auto, which streams what does not fit")
        smaller = ", ".join([*less, "a smaller model"])
        source = budget_name if budget_name == "training.max_memory" else "--device-memory"
        raise UserError(
            f"{source}: {limit(budget, budget_name)}, but the base's weights ({kind}) alone take "
            f"{memory_size(weights)}{beside}; take {smaller}, or a larger device"
        )


def unquantized_bytes(config: Config, model_config: PreTrainedConfig, compute_dtype: torch.dtype) -> dict[str, int]:
    """Bytes of everything that the loader leaves unquantized; empty where nothing is to be quantized."""
    if config.model.quantization == "none":
        return {}
    skeleton = build_skeleton(copy.deepcopy(model_config), config.model.trust_remote_code, compute_dtype)
    quantization = Quantization.of(config.model)
    slots = find_slots(skeleton, quantization)
    quantized = {name for name, slot in slots.items() if slot.kind != "none"}
    embeddings = find_embedding_slots(skeleton, quantization)
    elsewhere = quantized | embeddings.keys() | tied_names(skeleton).keys()
    stored = model_config.dtype or torch.bfloat16
    kept = stored if stored.itemsize <= 2 else compute_dtype  # of a large weight, as it lies on the disk
    found = {}
    for name, parameter in skeleton.named_parameters():
        if name not in elsewhere:
            module = skeleton.get_submodule(name.rpartition(".")[0])
            large = name in slots or (
                name.endswith(".weight") and (isinstance(module, nn.Embedding) or is_linear(module))
            )
            found[name] = parameter.numel() * (kept if large else compute_dtype).itemsize
    return found | {name: buffer.nbytes for name, buffer in skeleton.named_buffers()}
