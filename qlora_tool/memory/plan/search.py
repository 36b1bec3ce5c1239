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
from qlora_tool.memory.plan.length import longest_length, step_of
from qlora_tool.memory.trace.extrapolate import ANY_CARD, Estimate, estimate_peak, resized, timeline_on
from qlora_tool.memory.trace.predict import BatchShape, predict
from qlora_tool.ops.declare import CPU

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.breakdown import Breakdown

BATCH_SIZES = (1, 2, 4, 8)
RANKS = (8, 16, 32, 64)
OPTIMIZERS = ("adamw", "adamw_8bit")
SHORTEST = 64  # tokens: shorter rows are not suggested
UNBOUNDED = 131072  # tokens: how far lengths are tried where the model names no limit
CONFIRMATIONS = 3

_CHECKPOINTING = "training.gradient_checkpointing"
_OPTIM = "training.optim"
_ROWS = "training.per_device_train_batch_size"
_ACCUMULATION = "training.gradient_accumulation_steps"
_QUANTIZATION = "model.quantization"
_DOUBLE = "model.double_quant"
_LENGTH = "data.max_length"
_RANK = "adapter.r"


@dataclass(frozen=True)
class Option:
    """One way to run.

    Attributes:
        group: which of its keys is looked at: `length` (the longest that fits), a key of the configuration, or `asked`.
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
        device: cpu or cuda.
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

    device: str
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
    device: str = "cpu",
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
        device: cpu or cuda.
        margin: share of the budget to keep free; by default `margin_on` it.
        shape: the kind of batch that is asked for; by default what training would make of full rows.
        confirm: trace the answer at the model's full depth. Takes as long as a prediction.

    Raises:
        UserError: the model cannot be traced as it is asked for.
    """
    margin = margin_on(device) if margin is None else margin
    config = resolve_run(config, model_config, device, compute_dtype)
    assumed = shape is None
    shape = shape or BatchShape.full(config.training.per_device_train_batch_size, config.data.max_length)
    search = _Search.of_run(config, model_config, usable(budget_bytes, margin), compute_dtype, device, shape)
    search.assumed = assumed
    if device != "cpu":
        search.calibrate({})
    config, asked, options = search.config, search.option("asked", {}), tuple(search.options())
    longest = faster = change = None
    smallest = 0
    if asked.fits:
        settings: dict[str, Any] = {}
        without, length = {_CHECKPOINTING: False}, search.longest({})
        if config.training.gradient_checkpointing and search.needed(without) <= search.limit:
            faster = search.confirmed(without, confirm)
        if length > shape.length:
            longest = search.confirmed({_LENGTH: length}, confirm)
    else:
        fits, settings = search.what_fits()
        if fits:
            change = search.confirmed(settings, confirm)
        else:
            smallest = search.needed(settings)
    return Plan(
        device, budget_bytes, margin, asked, options, longest, faster, change, smallest, search.weights(settings)
    )  # fmt: skip


