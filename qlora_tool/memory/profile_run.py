"""What `profile-memory` does: a run predicted for a device, within what the device has, and a plan where asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.config import Config, with_values
from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.cards import CARDS, Budget, Card
from qlora_tool.memory.plan.budget import choose_for_profile
from qlora_tool.memory.plan.search import Plan, plan
from qlora_tool.memory.profile import Profile, compute_dtype_on, model_config_of, profile, refuse_small_budget

if TYPE_CHECKING:
    from qlora_tool.memory.breakdown import Breakdown


@dataclass(frozen=True, kw_only=True)
class MemoryProfile(Profile):
    """Where every byte of a run goes.

    Attributes:
        config: of the run, as it was predicted.
        budget: what must suffice, where that was said.
        plan: what fits into it, where that was asked for.
    """

    config: Config
    budget: Budget | None = None
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
        """Whether the run fits into the budget; None without one, or without a prediction."""
        known = self.budget is not None and self.report.predicted is not None
        return self.predicted.needed_bytes <= self.budget.bytes if known else None

    @property
    def budget_bytes(self) -> int | None:
        """What the device can give, in bytes."""
        return self.budget.bytes if self.budget else None

    @property
    def budget_name(self) -> str:
        """What to call the device, empty for one that was given as a number of bytes."""
        named = self.budget and (self.budget.estimated or _card_of(self.budget))
        return self.budget.name if self.budget and named else ""


class NothingFits(UserError):
    """No configuration that was tried fits; `profile` has the plan that says so."""

    def __init__(self, profile: MemoryProfile, misses_by: int):
        super().__init__(
            f"--device-memory: the smallest configuration that was tried takes {misses_by / 1e6:.1f} MB too much; take "
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
) -> MemoryProfile:
    """Predict a run, and measure it too where asked for; `gradient_checkpointing: auto` is decided by the budget.

    Args:
        device: cuda or cpu.
        budget: what must suffice; None: what is free on the card that is here, if any.
        calibrate: first measure the card that is here, and cache what was found.
        may_change: a budget that the weights alone exceed is not a fault, as a plan may find another quantization.

    Raises:
        UserError: the weights alone exceed the budget; and see `profile`.
    """
    if calibrate:
        from qlora_tool.memory.allocator.calibrate import calibrate as measure_card

        measure_card()
    card = _card_of(budget)
    choice = choose_for_profile(config, device, card, budget.bytes if budget else None)
    if choice is None and config.training.gradient_checkpointing == "auto":
        config = with_values(config, {"training.gradient_checkpointing": True})
    recomputation = choice.recomputation if choice else None
    found = profile(config, device, measure=measure, card=card, recomputation=recomputation)
    profiled = MemoryProfile(**vars(found), config=config, budget=budget)
    if budget is None:
        return profiled
    if not may_change:
        refuse_small_budget(profiled, budget.bytes, profiled.budget_name)
    if budget.estimated:
        profiled = replace(profiled, estimated=(*found.estimated, "what the driver keeps of the card"))
    return profiled


def planned(profiled: MemoryProfile) -> MemoryProfile:
    """The same with a plan: what fits into the budget, which there must be, and what to change where the run does not.

    Raises:
        NothingFits: no configuration does.
    """
    assert profiled.budget is not None
    config, device = profiled.config, profiled.report.device
    dtype = compute_dtype_on(config, device, _card_of(profiled.budget))
    found = plan(config, model_config_of(config), profiled.budget.bytes, dtype, profiled.target)
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
    from qlora_tool.memory.show.plot import write_png

    if not profiled.timelines:
        raise UserError(f"--plot {file}: nothing to draw, as this model's step cannot be traced; add --measure")
    title, limits = profiled.config.model.name_or_path, (profiled.budget_bytes, profiled.budget_name)
    if file.suffix == ".png":
        write_png(file, profiled.timelines, profiled.report, budget=limits[0], budget_name=limits[1], title=title)
    else:
        write_html(file, profiled.timelines, profiled.report, budget=limits[0], budget_name=limits[1], title=title,
                   unquantized=profiled.unquantized)  # fmt: skip


def _card_of(budget: Budget | None) -> Card | None:
    """The card of the table that a budget names."""
    return next((card for card in CARDS if budget and card.name == budget.name), None)
