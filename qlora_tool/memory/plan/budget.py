"""`gradient_checkpointing: auto`: what is stored from forward to backward, as much as a budget allows.

Storing the activations of a layer, or of its attention or MLP, costs bytes and saves floating point operations, and
shallow models tell how many: one trace for each choice there is. The dearest recomputation per byte is avoided first,
in the last layers first: backward begins there, so what is stored there is gone before other layers are computed again.
What comes out is confirmed by a full prediction, and what that shows too much is taken back. Where room is left for the
weights of one layer, those that a recomputation dequantizes are kept for its gradients (1 % of a step on a card).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.build.resolve import resolve as resolve_run
from qlora_tool.config import with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.available import available_bytes
from qlora_tool.memory.allocator.target import CudaTarget, device_of, target_on
from qlora_tool.memory.breakdown import Breakdown
from qlora_tool.memory.plan.cached import cached
from qlora_tool.memory.plan.cure import cure
from qlora_tool.memory.plan.limit import MAX_MEMORY, Limit, limit_on
from qlora_tool.memory.plan.meanwhile import Meanwhile
from qlora_tool.memory.profile import Prediction, compute_dtype_on, model_config_of
from qlora_tool.memory.trace.classify import timeline
from qlora_tool.memory.trace.extrapolate import estimate_peak, predict_deep
from qlora_tool.memory.trace.predict import BatchShape, Untraceable
from qlora_tool.memory.trace.recomputation_cost import Cost, Costs, Shallow, seen_choices
from qlora_tool.model.checkpointing import NOTHING_RECOMPUTED, Recomputation
from qlora_tool.sizes import memory_size

if TYPE_CHECKING:
    from qlora_tool.build.setup import Setup
    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.cards import Card

logger = logging.getLogger(__name__)

CONFIRMATIONS = 4  # full predictions at most, but for one of everything recomputed
MIN_GAIN = 0.02  # of all recomputation: what another full prediction must promise to save


@dataclass(frozen=True)
class Choice:
    """What is recomputed, so that the run stays within a budget.

    Attributes:
        predicted: the memory of the run then, by a full prediction.
        budget_bytes: what it stays within.
        share: of all operations that recomputing everything takes, those that this takes.
        prediction: that prediction itself, unless it was made earlier and only its sums are known.
    """

    recomputation: Recomputation
    predicted: Breakdown
    budget_bytes: int
    share: float = 1.0
    prediction: Prediction | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "recomputed": self.recomputation.layers,
            "keeps_weights": self.recomputation.keeps_weights,
            "predicted": self.predicted.to_json(),
            "budget_bytes": self.budget_bytes,
            "share": self.share,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Choice:
        layers = tuple(tuple(str(child) for child in children) for children in values["recomputed"])
        recomputation = Recomputation(layers, bool(values["keeps_weights"]))
        predicted = Breakdown.from_json(values["predicted"])
        return cls(recomputation, predicted, int(values["budget_bytes"]), float(values["share"]))

    def __str__(self) -> str:
        peak, budget = memory_size(self.predicted.needed_bytes), memory_size(self.budget_bytes)
        return f"gradient checkpointing: {self.recomputation}; predicted peak {peak} of {budget}"


class BudgetTooSmall(UserError):
    """A run takes more than it may, even with everything recomputed.

    Args:
        least: what it takes then.
        how: everything recomputed, or nothing that can be; and for which batch.
        limit: what it may take, in words.
        cure: what to do about it.
    """

    def __init__(self, least: Breakdown, how: str, limit: str, cure: str = ""):
        super().__init__(
            f"training.gradient_checkpointing: auto: this run takes at least {memory_size(least.needed_bytes)}, {how}: "
            f"{limit}{cure and '; '}{cure}"
        )
        self.least, self.how = least, how


def choose_for_run(setup: Setup, shape: BatchShape) -> Choice | None:
    """What a run recomputes, by the shape of its largest batch; None where the configuration says it, or no budget is
    known.

    Raises:
        BudgetTooSmall: the limit is too small even with everything recomputed; with what makes it fit, looked for in a
            few seconds.
    """
    config, device = setup.config, setup.device
    if config.training.gradient_checkpointing != "auto":
        return None
    free = _available_on_card(device) if device.type == "cuda" else None
    limit = limit_on(config, device.type, free=free, steady=True)
    if limit is None:
        return None
    run, target = (config, setup.model_config, shape, setup.compute_dtype), target_on(device.type)
    try:
        choice = choose(*run, limit.bytes, target)
    except BudgetTooSmall as error:
        given = None if limit.name == MAX_MEMORY else free
        what = cure(with_values(config, {"training.gradient_checkpointing": True}), setup.model_config,
                    setup.compute_dtype, target, shape, error.least, limit.bytes, given)  # fmt: skip
        raise BudgetTooSmall(error.least, error.how, str(limit), str(what)) from None
    logger.info("%s", choice)
    return choice


def _available_on_card(device: torch.device) -> int:
    return available_bytes(device, CudaTarget.of(None).context_bytes)


def choose_for_profile(
    config: Config, device: str, card: Card | None, limit: Limit | None, processes: int = 1
) -> Choice | None:
    """The same for `profile-memory`, which assumes full batches.

    Args:
        device: cpu or cuda.
        card: to predict for; None: the one that is here, if any.
        limit: what the run may take; None: what is free on the card that is here.
        processes: that train together.
    """
    if config.training.gradient_checkpointing != "auto":
        return None
    if device == "cuda" and limit is None and torch.cuda.is_available():
        limit = limit_on(config, device, free=_available_on_card(torch.device("cuda")), steady=True)
    if limit is None or (device == "cpu" and config.training.max_memory is None):
        return None  # a CPU is shared and may swap: everything is recomputed there, unless something is asked for
    dtype, target = compute_dtype_on(config, device, card), target_on(device, card)
    model_config = model_config_of(config)
    config = resolve_run(config, model_config, device, dtype)
    shape = BatchShape.assumed(config, model_config, processes)
    try:
        choice = choose(config, model_config, shape, dtype, limit.bytes, target)
    except BudgetTooSmall as error:
        logger.info("%s", BudgetTooSmall(error.least, error.how, str(limit)))
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


def full_prediction(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype, recomputation: Recomputation,
    target: CudaTarget | None,
) -> Prediction:  # fmt: skip
    """What a run takes that recomputes this."""
    run = config, model_config, shape, compute_dtype
    return Prediction.of(predict_deep(*run, recomputation, device_of(target)), target)


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
    _begun: dict[Recomputation, Meanwhile[Prediction]] = field(default_factory=dict)

    def choose(self) -> Choice:
        self._shallow = Shallow.of(self.config, self.model_config, self.compute_dtype)
        self._seen = Meanwhile(seen_choices, self.config, self.shape, self.compute_dtype, self.target, self._shallow)
        if (everything_kept := self._keeping_everything()) is not None:
            return everything_kept
        best, flops = None, math.inf
        for _ in range(CONFIRMATIONS):
            chosen = self._within_budget()
            if sum(cost.flops for cost in chosen) > flops - MIN_GAIN * sum(cost.flops for cost in self.costs.least):
                break  # nothing better than what is known to fit
            predicted = self._predict(chosen)
            if predicted.breakdown.needed_bytes <= self.budget_bytes:
                best, flops = self._choice(chosen, predicted), sum(cost.flops for cost in chosen)
            elif chosen == self.costs.least:
                self._refuse(predicted.breakdown)
        if best is None:
            predicted = self._predict(self.costs.least)
            if predicted.breakdown.needed_bytes > self.budget_bytes:
                self._refuse(predicted.breakdown)
            best = self._choice(self.costs.least, predicted)
        return self._with_kept_weights(best)

    def _keeping_everything(self) -> Choice | None:
        """Nothing recomputed, where that fits: without a look at what else there is. None where it does not, or is not
        expected to."""
        without = with_values(self.config, {"training.gradient_checkpointing": False})
        run = self.model_config, self.shape, self.compute_dtype
        expected = estimate_peak(without, *run, self.target)
        if len(expected.traced_layers) < 2 or expected.peak_bytes > self.budget_bytes:
            return None  # a model that is traced whole takes as long as a look at what else there is
        recomputation = Recomputation((NOTHING_RECOMPUTED,) * self.model_config.get_text_config().num_hidden_layers)
        try:
            predicted = self._full_prediction(recomputation)
        except Untraceable:  # not as many layers as its configuration says can be recomputed
            return None
        if predicted.breakdown.needed_bytes > self.budget_bytes:
            return None
        return Choice(recomputation, predicted.breakdown, self.budget_bytes, 0.0, predicted)

    def _with_kept_weights(self, best: Choice) -> Choice:
        """The same with the weights of recomputed layers kept for their gradients, where the budget has room."""
        if self.config.model.quantization == "none" or not any(best.recomputation.layers):
            return best
        keeping = replace(best.recomputation, keeps_weights=True)
        begun = self._begun.get(keeping)
        predicted = self._full_prediction(keeping) if begun is None else begun.result()
        if predicted.breakdown.needed_bytes > self.budget_bytes:
            return best
        return replace(best, recomputation=keeping, predicted=predicted.breakdown, prediction=predicted)

    def _choice(self, chosen: Sequence[Cost], predicted: Prediction) -> Choice:
        everything = sum(cost.flops for cost in self.costs.least)
        share = sum(cost.flops for cost in chosen) / everything if everything else 0.0
        return Choice(_policy(chosen), predicted.breakdown, self.budget_bytes, share, predicted)

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

    def _refuse(self, least: Breakdown) -> None:
        recomputed = "with everything recomputed" if self.costs.layers else "and no layer of it can be recomputed"
        batch = f"batches of up to {self.shape.rows} × {self.shape.length} tokens"
        raise BudgetTooSmall(least, f"{recomputed} ({batch})", str(Limit(self.budget_bytes)))

    @cached_property
    def costs(self) -> Costs:
        return Costs.of(*self._run, self.target, shallow=self._shallow, seen=self._seen.result)

    def _predict(self, chosen: Sequence[Cost]) -> Prediction:
        """By a full prediction; later estimates follow it. What may be asked next is begun meanwhile."""
        for other in self._begun.values():
            other.let_go()
        keeping = replace(_policy(chosen), keeps_weights=True)
        if self.config.model.quantization != "none" and chosen != self.costs.least:
            self._begun[keeping] = Meanwhile(full_prediction, *self._run, keeping, self.target)
        found = self._full_prediction(_policy(chosen))
        self.error += found.breakdown.needed_bytes - self._estimate(chosen)
        return found

    def _full_prediction(self, recomputation: Recomputation) -> Prediction:
        return full_prediction(*self._run, recomputation, self.target)

    @property
    def _run(self) -> tuple[Config, Any, BatchShape, torch.dtype]:
        return self.config, self.model_config, self.shape, self.compute_dtype

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