def change_that_fits(
    config: Config,
    model_config,
    budget_bytes: int,
    compute_dtype: torch.dtype,
    device: str,
    shape: BatchShape,
    predicted: Breakdown,
    *,
    seconds: float = math.inf,
) -> Change | None:
    """The least harmful change that makes a run fit which does not, estimated; None where nothing does.

    Args:
        config: the run's; `gradient_checkpointing: auto` counts as true.
        budget_bytes: what the device has; on CUDA a margin of it is kept free.
        shape: the run's largest batch.
        predicted: what a full trace says of the run as it is.
        seconds: how long to look for one. No estimate, of some two seconds each, begins after that.

    Raises:
        TimeoutError: nothing was found in that time.
    """
    limit = usable(budget_bytes, margin_on(device))
    search = _Search.of_run(config, model_config, limit, compute_dtype, device, shape)
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
    device: str
    shape: BatchShape
    context: int = 0
    share: float = 1.0
    assumed: bool = False
    deadline: float = math.inf
    _slopes: dict[bool, float] = field(default_factory=dict)  # bytes a token, by checkpointing

    @classmethod
    def of_run(cls, config: Config, model_config, limit: int, compute_dtype, device: str, shape: BatchShape) -> _Search:
        """A search around a run whose largest batch has this shape."""
        checkpointing = config.training.gradient_checkpointing
        values = {_ROWS: shape.rows, _LENGTH: shape.length, _CHECKPOINTING: checkpointing == "auto" or checkpointing}
        return cls(with_values(config, values), model_config, limit, compute_dtype, device, shape)

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
        return estimate_peak(config, self.model_config, self._shape(config), self.compute_dtype, self.device)

    def needed(self, settings: Mapping[str, Any]) -> int:
        """What the device has to give, estimated."""
        return self.context + round(self._estimate(settings).peak_bytes * self.share)

    def weights(self, settings: Mapping[str, Any]) -> int:
        return self._estimate(settings).weights_bytes

    def possible(self, settings: Mapping[str, Any]) -> bool:
        """Whether the model can be run like this; one without layers to recompute cannot be checkpointed."""
        try:
            self.needed(settings)
        except UserError:
            return False
        return True

    def calibrate(self, settings: Mapping[str, Any]) -> int:
        """What the device has to give, from a full trace; estimates follow it from here on."""
        config = self.of(settings)
        target = CPU if self.device == "cpu" else ANY_CARD
        trace = predict(config, self.model_config, self._shape(config), self.compute_dtype, target=target)
        if self.device == "cpu":
            needed, context = timeline_on(trace, "cpu").peak_bytes, 0
        else:
            from qlora_tool.memory.allocator.timeline import cuda_timeline

            seen = cuda_timeline(trace)
            needed, context = seen.reserved_peak + seen.context_bytes, seen.context_bytes
        self.follow(settings, needed, context)
        return needed

    def follow(self, settings: Mapping[str, Any], needed: int, context: int) -> None:
        """Let estimates be what was seen, for these settings, and in proportion to it for others."""
        self.context = context
        self.share = (needed - context) / self._estimate(settings).peak_bytes

    def confirmed(self, settings: dict[str, Any], confirm: bool) -> Change:
        """The change, its peak taken from a full trace; with shorter rows, should the estimate have been too low."""
        if not confirm:
            return Change(settings, self.needed(settings), False)
        for _ in range(CONFIRMATIONS):
            needed = self.calibrate(settings)
            if needed <= self.limit:
                return Change(settings, needed, True)
            if length := settings.get(_LENGTH):
                length = max(SHORTEST, min(self.longest(settings), length - step_of(length)))
                settings = {**settings, _LENGTH: length}
        return Change(settings, needed, False)

    # Lengths

    def longest(self, settings: Mapping[str, Any]) -> int:
        """The longest rows that fit; 0 where not even SHORTEST tokens do."""
        config = self.of(settings)
        rows, checkpointing = config.training.per_device_train_batch_size, config.training.gradient_checkpointing
        text = self.model_config.get_text_config()
        top = max(self.shape.length, getattr(text, "max_position_embeddings", None) or UNBOUNDED)
        length, slope = longest_length(
            lambda length: self.needed({**settings, _LENGTH: length}),
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

    def options(self) -> Iterator[Option]:
        """All rows of the table, but for those that the model does not allow."""
        for checkpointing in (True, False):
            if self.possible({_CHECKPOINTING: checkpointing}):
                yield from self._lengths(checkpointing)
        for group, choices in _ALTERNATIVES.items():
            options = [self.option(group, settings) for settings in choices if self.possible(settings)]
            if not any(option.asked for option in options):
                section, _, key = group.partition(".")
                yield self.option(group, {group: getattr(getattr(self.config, section), key)})
            yield from options

    def _lengths(self, checkpointing: bool) -> Iterator[Option]:
        tokens = self.shape.rows * self.shape.length
        for rows in sorted({*BATCH_SIZES, self.shape.rows}):
            start = max(SHORTEST, tokens // rows)
            settings = {_CHECKPOINTING: checkpointing, _ROWS: rows}
            length = self.longest({**settings, _LENGTH: start})
            if length:
                tokens = rows * length
                yield self.option("length", {**settings, _LENGTH: length})
            else:
                shortest = self.option("length", {**settings, _LENGTH: SHORTEST})
                yield Option("length", settings, rows, 0, shortest.peak_bytes, False, shortest.speed)

    # What to change

    def what_fits(self) -> tuple[bool, dict[str, Any]]:
        """The first change that makes the configuration fit: one if one is enough, else several on top of one another.
        False where all together, which are then returned, do not."""
        for kind in _KINDS:
            for settings in kind(self, {}):
                if self.possible(settings) and self.needed(settings) <= self.limit:
                    return True, settings
        together: dict[str, Any] = {}
        for kind in _KINDS:
            last = {}
            for settings in kind(self, together):
                if self.possible({**together, **settings}):
                    last = settings
                    if self.needed({**together, **last}) <= self.limit:
                        return True, {**together, **last}
            together |= last
        return False, together

    def checkpointing(self, _settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if not self.config.training.gradient_checkpointing:
            yield {_CHECKPOINTING: True}

    def optimizer(self, _settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if self.config.training.optim == "adamw":
            yield {_OPTIM: "adamw_8bit"}

    def fewer_rows(self, _settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        rows, accumulated = self.shape.rows, self.config.training.gradient_accumulation_steps
        while rows > 1:  # the rows of an optimizer step stay as many
            by = 2 if rows % 2 == 0 else rows
            rows, accumulated = rows // by, accumulated * by
            yield {_ROWS: rows, _ACCUMULATION: accumulated}

    def quantization(self, _settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if self.config.model.quantization in ("int8", "none"):
            yield {_QUANTIZATION: "nf4"}

    def shorter_rows(self, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        length = self.longest(settings)
        if self.shape.length > SHORTEST:
            yield {_LENGTH: length or SHORTEST}

    def lower_rank(self, _settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        rank = self.config.adapter.r
        while rank // 2 >= RANKS[0]:
            rank //= 2
            yield {_RANK: rank}


# In this order, the least harmful to the result first.
_KINDS = (
    _Search.checkpointing, _Search.optimizer, _Search.fewer_rows, _Search.quantization, _Search.shorter_rows,
    _Search.lower_rank,
)  # fmt: skip

# One key at a time, whatever else was asked for.
_ALTERNATIVES: dict[str, list[dict[str, Any]]] = {
    _RANK: [{_RANK: rank} for rank in RANKS],
    _QUANTIZATION: [
        {_QUANTIZATION: "nf4", _DOUBLE: True}, {_QUANTIZATION: "nf4", _DOUBLE: False}, {_QUANTIZATION: "int8"},
        {_QUANTIZATION: "none"},
    ],
    _OPTIM: [{_OPTIM: optimizer} for optimizer in OPTIMIZERS],
}  # fmt: skip
