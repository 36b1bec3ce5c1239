"""What fits into a device's memory, and what to change where the asked configuration does not fit.

The search runs on `estimate_peak`; a full trace that was seen sets what the estimates follow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.config import with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.available import margin_on, usable
from qlora_tool.memory.allocator.target import device_of
from qlora_tool.memory.plan.changes import CHANGES, CHECKPOINTING, LENGTH, RANK, ROWS, SHORTEST, Asked
from qlora_tool.memory.plan.length import longest_length, step_of
from qlora_tool.memory.plan.result import Change
from qlora_tool.memory.plan.streaming import Rates, Streaming
from qlora_tool.memory.profile import Prediction
from qlora_tool.memory.trace.extrapolate import Estimate, estimate_peak, predict_deep, resized
from qlora_tool.memory.trace.predict import BatchShape
from qlora_tool.model.open import positions_of
from qlora_tool.weights.schedule import brought_in_a_step

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.target import CudaTarget
    from qlora_tool.memory.breakdown import Breakdown

UNBOUNDED = 131072  # tokens: how far lengths are tried where the model names no limit
CONFIRMATIONS = 3
LEAST_LEFT = 0.5  # of the rows' length or the rank, for less of it to be the one change that is said


def change_that_fits(
    config: Config,
    model_config,
    budget_bytes: int,
    compute_dtype: torch.dtype,
    target: CudaTarget | None,
    shape: BatchShape,
    predicted: Breakdown,
    *,
    needed: int | None = None,
    margin: float | None = None,
    seconds: float = math.inf,
) -> Change | None:
    """The least harmful change that makes a run fit which does not, estimated; None where nothing does.

    Args:
        config: the run's; `gradient_checkpointing: auto` counts as true.
        budget_bytes: what the device has.
        target: the card that it is for, with what was measured on it; None: a CPU.
        shape: the run's largest batch.
        predicted: what a full trace says of the run as it is.
        needed: bytes that it needs, where that is known to be other than what `predicted` says.
        margin: share of the budget to keep free; by default `margin_on` it.
        seconds: how long to look for one. No estimate, of some two seconds each, begins after that.

    Raises:
        TimeoutError: nothing was found in that time.
    """
    limit = usable(budget_bytes, margin_on(device_of(target).type) if margin is None else margin)
    search = Search.of_run(config, model_config, limit, compute_dtype, target, shape)
    search.deadline = time.monotonic() + seconds
    search.follow({}, predicted.needed_bytes if needed is None else needed, predicted.context_bytes or 0)
    fits, settings = search.what_fits()
    return search.change(settings, search.needed(settings), False) if fits else None


def needed_with(
    settings: Mapping[str, Any], config: Config, model_config, compute_dtype: torch.dtype, target: CudaTarget | None,
    shape: BatchShape, predicted: Breakdown,
) -> int:  # fmt: skip
    """What the device has to give with these settings, estimated; the rest as for `change_that_fits`."""
    search = Search.of_run(config, model_config, 0, compute_dtype, target, shape)
    search.follow({}, predicted.needed_bytes, predicted.context_bytes or 0)
    return search.needed(settings)


@dataclass
class Search:
    """Looks for what fits. Settings are what differs from the asked configuration.

    Attributes:
        limit: bytes that may be used.
        context: bytes that the device takes for itself.
        share: bytes that it holds for every one that is allocated; seen in full traces.
        assumed: whether the batch is what training would make of full rows, or of the kind that `shape` is.
        deadline: of `time.monotonic`; after it TimeoutError ends the search.
        passes: through the model in a step of the asked configuration; see `options.relative_speed`.
    """

    config: Config
    model_config: Any
    limit: int
    compute_dtype: torch.dtype
    target: CudaTarget | None
    shape: BatchShape
    context: int = 0
    share: float = 1.0
    assumed: bool = False
    deadline: float = math.inf
    passes: float = 3
    _slopes: dict[bool, float] = field(default_factory=dict)  # bytes a token, by checkpointing

    @cached_property
    def rates(self) -> Rates:
        return Rates.of(self.target, self.compute_dtype)

    @classmethod
    def of_run(
        cls, config: Config, model_config, limit: int, compute_dtype, target: CudaTarget | None, shape: BatchShape
    ) -> Search:
        """A search around a run whose largest batch has this shape."""
        checkpointing = config.training.gradient_checkpointing
        values = {ROWS: shape.rows, LENGTH: shape.length, CHECKPOINTING: checkpointing == "auto" or checkpointing}
        return cls(with_values(config, values), model_config, limit, compute_dtype, target, shape)

    def of(self, settings: Mapping[str, Any]) -> Config:
        return with_values(self.config, settings)

    def _shape(self, config: Config) -> BatchShape:
        if self.assumed:
            return BatchShape.assumed(config, self.model_config, self.shape.processes)
        return resized(self.shape, config.training.per_device_train_batch_size, config.data.max_length)

    def _estimate(self, settings: Mapping[str, Any]) -> Estimate:
        if time.monotonic() > self.deadline:
            raise TimeoutError("the time for the search is over")
        config = self.of(settings)
        return estimate_peak(config, self.model_config, self._shape(config), self.compute_dtype, self.target)

    def needed(self, settings: Mapping[str, Any]) -> int:
        """What the device has to give, estimated."""
        return self.context + round(self._estimate(settings).peak_bytes * self.share)

    def fits(self, settings: Mapping[str, Any]) -> bool:
        return self.needed(settings) <= self.limit

    def weights(self, settings: Mapping[str, Any]) -> int:
        return self._estimate(settings).weights_bytes

    def streaming(self, settings: Mapping[str, Any]) -> Streaming | None:
        """What streamed weights cost there; None where none are."""
        config, found = self.of(settings), self._estimate(settings)
        batches = config.training.gradient_accumulation_steps
        moved = batches * brought_in_a_step(found.layer_bytes)
        if config.model.weights not in ("host", "disk") or not moved:
            return None
        products = batches * found.flops / self.rates.products if self.rates.products else 0.0
        rate = self.rates.disk if config.model.weights == "disk" else self.rates.host
        return Streaming(config.model.weights, moved, rate, products)

    def possible(self, settings: Mapping[str, Any]) -> bool:
        """Whether the model can be run like this; one without layers to recompute cannot be checkpointed."""
        try:
            self.needed(settings)
        except UserError:
            return False
        return True

    def traced(self, settings: Mapping[str, Any]) -> int:
        """What the device has to give, from a full trace; estimates follow it from here on."""
        config = self.of(settings)
        trace = predict_deep(
            config, self.model_config, self._shape(config), self.compute_dtype, target=device_of(self.target)
        )  # fmt: skip
        seen = Prediction.of(trace, self.target).breakdown
        self.follow(settings, seen.needed_bytes, seen.context_bytes or 0)
        return seen.needed_bytes

    def follow(self, settings: Mapping[str, Any], needed: int, context: int) -> None:
        """Let estimates be what was seen, for these settings, and in proportion to it for others."""
        self.context = context
        self.share = (needed - context) / self._estimate(settings).peak_bytes

    def confirmed(self, settings: dict[str, Any], confirm: bool) -> Change:
        """The change, its peak taken from a full trace; with shorter rows, should the estimate have been too low."""
        if not confirm:
            return self.change(settings, self.needed(settings), False)
        for _ in range(CONFIRMATIONS):
            needed = self.traced(settings)
            if needed <= self.limit:
                return self.change(settings, needed, True)
            if length := settings.get(LENGTH):
                length = max(SHORTEST, min(self.longest(settings), length - step_of(length)))
                settings = {**settings, LENGTH: length}
        return self.change(settings, needed, False)

    def change(self, settings: dict[str, Any], needed: int, confirmed: bool) -> Change:
        """Settings with what they take and cost."""
        return Change(settings, needed, confirmed, self.streaming(settings))

    # Lengths

    def longest(self, settings: Mapping[str, Any]) -> int:
        """The longest rows that fit; 0 where not even SHORTEST tokens do."""
        config = self.of(settings)
        rows, checkpointing = config.training.per_device_train_batch_size, config.training.gradient_checkpointing
        top = max(self.shape.length, positions_of(self.model_config) or UNBOUNDED)
        length, slope = longest_length(
            lambda length: self.needed({**settings, LENGTH: length}),
            self.limit, SHORTEST, top, start=config.data.max_length, slope=self._slopes.get(checkpointing, 0.0) * rows,
        )  # fmt: skip
        if slope:
            self._slopes[checkpointing] = slope / rows
        return length

    # What to change

    def what_fits(self) -> tuple[bool, dict[str, Any]]:
        """The first change that makes the configuration fit: one if one is enough, else several on top of one another.
        False where all together, which are then returned, do not. Rows of less than half the length, or a rank, come
        after several changes that leave them alone."""
        whole = {LENGTH: self.shape.length, RANK: self.config.adapter.r}
        asked = Asked(self.config, self.shape, self.compute_dtype, self.target is not None, self.longest)
        for change in CHANGES:
            for settings in change(asked, {}):
                cut = any(settings.get(key, size) < LEAST_LEFT * size for key, size in whole.items())
                if not cut and self.possible(settings) and self.fits(settings):
                    return True, settings
        parts: list[dict[str, Any]] = []
        for change in CHANGES:
            before, last = _merged(parts), {}
            for settings in change(asked, before):
                if self.possible({**before, **settings}):
                    last = settings
                    if self.fits({**before, **last}):
                        return True, self._needed_of([*parts, last])
            parts.append(last)
        return False, _merged(parts)

    def _needed_of(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Of changes that together are enough, those that it takes; the last, which made it enough, is one of them."""
        for part in parts[-2::-1]:
            fewer = [other for other in parts if other is not part]
            try:
                if part and self.possible(_merged(fewer)) and self.fits(_merged(fewer)):
                    parts = fewer
            except TimeoutError:
                break
        return _merged(parts)


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}
