"""What `profile-memory` does: a run predicted for a device, within what the device has, and a plan where asked for."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.adapters.calibration import start_tokens
from qlora_tool.build.resolve import resolve
from qlora_tool.collection import without_collection
from qlora_tool.config import Config, with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.cards import Budget
from qlora_tool.memory.plan.budget import Choice, choose_for_profile
from qlora_tool.memory.plan.cure import Cure, cure
from qlora_tool.memory.plan.limit import Limit, card_of, limit_on
from qlora_tool.memory.plan.meanwhile import helped_by
from qlora_tool.memory.plan.planner import plan
from qlora_tool.memory.plan.result import Plan
from qlora_tool.memory.plan.weights import Placed, place_weights
from qlora_tool.memory.profile import Profile, compute_dtype_on, model_config_of, profile, refuse_small_budget
from qlora_tool.memory.trace.predict import BatchShape
from qlora_tool.sizes import memory_size

if TYPE_CHECKING:
    from qlora_tool.memory.allocator.cards import Card
    from qlora_tool.memory.breakdown import Breakdown
    from qlora_tool.workers import Workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MemoryProfile(Profile):
    """Where every byte of a run goes.

    Attributes:
        config: of the run, as it was predicted.
        budget: the device that must suffice, where one was named.
        limit: what the run may take: of the device all but what stays free on it, and `training.max_memory` at most;
            None where nothing limits it.
        choice: what `gradient_checkpointing: auto` recomputes, where that was chosen to stay within the limit.
        change: what to do, in words, where the run does not stay within it; empty where a plan is to say it.
        change_line: of that the options to copy, `--set KEY=VALUE`; empty where there are none.
        plan: what fits into that, where it was asked for.

    Example:
        >>> from qlora_tool import profile_memory
        >>> found = profile_memory("my-run.yaml", device="cuda", device_memory="24GB")
        >>> found.fits, found.budget_name
        (True, '95% of the 23.04 GiB of a card of 24 GB')
        >>> sum(found.predicted.at_peak.values()) == found.predicted.peak_bytes
        True
    """

    config: Config
    budget: Budget | None = None
    limit: Limit | None = None
    choice: Choice | None = None
    change: str = ""
    change_line: str = ""
    plan: Plan | None = None

    @property
    def predicted(self) -> Breakdown:
        """The predicted bytes, in all and by category."""
        assert self.report.predicted is not None
        return self.report.predicted

    @property
    def measured(self) -> Breakdown | None:
        """The measured ones, where that was asked for."""
        return self.report.measured

    @property
    def fits(self) -> bool | None:
        """Whether the run stays within its limit; None without one, or without a prediction."""
        known = self.limit is not None and self.report.predicted is not None
        return self.predicted.needed_bytes <= self.limit.bytes if known else None

    @property
    def start(self) -> str:
        """How the adapters start, by its name."""
        return getattr(self.config.adapter, "init_lora_weights", "")

    @property
    def start_bytes(self) -> int | None:
        """What making the adapters' start takes beside what stays loaded; None where it is drawn, or not traced."""
        line = self.timelines.get("predicted")
        if line is None or start_tokens(self.config, ()) is None:
            return None
        return self.predicted.phase_peak_bytes["load"] - int(line.totals[line.phase_spans()[0].stop - 1])

    @property
    def budget_bytes(self) -> int | None:
        """What the run may take, in bytes."""
        return self.limit.bytes if self.limit else None

    @property
    def budget_name(self) -> str:
        """What that is, in words; empty where just so many bytes were given."""
        return self.limit.name if self.limit else ""

    def to_json(self) -> dict[str, Any]:
        """What `memory.json` holds of a run, what the headline says of it, and the plan where there is one.

        `change` is the options that make it fit; null where it fits, or none were found.
        """
        needed, usable = self.report.predicted and self.predicted.needed_bytes, self.budget_bytes
        line = self.change_line or (self.plan and self.plan.change and self.plan.change.line)
        found = self.report.to_json() | {
            "fits": self.fits,
            "needed_bytes": needed,
            "usable_bytes": usable,
            "left_bytes": None if needed is None or usable is None else usable - needed,
            "change": line or None,
        }
        return found if self.plan is None else found | {"plan": self.plan.to_json()}


class NothingFits(UserError):
    """No configuration that was tried fits; `profile` has the plan that says so."""

    def __init__(self, profile: MemoryProfile, misses_by: int):
        super().__init__(
            f"--device-memory: the smallest configuration that was tried takes {memory_size(misses_by)} too much; take "
            "a smaller model, or a larger device"
        )
        self.profile = profile


def profile_run(
    config: Config,
    device: str,
    budget: Budget | None = None,
    *,
    measure: bool = False,
    calibrate: bool = False,
    may_change: bool = False,
    processes: int = 1,
    workers: Workers | None = None,
) -> MemoryProfile:
    """Predict a run, and measure it too where asked for; `gradient_checkpointing: auto` is decided by the budget.

    Args:
        device: cuda or cpu.
        budget: the device that must suffice; None: what is free on the card that is here, if any.
        calibrate: first measure the card that is here, and cache what was found.
        may_change: a budget that the weights alone exceed is not a fault, as a plan may find another quantization.
        processes: that train together: each on a card like this one, or all on this CPU.
        workers: that call `meanwhile.call`, to predict meanwhile what may be asked next; None: all is predicted here.

    Raises:
        UserError: the weights alone exceed the budget; and see `profile`.
    """
    if calibrate:
        from qlora_tool.memory.allocator.calibrate import calibrate as measure_card

        measure_card()
    # What is measured on this machine is to be as it is in a run.
    with nullcontext() if measure else without_collection(), helped_by(workers):
        return _profiled(config, device, budget, measure=measure, may_change=may_change, processes=processes)


