"""What fits into a device's memory, how fast it is, and what to change where the asked configuration does not fit.

The search runs on `estimate_peak`; what it answers is then confirmed by a full trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import yaml

from qlora_tool.config import with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.extrapolate import estimate_peak, resized, timeline_on
from qlora_tool.memory.plan_length import longest_length, step_of
from qlora_tool.memory.plan_table import render_plan
from qlora_tool.memory.predict import BatchShape, predict

if TYPE_CHECKING:
    from qlora_tool.config import Config

__all__ = ["Change", "Option", "Plan", "plan", "relative_speed", "render_plan"]

BATCH_SIZES = (1, 2, 4, 8)
RANKS = (8, 16, 32, 64)
QUANTIZATIONS = (("nf4", True), ("nf4", False), ("int8", True), ("none", True))  # the second: double_quant
OPTIMIZERS = ("adamw", "adamw_8bit")
SHORTEST = 64  # tokens: shorter rows are not suggested
UNBOUNDED = 131072  # tokens: how far lengths are tried where the model names no limit
CUDA_MARGIN = 0.05  # reserved memory is modelled, and not yet held against enough cards
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
        change: what makes the asked configuration fit, where it does not.
        smallest_bytes: what the least of all configurations takes, where there is no such change.
        weights_bytes: what weights, adapters and masters of that one, or of the asked one, take alone.
    """

    device: str
    budget_bytes: int
    margin: float
    asked: Option
    options: tuple[Option, ...]
    longest: Change | None = None
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


def usable(budget_bytes: int, margin: float) -> int:
    return int(budget_bytes * (1 - margin))


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
        margin: share of the budget to keep free; by default none on a CPU, CUDA_MARGIN on CUDA.
        shape: the kind of batch that is asked for; by default full rows of `max_length` tokens, all of them trained.
        confirm: trace the answer at the model's full depth. Takes as long as a prediction.

    Raises:
        UserError: the model cannot be traced as it is asked for.
    """
    if config.training.gradient_checkpointing == "auto":
        config = with_values(config, {_CHECKPOINTING: True})
    margin = (CUDA_MARGIN if device == "cuda" else 0.0) if margin is None else margin
    shape = shape or BatchShape.full(config.training.per_device_train_batch_size, config.data.max_length)
    config = with_values(config, {_ROWS: shape.rows, _LENGTH: shape.length})
    search = _Search(config, model_config, usable(budget_bytes, margin), compute_dtype, device, shape)
    if device != "cpu":
        search.calibrate({})
    asked = search.option("asked", {})
    longest = change = None
    smallest = weights = 0
    if asked.fits:
        length = search.longest({})
        if length > shape.length:
            longest = search.confirmed({_LENGTH: length}, confirm)
        weights = search.weights({})
    else:
        settings, everything = search.what_fits()
        if settings:
            change = search.confirmed(settings, confirm)
        else:
            smallest, weights = search.needed(everything), search.weights(everything)
    return Plan(device, budget_bytes, margin, asked, tuple(search.options()), longest, change, smallest, weights)


@dataclass
class _Search:
    """Looks for what fits. Settings are what differs from the asked configuration.

    Attributes:
        limit: bytes that may be used.
        context: bytes that the device takes for itself.
        share: bytes that it holds for every one that is allocated; seen in full traces.
    """

    config: Config
    model_config: Any
    limit: int
    compute_dtype: torch.dtype
    device: str
    shape: BatchShape
    context: int = 0
    share: float = 1.0
    _slopes: dict[bool, float] = field(default_factory=dict)  # bytes a token, by checkpointing

    def of(self, settings: Mapping[str, Any]) -> Config:
        return with_values(self.config, settings)

    def _shape(self, config: Config) -> BatchShape:
        return resized(self.shape, config.training.per_device_train_batch_size, config.data.max_length)

    def _estimate(self, settings: Mapping[str, Any]):
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
        trace = predict(config, self.model_config, self._shape(config), self.compute_dtype)
        if self.device == "cpu":
            held = timeline_on(trace, "cpu").peak_bytes
        else:
            from qlora_tool.memory.cuda import cuda_timeline

            seen = cuda_timeline(trace)
            held, self.context = seen.reserved_peak, seen.context_bytes
        self.share = held / self._estimate(settings).peak_bytes
        return held + self.context

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

    def option(self, group: str, settings: dict[str, Any], asked: bool = False) -> Option:
        config = self.of(settings)
        needed = self.needed(settings)
        return Option(
            group, settings, config.training.per_device_train_batch_size, config.data.max_length, needed,
            needed <= self.limit, relative_speed(config, self.config), asked or config == self.config,
        )  # fmt: skip

    def options(self) -> Iterator[Option]:
        """All rows of the table, but for those that the model does not allow."""
        for checkpointing in (True, False):
            if self.possible({_CHECKPOINTING: checkpointing}):
                yield from self._lengths(checkpointing)
        for group, settings in _ALTERNATIVES:
            if self.possible(settings):
                yield self.option(group, settings)

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

    def what_fits(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first change that makes the configuration fit, one if one is enough, else several on top of one another;
        empty where all together do not. And those that were put together last: the least that it can take."""
        for kind in _KINDS:
            for settings in kind(self, {}):
                if self.possible(settings) and self.needed(settings) <= self.limit:
                    return settings, settings
        together: dict[str, Any] = {}
        for kind in _KINDS:
            last = {}
            for settings in kind(self, together):
                if self.possible({**together, **settings}):
                    last = settings
                    if self.needed({**together, **last}) <= self.limit:
                        return {**together, **last}, {**together, **last}
            together |= last
        return {}, together

    def checkpointing(self, _settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if not self.config.training.gradient_checkpointing:
            yield {_CHECKPOINTING: True}

    def optimizer(self, _settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if self.config.training.optim == "adamw":
            yield {_OPTIM: "adamw_8bit"}

    def fewer_rows(self, _settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        rows, accumulated = self.shape.rows, self.config.training.gradient_accumulation_steps
        while rows > 1 and rows % 2 == 0:
            rows, accumulated = rows // 2, accumulated * 2
            yield {_ROWS: rows, _ACCUMULATION: accumulated}

    def quantization(self, _settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if self.config.model.quantization in ("int8", "none"):
            yield {_QUANTIZATION: "nf4"}

    def shorter_rows(self, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        length = self.longest(settings)
        if SHORTEST < self.shape.length:
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

_ALTERNATIVES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((_RANK, {_RANK: rank}) for rank in RANKS),
    *((_QUANTIZATION, {_QUANTIZATION: kind, _DOUBLE: double}) for kind, double in QUANTIZATIONS),
    *((_OPTIM, {_OPTIM: optimizer}) for optimizer in OPTIMIZERS),
)
