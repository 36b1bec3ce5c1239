"""What to do about a run that takes more than it may: a change that makes it fit, looked for in a few seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_tool.config import with_values
from qlora_tool.memory.allocator.target import device_of
from qlora_tool.memory.plan.again import typed_command
from qlora_tool.memory.plan.changes import LESS_START, START
from qlora_tool.memory.plan.result import set_line
from qlora_tool.memory.plan.search import change_that_fits, needed_with
from qlora_tool.sizes import memory_size

if TYPE_CHECKING:
    import torch

    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.target import CudaTarget
    from qlora_tool.memory.breakdown import Breakdown
    from qlora_tool.memory.trace.predict import BatchShape

SECONDS_FOR_A_CHANGE = 5.0


@dataclass(frozen=True)
class Cure:
    """What to do about a run that does not fit.

    Attributes:
        words: that, in words.
        line: of them the options to copy, `--set KEY=VALUE`; empty where none was found.
    """

    words: str
    line: str = ""

    def __str__(self) -> str:
        return self.words


def cure(
    config: Config,
    model_config,
    compute_dtype: torch.dtype,
    target: CudaTarget | None,
    shape: BatchShape,
    predicted: Breakdown,
    limit_bytes: int,
    given: int | None = None,
) -> Cure:
    """The options that make a run fit, to copy, or else the command that looks for longer.

    Args:
        config: the run's.
        shape: of its largest batch.
        predicted: what it takes, by a full trace.
        limit_bytes: what it may take.
        given: bytes of the device; None where the configuration says what it may take.
    """
    drawn: dict[str, Any] = {}  # of the start, where it takes too much by itself
    run, why, needed = (model_config, compute_dtype, target), "", predicted.needed_bytes
    if (steps := needed_in_a_step(shape, predicted)) is not None:
        start = getattr(config.adapter, "init_lora_weights", "default")
        why = (f"; making the adapters' start ({START}: {start}) takes {memory_size(needed)}, the steps "
               f"{memory_size(steps)}")  # fmt: skip
        less = {START: LESS_START.get(start, "default")}
        if start in LESS_START and (then := needed_with(less, config, *run, shape, predicted)) <= limit_bytes:
            return _that_fits(set_line(less), then, why)
        drawn, needed = {START: "default"}, steps
        if steps <= limit_bytes:
            return _that_fits(set_line(drawn), steps, why)
        config, shape = with_values(config, drawn), replace(shape, start_tokens=None)
    looks = _longer_look(target, shape, given)
    try:
        change = change_that_fits(config, model_config, limit_bytes, compute_dtype, target, shape, predicted,
                                  needed=needed, margin=0.0, seconds=SECONDS_FOR_A_CHANGE)  # fmt: skip
    except TimeoutError:
        return Cure(f"{looks} shows what fits{why}")
    if change is None:
        return Cure(f"nothing that was tried makes it fit; {looks} shows what each takes. Take a smaller model{why}")
    return _that_fits(set_line({**drawn, **change.settings}), change.peak_bytes, why)


def _longer_look(target: CudaTarget | None, shape: BatchShape, given: int | None) -> str:
    """What looks for longer: the command, with what was typed, or else in words."""
    command = typed_command(device_of(target).type, shape.processes)
    if command:
        return f"`{command} --plan`"
    return f"profile-memory with --plan{'' if given is None else f' for {memory_size(given)}'}"


def _that_fits(line: str, needed: int, why: str) -> Cure:
    return Cure(f"{line} makes it fit, in {memory_size(needed)} (estimated){why}", line)


def needed_in_a_step(shape: BatchShape, predicted: Breakdown) -> int | None:
    """What the steps need, where making the adapters' start needs more; else None."""
    if predicted.peak_phase != "load" or shape.start_tokens is None:
        return None
    beside = predicted.needed_bytes - predicted.peak_bytes  # the CUDA context, and what its allocator keeps unused
    return beside + max(size for phase, size in predicted.phase_peak_bytes.items() if phase != "load")
