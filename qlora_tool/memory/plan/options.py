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
    other_starts,
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


def relative_speed(config: Config, asked: float) -> float:
    """How fast a configuration is against the asked one, in tokens per second. A model, not a measurement.

    A frozen base needs a forward pass and the gradients of its inputs, which cost as much; checkpointing computes the
    forward pass once more: 3 passes for 2. Everything else (adapters, ranks, dequantization, the optimizer, the size of
    the batch) is counted as free.

    Args:
        asked: passes of the asked one.
    """
    return asked / passes_of(config)


def passes_of(config: Config) -> float:
    """Passes through the model in a step, as `relative_speed` counts them."""
    return 3 if config.training.gradient_checkpointing else 2


def option_of(search: Search, group: str, settings: dict[str, Any]) -> Option:
    """One way to run, as a row of the table."""
    config = search.of(settings)
    needed = search.needed(settings)
    return Option(
        group, settings, config.training.per_device_train_batch_size, config.data.max_length, needed,
        needed <= search.limit, relative_speed(config, search.passes), config == search.config,
        search.streaming(settings),
    )  # fmt: skip


def parts() -> list[tuple[str, bool]]:
    """Of the table: a group, and for lengths whether with checkpointing. Each can be made apart from the others."""
    return [("length", True), ("length", False), *((group, True) for group in ALTERNATIVES)]


def options_of(search: Search, group: str, checkpointing: bool) -> list[Option]:
    """One of `parts`, but for what the model does not allow."""
    if group == "length":
        return list(_lengths(search, checkpointing)) if search.possible({CHECKPOINTING: checkpointing}) else []
    tried = [*ALTERNATIVES[group], *(other_starts(search.config) if group == SAVINGS else ())]
    options = [option_of(search, group, settings) for settings in tried if search.possible(settings)]
    if group == SAVINGS:  # not what is there already, or does nothing for this run
        least = search.needed({})
        return [option for option in options if option.asked or option.peak_bytes < least]
    if not any(option.asked for option in options):
        section, _, key = group.partition(".")
        options.insert(0, option_of(search, group, {group: getattr(getattr(search.config, section), key)}))
    return options


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
