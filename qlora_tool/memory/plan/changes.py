"""What may be changed so that a run takes less memory, and what each change costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.adapters.calibration import start_tokens
from qlora_tool.adapters.fusion import TILE

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.trace.predict import BatchShape

SHORTEST = 64  # tokens: shorter rows are not suggested
RANKS = (8, 16, 32, 64)

CHECKPOINTING = "training.gradient_checkpointing"
OPTIM = "training.optim"
ROWS = "training.per_device_train_batch_size"
ACCUMULATION = "training.gradient_accumulation_steps"
TILED = "training.tiled_mlp"
OFFLOAD = "training.offload_boundaries"
IN_BACKWARD = "training.optimizer_in_backward"
EMBEDDINGS = "model.embeddings"
QUANTIZATION = "model.quantization"
WEIGHTS = "model.weights"
RESIDENT = "model.resident_layers"
LENGTH = "data.max_length"
RANK = "adapter.r"
START = "adapter.init_lora_weights"

_COSTS = {
    (TILED, True): "half of each MLP once more",
    (OFFLOAD, True): "copies to and from the host",
    (EMBEDDINGS, "int8"): "rounded to 8 bits",
    (IN_BACKWARD, True): "no clipping",
    (START, "default"): "a start that knows nothing of the weights",
    (START, "pissa_niter_4"): "decomposed in 4 iterations",
}
LESS_START = {"pissa": "pissa_niter_4"}
"""What makes nearly the same start in less memory, by its name."""


def costs_of(settings: Mapping[str, Any]) -> list[str]:
    """What changes cost that no relative speed shows, in a few words each."""
    return [_COSTS[key, value] for key, value in settings.items() if (key, value) in _COSTS]


@dataclass(frozen=True)
class Asked:
    """A run that takes too much.

    Attributes:
        shape: of its largest batch.
        compute_dtype: what its products run in.
        on_card: whether it is for a card, and not for a CPU.
        longest: gives the longest rows that fit with other settings, 0 where not even `SHORTEST` tokens do.
    """

    config: Config
    shape: BatchShape
    compute_dtype: torch.dtype
    on_card: bool
    longest: Callable[[Mapping[str, Any]], int]


Settings = dict[str, Any]
Change = Callable[[Asked, Settings], Iterator[Settings]]
"""Gives one kind of change, the least of it first, to a run that has these other settings already."""


def _checkpointing(asked: Asked, _settings: Settings) -> Iterator[Settings]:
    if not asked.config.training.gradient_checkpointing:
        yield {CHECKPOINTING: True}


def _optimizer(asked: Asked, _settings: Settings) -> Iterator[Settings]:
    if asked.config.training.optim == "adamw":
        yield {OPTIM: "adamw_8bit"}


def _fewer_rows(asked: Asked, _settings: Settings) -> Iterator[Settings]:
    rows, accumulated = asked.shape.rows, asked.config.training.gradient_accumulation_steps
    while rows > 1:  # the rows of an optimizer step stay as many
        by = 2 if rows % 2 == 0 else rows
        rows, accumulated = rows // by, accumulated * by
        yield {ROWS: rows, ACCUMULATION: accumulated}


def _tiled_mlp(asked: Asked, settings: Settings) -> Iterator[Settings]:
    rows = settings.get(ROWS, asked.shape.rows)
    if not asked.config.training.tiled_mlp and rows * asked.shape.length > TILE:
        yield {TILED: True}


def _offloaded_boundaries(asked: Asked, settings: Settings) -> Iterator[Settings]:
    """Which only recomputed layers have."""
    training = asked.config.training
    if asked.on_card and not training.offload_boundaries:
        recomputed = training.gradient_checkpointing or CHECKPOINTING in settings
        yield {OFFLOAD: True} if recomputed else {CHECKPOINTING: True, OFFLOAD: True}


def _optimizer_in_backward(asked: Asked, settings: Settings) -> Iterator[Settings]:
    """Where it contradicts nothing that was asked for."""
    training = asked.config.training
    passes = settings.get(ACCUMULATION, training.gradient_accumulation_steps)
    possible = passes == 1 and not training.max_grad_norm and asked.compute_dtype != torch.float16
    if possible and not training.optimizer_in_backward:
        yield {IN_BACKWARD: True}


def _embeddings(asked: Asked, _settings: Settings) -> Iterator[Settings]:
    if asked.config.model.embeddings != "int8":
        yield {EMBEDDINGS: "int8"}


def _quantization(asked: Asked, _settings: Settings) -> Iterator[Settings]:
    if asked.config.model.quantization in ("int8", "none"):
        yield {QUANTIZATION: "nf4"}


def _streamed_weights(asked: Asked, _settings: Settings) -> Iterator[Settings]:
    if asked.config.model.weights in ("auto", "resident") and asked.config.training.sharding == "none":
        yield {WEIGHTS: "host" if asked.on_card else "disk"}


def _shorter_rows(asked: Asked, settings: Settings) -> Iterator[Settings]:
    length = asked.longest(settings)
    if asked.shape.length > SHORTEST:
        yield {LENGTH: length or SHORTEST}


def _lower_rank(asked: Asked, _settings: Settings) -> Iterator[Settings]:
    rank = asked.config.adapter.r
    while rank // 2 >= RANKS[0]:
        rank //= 2
        yield {RANK: rank}


def other_starts(config: Config) -> Iterator[Settings]:
    """Starts that take less to make, where one is made of weights or data; the last is drawn."""
    if start_tokens(config, ()) is not None:
        start = getattr(config.adapter, "init_lora_weights", "")
        if start in LESS_START:
            yield {START: LESS_START[start]}
        yield {START: "default"}


def _another_start(asked: Asked, _settings: Settings) -> Iterator[Settings]:
    yield from other_starts(asked.config)


CHANGES: tuple[Change, ...] = (
    _checkpointing, _optimizer, _fewer_rows, _tiled_mlp, _offloaded_boundaries, _optimizer_in_backward, _embeddings,
    _quantization, _streamed_weights, _another_start, _shorter_rows, _lower_rank,
)  # fmt: skip
"""In the order of their harm: first what costs a little speed, then what rounds weights, then what costs much speed,
last what is learned from less."""
