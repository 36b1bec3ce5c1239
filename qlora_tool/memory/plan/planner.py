"""A plan: what was asked for, what else fits, and the one line that makes it fit, or makes the most of the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.build.resolve import resolve as resolve_run
from qlora_tool.memory.allocator.available import margin_on, usable
from qlora_tool.memory.allocator.target import device_of
from qlora_tool.memory.plan.changes import CHECKPOINTING, LENGTH, ROWS
from qlora_tool.memory.plan.meanwhile import call
from qlora_tool.memory.plan.options import option_of, options_of, parts, passes_of
from qlora_tool.memory.plan.result import Change, Option, Plan
from qlora_tool.memory.plan.search import Search
from qlora_tool.memory.trace.predict import BatchShape
from qlora_tool.model.open import positions_of
from qlora_tool.terminal import waiting
from qlora_tool.workers import Workers

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.target import CudaTarget
    from qlora_tool.memory.plan.budget import Choice


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
    chosen: Choice | None = None,
    workers: Workers | None = None,
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
        chosen: what `gradient_checkpointing: auto` recomputes of what was asked for, where that was chosen.
        workers: that call `meanwhile.call`, to make the table; None: it is made here.

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
    search.assumed, search.passes = assumed, 2 + chosen.share if chosen else passes_of(search.config)
    if target is not None:
        search.traced({})
    config, asked = search.config, option_of(search, "asked", {})
    if chosen is not None:
        needed = chosen.predicted.needed_bytes
        asked = replace(asked, peak_bytes=needed, fits=needed <= search.limit, speed=1.0)
    options = _table(search, workers)
    longest = faster = change = None
    smallest = 0
    if asked.fits:
        settings: dict[str, Any] = {}
        without, length = {CHECKPOINTING: False}, _longest(search, options)
        if config.training.gradient_checkpointing and chosen is None and search.fits(without):
            faster = search.confirmed(without, confirm)
        if length > shape.length:
            longest = search.confirmed({LENGTH: length}, confirm)
    else:
        fits, settings = search.what_fits()
        if fits:
            change = search.confirmed(settings, confirm)
        else:
            smallest = search.needed(settings)
    known = [found for found in (longest, faster, change) if found is not None and found.confirmed]
    return Plan(
        target, budget_bytes, margin, asked, tuple(_as_known(search, option, known) for option in options), longest,
        faster, change, smallest, search.weights(settings), recomputation=str(chosen.recomputation) if chosen else "",
        positions=positions_of(model_config),
    )  # fmt: skip


def _table(search: Search, workers: Workers | None) -> list[Option]:
    """All rows of the table, in order. Lengths with checkpointing, the longest work and what the answer is looked up
    in, are made here, where their traces are asked for once more: this process begins with the last."""
    first, *others = parts()
    works = [(options_of, search, *part) for part in (*others, first)]
    with waiting("planning"):
        *found, lengths = [call(*work) for work in works] if workers is None else workers.map(works)
    return [option for options in (lengths, *found) for option in options]


def _longest(search: Search, options: Sequence[Option]) -> int:
    """The longest rows that fit of as many as are asked for, as the table has it."""
    wanted = {CHECKPOINTING: search.config.training.gradient_checkpointing, ROWS: search.shape.rows}
    return max((option.length for option in options
                if option.group == "length" and option.settings.items() >= wanted.items()), default=0)  # fmt: skip


def _as_known(search: Search, option: Option, known: Sequence[Change]) -> Option:
    """A row of the table with what a full trace showed of it: the same figure wherever it is told."""
    for change in known:
        same_length = {**option.settings, LENGTH: change.settings.get(LENGTH, search.shape.length)}
        at = same_length if option.group == "length" else option.settings
        if search.of(at) == search.of(change.settings):
            length = search.of(change.settings).data.max_length
            return replace(option, settings=at, length=length, peak_bytes=change.peak_bytes)
    return option
