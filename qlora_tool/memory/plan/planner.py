"""A plan: what was asked for, what else fits, and the one line that makes it fit, or makes the most of the device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.build.resolve import resolve as resolve_run
from qlora_tool.memory.allocator.available import margin_on, usable
from qlora_tool.memory.allocator.target import device_of
from qlora_tool.memory.plan.changes import CHECKPOINTING, LENGTH
from qlora_tool.memory.plan.options import all_options, option_of
from qlora_tool.memory.plan.result import Plan
from qlora_tool.memory.plan.search import Search
from qlora_tool.memory.trace.predict import BatchShape

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.target import CudaTarget


def plan(
    config: Config,
    model_config,
    budget_bytes: int,
    compute_dtype: torch.dtype,
    target: CudaTarget | None,
    *,
    margin: float | None = None,
    shape: BatchShape | None = None,
    processes: int = 1,
    confirm: bool = True,
) -> Plan:
    """What fits into `budget_bytes`.

    Args:
        config: what was asked for; `gradient_checkpointing: auto` counts as true.
        model_config: the model's transformers configuration.
        budget_bytes: what the device has.
        compute_dtype: what products run in.
        target: the card that it is for, with what was measured on it; None: a CPU.
        margin: share of the budget to keep free; by default `margin_on` it.
        shape: the kind of batch that is asked for; by default what training would make of full rows.
        processes: that train together, where `shape` does not say it.
        confirm: trace the answer at the model's full depth. Takes as long as a prediction.

    Raises:
        UserError: the model cannot be traced as it is asked for.
    """
    device = device_of(target).type
    margin = margin_on(device) if margin is None else margin
    config = resolve_run(config, model_config, device, compute_dtype)
    assumed = shape is None
    shape = shape or replace(BatchShape.full(config.training.per_device_train_batch_size, config.data.max_length),
                             processes=processes)  # fmt: skip
    search = Search.of_run(config, model_config, usable(budget_bytes, margin), compute_dtype, target, shape)
    search.assumed = assumed
    if target is not None:
        search.traced({})
    config, asked = search.config, option_of(search, "asked", {})
    options = tuple(all_options(search, asked))
    longest = faster = change = None
    smallest = 0
    if asked.fits:
        settings: dict[str, Any] = {}
        without, length = {CHECKPOINTING: False}, search.longest({})
        if config.training.gradient_checkpointing and search.fits(without):
            faster = search.confirmed(without, confirm)
        if length > shape.length:
            longest = search.confirmed({LENGTH: length}, confirm)
    else:
        fits, settings = search.what_fits()
        if fits:
            change = search.confirmed(settings, confirm)
        else:
            smallest = search.needed(settings)
    return Plan(
        target, budget_bytes, margin, asked, options, longest, faster, change, smallest, search.weights(settings)
    )  # fmt: skip
