"""What fits into a device's memory, how fast it is, and what to change where the asked configuration does not fit.

The search runs on `estimate_peak`; what it answers is then confirmed by a full trace.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import yaml

from qlora_tool.build import resolve as resolve_run
from qlora_tool.config import with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.available import margin_on, usable
from qlora_tool.memory.allocator.target import device_of
from qlora_tool.memory.plan.changes import (
    CHANGES,
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
    Asked,
)
from qlora_tool.memory.plan.length import longest_length, step_of
from qlora_tool.memory.profile import Prediction
from qlora_tool.memory.trace.extrapolate import Estimate, estimate_peak, resized
from qlora_tool.memory.trace.predict import BatchShape, predict

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.target import CudaTarget
    from qlora_tool.memory.breakdown import Breakdown

BATCH_SIZES = (1, 2, 4, 8)
OPTIMIZERS = ("adamw", "adamw_8bit")
UNBOUNDED = 131072  # tokens: how far lengths are tried where the model names no limit
CONFIRMATIONS = 3

_DOUBLE = "model.double_quant"
_SAVINGS = "savings"


@dataclass(frozen=True)
class Option:
    """One way to run.

    Attributes:
        group: which of its keys is looked at: `length` (the longest that fits), a key of the configuration, `savings`
            (what takes less at a price), or `asked`.
        settings: keys of the configuration that differ from what was asked for, or would, and their values.
        rows, length: of the batch; a length of 0 says that not even `SHORTEST` tokens fit.
        peak_bytes: what the device has to give: the peak on a CPU, what is reserved and the context on CUDA.
        fits: whether that is within what may be used.
        speed: in tokens per second, relative to the asked configuration; see `relative_speed`.
        asked: it is what was asked for.
    """

    group: str
    settings: dict[str, Any]
    rows: int
    length: int
    peak_bytes: int
    fits: bool
    speed: float
    asked: bool = False


@dataclass(frozen=True)
class Change:
    """What to change in the asked configuration.

    Attributes:
        settings: keys and their new values.
        peak_bytes: what the device then has to give.
        confirmed: whether that was seen in a full trace, not only estimated.
    """

    settings: dict[str, Any]
    peak_bytes: int
    confirmed: bool

    @property
    def line(self) -> str:
        """To copy: `--set data.max_length=1024`."""
        return set_line(self.settings)


@dataclass(frozen=True)
class Plan:
    """What fits.

    Attributes:
        target: the card that it is for; None: a CPU.
        budget_bytes: what the device has.
        margin: the share of it that is kept free.
        asked: the asked configuration.
        options: what else there is, group by group.
        longest: the asked configuration with the longest rows that fit, where it fits itself and there are longer ones.
        faster: the asked configuration without checkpointing, where that fits too.
        change: what makes the asked configuration fit, where it does not.
        smallest_bytes: what the least of all configurations takes, where there is no such change.
        weights_bytes: what the weights take alone, adapters and their masters included: of what was asked for where it
            fits, of `change`, or of the least.
    """

    target: CudaTarget | None
    budget_bytes: int
    margin: float
    asked: Option
    options: tuple[Option, ...]
    longest: Change | None = None
    faster: Change | None = None
    change: Change | None = None
    smallest_bytes: int = 0
    weights_bytes: int = 0

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return device_of(self.target).type

    @property
    def usable_bytes(self) -> int:
        return usable(self.budget_bytes, self.margin)

    @property
    def fits(self) -> bool:
        return self.asked.fits

    @property
    def line(self) -> str:
        """The `--set` that makes the asked configuration fit or, where it does, that makes the most of the device;
        empty where nothing is to be changed or nothing helps."""
        answer = self.change or self.longest
        return answer.line if answer else ""

    @property
    def misses_by(self) -> int:
        """Bytes that even the smallest configuration takes too much; 0 where something fits."""
        return 0 if self.fits or self.change else self.smallest_bytes - self.usable_bytes


def set_line(settings: Mapping[str, Any]) -> str:
    """Keys and values as options of the command line."""
    return " ".join(f"--set {key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in settings.items())


def relative_speed(config: Config, asked: Config) -> float:
    """How fast a configuration is against the asked one, in tokens per second. A model, not a measurement.

    A frozen base needs a forward pass and the gradients of its inputs, which cost as much; checkpointing computes the
    forward pass once more: 3 passes for 2. Everything else (adapters, ranks, dequantization, the optimizer, the size of
    the batch) is counted as free.
    """

    def passes(which: Config) -> int:
        return 3 if which.training.gradient_checkpointing else 2

    return passes(asked) / passes(config)


def plan(
    config: Config,
    model_config,
    budget_bytes: int,
    compute_dtype: torch.dtype,
    target: CudaTarget | None,
    *,
    margin: float | None = None,
    shape: BatchShape | None = None,
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
        confirm: trace the answer at the model's full depth. Takes as long as a prediction.

    Raises:
        UserError: the model cannot be traced as it is asked for.
    """
    device = device_of(target).type
    margin = margin_on(device) if margin is None else margin
    config = resolve_run(config, model_config, device, compute_dtype)
    assumed = shape is None
    shape = shape or BatchShape.full(config.training.per_device_train_batch_size, config.data.max_length)
    search = _Search.of_run(config, model_config, usable(budget_bytes, margin), compute_dtype, target, shape)
    search.assumed = assumed
    if target is not None:
        search.traced({})
    config, asked = search.config, search.option("asked", {})
    options = tuple(search.options(asked))
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