def _profiled(
    config: Config, device: str, budget: Budget | None, *, measure: bool, may_change: bool, processes: int
) -> MemoryProfile:
    card, limit = card_of(budget), limit_on(config, device, budget, processes=processes)
    choice = choose_for_profile(config, device, card, limit, processes)
    if choice is None and config.training.gradient_checkpointing == "auto":
        config = with_values(config, {"training.gradient_checkpointing": True})
    recomputation = choice.recomputation if choice else None
    may_stream = limit is not None and not may_change and config.model.weights == "auto"
    found = profile(config, device, measure=measure and not may_stream, card=card, recomputation=recomputation,
                    prediction=choice.prediction if choice else None, processes=processes)  # fmt: skip
    placed = _placed(config, found, limit, card) if limit is not None and may_stream else None
    if placed is not None:
        logger.warning("%s", placed)
        config, recomputation = placed.config, None
    if placed is not None or (measure and may_stream):
        found = profile(config, device, measure=measure, card=card, recomputation=recomputation, processes=processes)
    profiled = MemoryProfile(**vars(found), config=config, budget=budget, limit=limit, choice=choice)
    if limit is not None and not may_change:
        refuse_small_budget(profiled, limit.bytes, limit.name)
        cured = _cure(profiled, limit, card)
        profiled = replace(profiled, change=cured.words, change_line=cured.line)
    if budget is not None and budget.estimated:
        profiled = replace(profiled, estimated=(*found.estimated, "what the driver keeps of the card"))
    return profiled


def _cure(profiled: MemoryProfile, limit: Limit, card: Card | None) -> Cure:
    """What makes a run fit that does not; empty where it does, or nothing was traced to look with."""
    config, report = profiled.config, profiled.report
    if profiled.fits or report.predicted is None or "predicted" not in profiled.timelines:
        return Cure("")
    model_config, dtype = model_config_of(config), compute_dtype_on(config, report.device, card)
    config = resolve(config, model_config, report.device, dtype)
    shape = BatchShape.assumed(config, model_config, report.processes)
    given = profiled.budget.bytes if profiled.budget else None
    return cure(config, model_config, dtype, profiled.target, shape, report.predicted, limit.bytes, given)


def _placed(config: Config, found: Profile, limit: Limit, card: Card | None) -> Placed | None:
    """Where `model.weights: auto` puts the base of a run that does not fit otherwise; None where it fits, or nothing
    helps."""
    device, predicted = found.report.device, found.report.predicted
    if predicted is None or predicted.needed_bytes <= limit.bytes or "predicted" not in found.timelines:
        return None
    dtype, model_config = compute_dtype_on(config, device, card), model_config_of(config)
    config = resolve(config, model_config, device, dtype)
    shape = BatchShape.assumed(config, model_config, found.report.processes)
    return place_weights(config, model_config, shape, dtype, found.target, limit.bytes, here=False)


def planned(profiled: MemoryProfile, workers: Workers | None = None) -> MemoryProfile:
    """The same with a plan: what fits into the limit, which there must be, and what to change where the run does not.

    Args:
        workers: see `plan`.

    Raises:
        NothingFits: no configuration does.
    """
    assert profiled.limit is not None
    config, device = profiled.config, profiled.report.device
    dtype = compute_dtype_on(config, device, card_of(profiled.budget))
    with without_collection():
        found = plan(config, model_config_of(config), profiled.limit.bytes, dtype, profiled.target, margin=0.0,
                     processes=profiled.report.processes, chosen=profiled.choice, workers=workers)  # fmt: skip
    found = replace(found, budget_name=profiled.limit.name)
    profiled = replace(profiled, plan=found)
    if not found.fits and found.change is None:
        raise NothingFits(profiled, found.misses_by)
    return profiled


def draw(file: Path, profiled: MemoryProfile) -> None:
    """Draw a step's memory over time.

    Args:
        file: its name ends in .png or .html.

    Raises:
        UserError: neither a prediction nor a measurement can be drawn.
    """
    from qlora_tool.memory.show.html import write_html
    from qlora_tool.memory.show.plan_page import plan_section
    from qlora_tool.memory.show.plot import write_png

    if not profiled.timelines:
        raise UserError(f"--plot {file}: nothing to draw, as this model's step cannot be traced; add --measure")
    title, limits = profiled.config.model.name_or_path, (profiled.budget_bytes, profiled.budget_name)
    if file.suffix == ".png":
        write_png(file, profiled.timelines, profiled.report, budget=limits[0], budget_name=limits[1], title=title)
    else:
        found = plan_section(profiled.plan) if profiled.plan else ()
        write_html(file, profiled.timelines, profiled.report, budget=limits[0], budget_name=limits[1], title=title,
                   unquantized=profiled.unquantized, plan=found)  # fmt: skip

