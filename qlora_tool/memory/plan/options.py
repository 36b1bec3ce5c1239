"""The table of a plan: the longest rows that fit, and other values of the keys that decide what a run takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_tool.memory.plan.changes import (
    CHECKPOINTING,
    EMBEDDINGS,
    LENGTH,
    OFFLOAD,
    OPTIM,
    QUANTIZATION,
    RANK,
    RANKS,
    ROWS,
    SHORTEST,
    TILED,
    WEIGHTS,
)
from qlora_tool.memory.plan.result import Option
from qlora_tool.memory.plan.search import Search

if TYPE_CHECKING:
    from qlora_tool.config import Config

BATCH_SIZES = (1, 2, 4, 8)
OPTIMIZERS = ("adamw", "adamw_8bit")

_DOUBLE = "model.double_quant"
SAVINGS = "savings"  # what takes less at a price, in a group
# One key at a time, whatever else was asked for.
ALTERNATIVES: dict[str, list[dict[str, Any]]] = {
    RANK: [{RANK: rank} for rank in RANKS],
    QUANTIZATION: [
        {QUANTIZATION: "nf4", _DOUBLE: True}, {QUANTIZATION: "nf4", _DOUBLE: False}, {QUANTIZATION: "int8"},
        {QUANTIZATION: "none"},
    ],
    OPTIM: [{OPTIM: optimizer} for optimizer in OPTIMIZERS],
    SAVINGS: [{TILED: True}, {OFFLOAD: True}, {EMBEDDINGS: "int8"}, {WEIGHTS: "host"}, {WEIGHTS: "disk"}],
}  # fmt: skip


def relative_speed(config: Config, asked: Config) -> float:
    """How fast a configuration is against the asked one, in tokens per second. A model, not a measurement.

    A frozen base needs a forward pass and the gradients of its inputs, which cost as much; checkpointing computes the
    forward pass once more: 3 passes for 2. Everything else (adapters, ranks, dequantization, the optimizer, the size of
    the batch) is counted as free.
    """

    def passes(which: Config) -> int:
        return 3 if which.training.gradient_checkpointing else 2

    return passes(asked) / passes(config)


def option_of(search: Search, group: str, settings: dict[str, Any]) -> Option:
    """One way to run, as a row of the table."""
    config = search.of(settings)
    needed = search.needed(settings)
    return Option(
        group, settings, config.training.per_device_train_batch_size, config.data.max_length, needed,
        needed <= search.limit, relative_speed(config, search.config), config == search.config,
        search.streaming(settings),
    )  # fmt: skip


def all_options(search: Search, asked: Option) -> Iterator[Option]:
    """All rows of the table, but for those that the model does not allow."""
    for checkpointing in (True, False):
        if search.possible({CHECKPOINTING: checkpointing}):
            yield from _lengths(search, checkpointing)
    for group, choices in ALTERNATIVES.items():
        options = [option_of(search, group, settings) for settings in choices if search.possible(settings)]
        if group == SAVINGS:  # not what is there already, or does nothing for this run
            yield from (option for option in options if option.asked or option.peak_bytes < asked.peak_bytes)
            continue
        if not any(option.asked for option in options):
            section, _, key = group.partition(".")
            yield option_of(search, group, {group: getattr(getattr(search.config, section), key)})
        yield from options


def _lengths(search: Search, checkpointing: bool) -> Iterator[Option]:
    tokens = search.shape.rows * search.shape.length
    for rows in sorted({*BATCH_SIZES, search.shape.rows}):
        start = max(SHORTEST, tokens // rows)
        settings = {CHECKPOINTING: checkpointing, ROWS: rows}
        length = search.longest({**settings, LENGTH: start})
        if length:
            tokens = rows * length
            yield option_of(search, "length", {**settings, LENGTH: length})
        else:
            shortest = option_of(search, "length", {**settings, LENGTH: SHORTEST})
            yield Option("length", settings, rows, 0, shortest.peak_bytes, False, shortest.speed)
