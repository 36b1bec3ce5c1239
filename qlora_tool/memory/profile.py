"""What `profile-memory` shows: a run predicted, and measured where that is asked for, for one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_tool.errors import MachineError
from qlora_tool.memory.breakdown import MemoryReport
from qlora_tool.memory.classify import timeline
from qlora_tool.memory.cuda import cuda_timeline
from qlora_tool.memory.measure import measure_categories, measure_peak
from qlora_tool.memory.predict import BatchShape, predict
from qlora_tool.memory.timeline import Timeline
from qlora_tool.model.load import build_skeleton, find_slots, tied_names
from qlora_tool.model.open import check_length, choose_dtype
from qlora_tool.model.source import read_model_config, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qlora_tool.config import Config


@dataclass(frozen=True)
class Profile:
    """A profiled run.

    Attributes:
        report: the contract's numbers.
        timelines: by `predicted` and `measured`.
        unquantized: bytes of each weight that is kept whole, by parameter name.
        allocator_peak: what the allocator itself counted in a measured run, no tracer near it; None where not measured.
    """

    report: MemoryReport
    timelines: dict[str, Timeline]
    unquantized: Mapping[str, int]
    allocator_peak: int | None = None


def model_config_of(config: Config) -> PreTrainedConfig:
    """The model's configuration, checked against the run's; no weights are needed."""
    folder = resolve(config.model.name_or_path, config.model.revision, weights=False)
    model_config = read_model_config(folder, config.model.trust_remote_code)
    check_length(model_config, config.data.max_length)
    return model_config


def assumed_batch(config: Config) -> BatchShape:
    """Full rows of `max_length` tokens, every token with a label: what there is to assume without data."""
    return BatchShape.full(config.training.per_device_train_batch_size, config.data.max_length)


def compute_dtype_on(config: Config, device: str) -> torch.dtype:
    """The dtype of products on a device that need not be here: bf16 on a card, measured on this CPU."""
    if device == "cuda" and config.model.compute_dtype == "auto":
        return torch.bfloat16
    return choose_dtype(config.model.compute_dtype, torch.device("cpu"))


def profile(config: Config, device: str, *, measure: bool = False) -> Profile:
    """Predict a run on `device` (cuda or cpu), and measure it too where asked for.

    Args:
        config: with every `auto` of the training section decided.

    Raises:
        MachineError: a measurement on a device that is not here.
    """
    if measure and device == "cuda" and not torch.cuda.is_available():
        raise MachineError("--measure --device cuda: PyTorch sees no CUDA device here; leave --measure out, or use cpu")
    dtype, shape = compute_dtype_on(config, device), assumed_batch(config)
    trace = predict(config, model_config_of(config), shape, dtype)
    if device == "cuda":
        on_card = cuda_timeline(trace)
        lines = {"predicted": on_card.timeline}
        predicted = on_card.timeline.breakdown(
            reserved_bytes=on_card.reserved_peak, context_bytes=on_card.context_bytes
        )
    else:
        lines = {"predicted": timeline(trace)}
        predicted = lines["predicted"].breakdown()
    measured, allocator_peak = None, None
    if measure and device == "cuda":
        from qlora_tool.memory.measure_cuda import measure_on_cuda

        measured = measure_on_cuda(config, model_config_of(config), shape, dtype)
        allocator_peak = measured.peak_bytes
    elif measure:
        lines["measured"] = timeline(measure_categories(config, model_config_of(config), shape, dtype))
        measured = lines["measured"].breakdown()
        allocator_peak = measure_peak(config, model_config_of(config), shape, dtype)
    report = MemoryReport(device, config.model_dump(mode="json"), predicted, measured)
    return Profile(report, lines, unquantized_bytes(config, dtype), allocator_peak)


def unquantized_bytes(config: Config, compute_dtype: torch.dtype) -> dict[str, int]:
    """Bytes of every weight that the loader keeps whole; empty where nothing is to be quantized."""
    if config.model.quantization == "none":
        return {}
    skeleton = build_skeleton(model_config_of(config), config.model.trust_remote_code, compute_dtype)
    slots, tied = find_slots(skeleton), tied_names(skeleton)
    size = min(compute_dtype.itemsize, 2)
    return {
        name: tensor.numel() * (size if tensor.dim() > 1 else compute_dtype.itemsize)
        for name, tensor in skeleton.state_dict().items()
        if name not in slots and name not in tied
    }
