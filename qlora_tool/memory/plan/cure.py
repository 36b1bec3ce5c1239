"""What to do about a run that takes more than it may: a change that makes it fit, looked for in a few seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_tool.adapters.calibration import start_tokens
from qlora_tool.memory.plan.search import change_that_fits
from qlora_tool.sizes import memory_size

if TYPE_CHECKING:
    import torch

    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.target import CudaTarget
    from qlora_tool.memory.breakdown import Breakdown
    from qlora_tool.memory.trace.predict import BatchShape

SECONDS_FOR_A_CHANGE = 5.0
# What makes a start in less memory, by its name.
_LESS = {
    "pissa": "set it to pissa_niter_4 or default",
    "loftq": "set it to default",
    "calibrated": "lower adapter.calibration_rows, or set it to default",
}


def cure(
    config: Config,
    model_config,
    compute_dtype: torch.dtype,
    target: CudaTarget | None,
    shape: BatchShape,
    predicted: Breakdown,
    limit_bytes: int,
    given: int | None = None,
) -> str:
    """The options that make a run fit, to copy, or else the command that looks for longer.

    Args:
        config: the run's.
        shape: of its largest batch.
        predicted: what it takes, by a full trace.
        limit_bytes: what it may take.
        given: bytes of the device, which the command is to be told; None where the configuration says it itself.
    """
    if (line := _of_the_start(config, predicted, limit_bytes)) is not None:
        return line
    device = "cpu" if target is None else "cuda"
    several = shape.processes if target is None else 1  # of which each was given a share
    memory = "" if given is None else f" --device-memory {given * several}B"
    processes = f" --processes {shape.processes}" if shape.processes > 1 else ""
    command = f"`qlora-tool profile-memory CONFIG --plan --device {device}{memory}{processes}`"
    try:
        change = change_that_fits(config, model_config, limit_bytes, compute_dtype, target, shape, predicted,
                                  margin=0.0, seconds=SECONDS_FOR_A_CHANGE)  # fmt: skip
    except TimeoutError:
        return f"{command} shows what fits"
    if change is None:
        return f"nothing that was tried makes it fit; {command} shows what each takes. Take a smaller model"
    return f"{change.line} makes it fit, in {memory_size(change.peak_bytes)} (estimated)"


def _of_the_start(config: Config, predicted: Breakdown, limit_bytes: int) -> str | None:
    """What to do where the steps themselves fit, and only making the adapters' start does not."""
    start = getattr(config.adapter, "init_lora_weights", "default")
    less = _LESS.get(start, "set it to default")
    beside = predicted.needed_bytes - predicted.peak_bytes  # the CUDA context, and what its allocator keeps unused
    steps = beside + max(size for phase, size in predicted.phase_peak_bytes.items() if phase != "load")
    if predicted.peak_phase != "load" or start_tokens(config, ()) is None or steps > limit_bytes:
        return None
    return f"that is while adapter.init_lora_weights: {start} is made, the steps take {memory_size(steps)}; {less}"
