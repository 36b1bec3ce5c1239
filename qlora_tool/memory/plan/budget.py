"""`gradient_checkpointing: auto`: what is stored from forward to backward, as much as a budget allows.

Storing the activations of a layer, or of its attention or MLP, costs bytes and saves floating point operations, and
shallow models tell how many: one trace for each choice there is. The dearest recomputation per byte is avoided first,
in the last layers first: backward begins there, so what is stored there is gone before other layers are computed again.
What comes out is confirmed by a full prediction, and what that shows too much is taken back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.build import resolve as resolve_run
from qlora_tool.config import parse_size, with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.available import available_bytes, margin_on, usable
from qlora_tool.memory.allocator.target import CudaTarget, device_of, target_on
from qlora_tool.memory.breakdown import Breakdown
from qlora_tool.memory.plan.cached import cached
from qlora_tool.memory.profile import Prediction, compute_dtype_on, model_config_of
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.predict import BatchShape, Untraceable, predict
from qlora_tool.memory.trace.recomputation_cost import Cost, Costs
from qlora_tool.model.checkpointing import Recomputation

if TYPE_CHECKING:
    from qlora_tool.build import Setup
    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.cards import Card

logger = logging.getLogger(__name__)

CONFIRMATIONS = 4  # full predictions at most, but for one of everything recomputed
MIN_GAIN = 0.02  # of all recomputation: what another full prediction must promise to save
_FREE_STEP = 100_000_000  # bytes: what is free differs a little each time, and the choice should not


@dataclass(frozen=True)
class Choice:
    """What is recomputed, so that the run stays within a budget.

    Attributes:
        predicted: the memory of the run then, by a full prediction.
        budget_bytes: what it stays within.
    """

    recomputation: Recomputation
    predicted: Breakdown
    budget_bytes: int

    def to_json(self) -> dict[str, Any]:
        recomputed = self.recomputation.layers
        return {"recomputed": recomputed, "predicted": self.predicted.to_json(), "budget_bytes": self.budget_bytes}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Choice:
        layers = tuple(tuple(str(child) for child in children) for children in values["recomputed"])
        return cls(Recomputation(layers), Breakdown.from_json(values["predicted"]), int(values["budget_bytes"]))

    def __str__(self) -> str:
        peak, budget = (f"{size / 1e9:.2f} GB" for size in (self.predicted.needed_bytes, self.budget_bytes))
        return f"gradient checkpointing: {self.recomputation}; predicted peak {peak} of {budget}"


class BudgetTooSmall(UserError):
    """A run takes more than it may, even with everything recomputed."""


def budget_of(config: Config, available: int | None) -> int | None:
    """What `auto` stays within: `max_memory`, and a margin below what the card has `available`.

    None where neither is known, as on a CPU, which is shared and may swap: everything is recomputed there then.
    """
    limits = []
    if config.training.max_memory is not None:
        limits.append(parse_size(config.training.max_memory))
    if available is not None:
        limits.append(usable(available, margin_on("cuda")) // _FREE_STEP * _FREE_STEP)
    return min(limits, default=None)


def choose_for_run(setup: Setup, shape: BatchShape) -> Choice | None:
    """What a run recomputes, by the shape of its largest batch; None where the configuration says it, or no budget is
    known.

    Raises:
        BudgetTooSmall: the budget is too small even with everything recomputed.
    """
    config, device = setup.config, setup.device
    if config.training.gradient_checkpointing != "auto":
        return None
    budget = budget_of(config, _available_on_card(device) if device.type == "cuda" else None)
    if budget is None:
        return None
    choice = choose(config, setup.model_config, shape, setup.compute_dtype, budget, target_on(device.type))
    logger.info("%s", choice)
    return choice


def _available_on_card(device: torch.device) -> int:
    return available_bytes(device, CudaTarget.of(None).context_bytes)


def choose_for_profile(config: Config, device: str, card: Card | None, device_bytes: int | None) -> Choice | None:
    """The same for `profile-memory`, which assumes full batches.

    Args:
        device: cpu or cuda.
        card: to predict for; None: the one that is here, if any.
        device_bytes: what the device has; None: what is free on the card that is here.
    """
    if config.training.gradient_checkpointing != "auto":
        return None
    available = device_bytes if device == "cuda" else None
    if device == "cuda" and available is None and torch.cuda.is_available():
        available = _available_on_card(torch.device("cuda"))
    budget = budget_of(config, available)
    if budget is None:
        return None
    dtype, target = compute_dtype_on(config, device, card), target_on(device, card)
    model_config = model_config_of(config)
    config = resolve_run(config, model_config, device, dtype)
    try:
        choice = choose(config, model_config, BatchShape.assumed(config, model_config), dtype, budget, target)
    except BudgetTooSmall as error:
        logger.warning("%s", error)
        return None
    except Untraceable:  # which `profile` tells
        return None
    logger.info("%s", choice)
    return choice


def choose(
    config: Config,
    model_config,
    shape: BatchShape,
    compute_dtype: torch.dtype,
    budget_bytes: int,
    target: CudaTarget | None = None,
) -> Choice:
    """What to recompute so that a run stays within `budget_bytes`, and is as fast as it can be then; cached.

    Args:
        shape: of the largest batch.
        target: the card it is for; None: a CPU.

    Raises:
        BudgetTooSmall: even with everything recomputed it takes more.
        UserError: the model cannot be traced.
    """
    config = with_values(config, {"training.gradient_checkpointing": True})
    run = config, model_config, shape, compute_dtype
    return cached(Choice, _Chooser(*run, budget_bytes, target).choose, run, target, budget_bytes)


@dataclass
class _Chooser:
    """Looks for what saves the most within the budget.

    Attributes:
        error: by how much the last full prediction was above its estimate.
    """

    config: Config
    model_config: Any
    shape: BatchShape
    compute_dtype: torch.dtype
    budget_bytes: int
    target: CudaTarget | None
    error: int = 0

    def choose(self) -> Choice:
        best, flops = None, math.inf
        for _ in range(CONFIRMATIONS):
            chosen = self._within_budget()
            if sum(cost.flops for cost in chosen) > flops - MIN_GAIN * sum(cost.flops for cost in self.costs.least):
                break  # nothing better than what is known to fit
            predicted = self._predict(chosen)
            if predicted.needed_bytes <= self.budget_bytes:
                best, flops = self._choice(chosen, predicted), sum(cost.flops for cost in chosen)
            elif chosen == self.costs.least:
                self._refuse(predicted)
        if best is None:
            predicted = self._predict(self.costs.least)
            if predicted.needed_bytes > self.budget_bytes:
                self._refuse(predicted)
            best = self._choice(self.costs.least, predicted)
        return best

    def _within_budget(self) -> list[Cost]:
        """The dearest recomputation per byte saved first; of a layer for which the budget has not enough left, less."""
        chosen = list(self.costs.least)
        for number, then in self.costs.steps:
            now = chosen[number]
            options = [cost for cost in self.costs.layers[number] if then.flops <= cost.flops < now.flops]
            for chosen[number] in sorted(options, key=lambda cost: cost.flops):
                if self._estimate(chosen) <= self.budget_bytes:
                    break
            else:
                chosen[number] = now
        return chosen

    def _choice(self, chosen: Sequence[Cost], predicted: Breakdown) -> Choice:
        return Choice(_policy(chosen), predicted, self.budget_bytes)

    def _refuse(self, least: Breakdown) -> None:
        rows, length = self.shape.rows, self.shape.length
        recomputed = "with everything recomputed" if self.costs.layers else "and no layer of it can be recomputed"
        source = "what the card has free" if self.config.training.max_memory is None else "training.max_memory"
        raise BudgetTooSmall(
            f"{self.budget_bytes / 1e9:.2f} GB are given to this run ({source}), but it takes at least "
            f"{least.needed_bytes / 1e9:.2f} GB, {recomputed} (batches of up to {rows} × {length} tokens); lower "
            "training.per_device_train_batch_size (and raise training.gradient_accumulation_steps) or data.max_length, "
            "or give more"
        )

    @cached_property
    def costs(self) -> Costs:
        return Costs.of(self.config, self.model_config, self.shape, self.compute_dtype, self.target)

    def _predict(self, chosen: Sequence[Cost]) -> Breakdown:
        """By a full prediction; later estimates follow it."""
        run = self.config, self.model_config, self.shape, self.compute_dtype
        trace = predict(*run, _policy(chosen), device_of(self.target))
        found = Prediction.of(trace, self.target).breakdown
        self.error += found.needed_bytes - self._estimate(chosen)
        return found

    def _estimate(self, chosen: Sequence[Cost]) -> int:
        return self._on_device(self.costs.peak(chosen)) + self.error

    def _on_device(self, allocated: int) -> int:
        """What the device has to give where so much is allocated."""
        if self.target is None:
            return allocated
        context, share = self._overhead
        return context + int(allocated * share)

    @cached_property
    def _overhead(self) -> tuple[int, float]:
        """The device's context, and the bytes that its allocator holds for each one that a CPU's would."""
        shallow = Prediction.of(self.costs.shallow, self.target).breakdown
        context = shallow.context_bytes or 0
        return context, (shallow.needed_bytes - context) / timeline(self.costs.shallow).peak_bytes


def _policy(chosen: Sequence[Cost]) -> Recomputation:
    return Recomputation(tuple(cost.recomputed for cost in chosen))