def change_that_fits(
    config: Config,
    model_config,
    budget_bytes: int,
    compute_dtype: torch.dtype,
    target: CudaTarget | None,
    shape: BatchShape,
    predicted: Breakdown,
    *,
    seconds: float = math.inf,
) -> Change | None:
    """The least harmful change that makes a run fit which does not, estimated; None where nothing does.

    Args:
        config: the run's; `gradient_checkpointing: auto` counts as true.
        budget_bytes: what the device has; on CUDA a margin of it is kept free.
        target: the card that it is for, with what was measured on it; None: a CPU.
        shape: the run's largest batch.
        predicted: what a full trace says of the run as it is.
        seconds: how long to look for one. No estimate, of some two seconds each, begins after that.

    Raises:
        TimeoutError: nothing was found in that time.
    """
    limit = usable(budget_bytes, margin_on(device_of(target).type))
    search = _Search.of_run(config, model_config, limit, compute_dtype, target, shape)
    search.deadline = time.monotonic() + seconds
    search.follow({}, predicted.needed_bytes, predicted.context_bytes or 0)
    fits, settings = search.what_fits()
    return Change(settings, search.needed(settings), False) if fits else None


@dataclass
class _Search:
    """Looks for what fits. Settings are what differs from the asked configuration.

    Attributes:
        limit: bytes that may be used.
        context: bytes that the device takes for itself.
        share: bytes that it holds for every one that is allocated; seen in full traces.
        assumed: whether the batch is what training would make of full rows, or of the kind that `shape` is.
        deadline: of `time.monotonic`; after it TimeoutError ends the search.
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
    _slopes: dict[bool, float] = field(default_factory=dict)  # bytes a token, by checkpointing

    @classmethod
    def of_run(
        cls, config: Config, model_config, limit: int, compute_dtype, target: CudaTarget | None, shape: BatchShape
    ) -> _Search:
        """A search around a run whose largest batch has this shape."""
        checkpointing = config.training.gradient_checkpointing
        values = {ROWS: shape.rows, LENGTH: shape.length, CHECKPOINTING: checkpointing == "auto" or checkpointing}
        return cls(with_values(config, values), model_config, limit, compute_dtype, target, shape)

    def of(self, settings: Mapping[str, Any]) -> Config:
        return with_values(self.config, settings)

    def _shape(self, config: Config) -> BatchShape:
        if self.assumed:
            return BatchShape.assumed(config, self.model_config)
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
        trace = predict(
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
            return Change(settings, self.needed(settings), False)
        for _ in range(CONFIRMATIONS):
            needed = self.traced(settings)
            if needed <= self.limit:
                return Change(settings, needed, True)
            if length := settings.get(LENGTH):
                length = max(SHORTEST, min(self.longest(settings), length - step_of(length)))
                settings = {**settings, LENGTH: length}
        return Change(settings, needed, False)

    # Lengths

    def longest(self, settings: Mapping[str, Any]) -> int:
        """The longest rows that fit; 0 where not even SHORTEST tokens do."""
        config = self.of(settings)
        rows, checkpointing = config.training.per_device_train_batch_size, config.training.gradient_checkpointing
        text = self.model_config.get_text_config()
        top = max(self.shape.length, getattr(text, "max_position_embeddings", None) or UNBOUNDED)
        length, slope = longest_length(
            lambda length: self.needed({**settings, LENGTH: length}),
            self.limit, SHORTEST, top, start=config.data.max_length, slope=self._slopes.get(checkpointing, 0.0) * rows,
        )  # fmt: skip
        if slope:
            self._slopes[checkpointing] = slope / rows
        return length

    # What the table shows

    def option(self, group: str, settings: dict[str, Any]) -> Option:
        config = self.of(settings)
        needed = self.needed(settings)
        return Option(
            group, settings, config.training.per_device_train_batch_size, config.data.max_length, needed,
            needed <= self.limit, relative_speed(config, self.config), config == self.config,
        )  # fmt: skip

    def options(self, asked: Option) -> Iterator[Option]:
        """All rows of the table, but for those that the model does not allow."""
        for checkpointing in (True, False):
            if self.possible({CHECKPOINTING: checkpointing}):
                yield from self._lengths(checkpointing)
        for group, choices in _ALTERNATIVES.items():
            options = [self.option(group, settings) for settings in choices if self.possible(settings)]
            if group == _SAVINGS:  # not what is there already, or does nothing for this run
                yield from (option for option in options if option.asked or option.peak_bytes < asked.peak_bytes)
                continue
            if not any(option.asked for option in options):
                section, _, key = group.partition(".")
                yield self.option(group, {group: getattr(getattr(self.config, section), key)})
            yield from options

    def _lengths(self, checkpointing: bool) -> Iterator[Option]:
        tokens = self.shape.rows * self.shape.length
        for rows in sorted({*BATCH_SIZES, self.shape.rows}):
            start = max(SHORTEST, tokens // rows)
            settings = {CHECKPOINTING: checkpointing, ROWS: rows}
            length = self.longest({**settings, LENGTH: start})
            if length:
                tokens = rows * length
                yield self.option("length", {**settings, LENGTH: length})
            else:
                shortest = self.option("length", {**settings, LENGTH: SHORTEST})
                yield Option("length", settings, rows, 0, shortest.peak_bytes, False, shortest.speed)

    # What to change

    def what_fits(self) -> tuple[bool, dict[str, Any]]:
        """The first change that makes the configuration fit: one if one is enough, else several on top of one another.
        False where all together, which are then returned, do not."""
        asked = Asked(self.config, self.shape, self.compute_dtype, self.target is not None, self.longest)
        for change in CHANGES:
            for settings in change(asked, {}):
                if self.possible(settings) and self.fits(settings):
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


# One key at a time, whatever else was asked for.
_ALTERNATIVES: dict[str, list[dict[str, Any]]] = {
    RANK: [{RANK: rank} for rank in RANKS],
    QUANTIZATION: [
        {QUANTIZATION: "nf4", _DOUBLE: True}, {QUANTIZATION: "nf4", _DOUBLE: False}, {QUANTIZATION: "int8"},
        {QUANTIZATION: "none"},
    ],
    OPTIM: [{OPTIM: optimizer} for optimizer in OPTIMIZERS],
    _SAVINGS: [{TILED: True}, {OFFLOAD: True}, {EMBEDDINGS: "int8"}],
}  # fmt: skip
