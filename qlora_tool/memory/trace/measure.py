"""What a training step takes on this machine: the same run with random weights, on real tensors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from qlora_tool.memory.trace.predict import BatchShape, TracerWatch, Watch, trial_run
from qlora_tool.memory.trace.tracer import Trace, Tracer
from qlora_tool.ops.products import products_choice
from qlora_tool.ops.quantization import make_tables

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.model.checkpointing import Recomputation


def measure_categories(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype,
    recomputation: Recomputation | None = None,
) -> Trace:  # fmt: skip
    """The memory of a run over time on a CPU, as the tracer sees it on real tensors."""
    _prepare()
    with Tracer() as tracer:
        trial_run(config, model_config, shape, compute_dtype, recomputation, watch=TracerWatch(tracer))
    return tracer.trace


def measure_peak(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype,
    recomputation: Recomputation | None = None,
) -> int:  # fmt: skip
    """The allocator's own count of the same run, no tracer near it: the most bytes that were allocated at once."""
    _prepare()
    gc.collect()  # what an earlier run left in cycles must not be freed in the middle of this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trial_run(config, model_config, shape, compute_dtype, recomputation, watch=Watch())
    total = peak = 0
    for _, size in sorted(allocations(profiler)):
        total += size
        peak = max(peak, total)
    return peak


def _prepare() -> None:
    """What a process makes once, and no prediction counts: tables of a few KB, and the choice of a library."""
    make_tables(torch.device("cpu"))
    products_choice()


def allocations(profiler: profile) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation and free."""
    from torch._C._profiler import _EventType

    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
