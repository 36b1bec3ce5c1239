"""What a run may take of a device: one number, by one name, wherever it is shown, planned with or refused by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_tool.config import parse_size
from qlora_tool.memory.allocator.available import margin_on, usable
from qlora_tool.memory.allocator.cards import CARDS, Budget, Card, estimate_total
from qlora_tool.memory.show.legend import limit
from qlora_tool.sizes import memory_size

if TYPE_CHECKING:
    from qlora_tool.config import Config

MAX_MEMORY = "training.max_memory"
_FREE_STEP = 100_000_000  # bytes
_USUAL_GB = (6, 8, 12, 16, 24, 32, 48, 80)  # that cards are mostly sold with


@dataclass(frozen=True)
class Limit:
    """The most that a run may take.

    Attributes:
        bytes: that much.
        name: what that is, in words: `95% of rtx-4090's 23.52 GiB`, `training.max_memory`; empty where just so many
            bytes were given.
    """

    bytes: int
    name: str = ""

    def __str__(self) -> str:
        return limit(self.bytes, self.name)


def card_of(budget: Budget | None) -> Card | None:
    """The card of the table that a budget names."""
    return next((card for card in CARDS if budget and card.name == budget.name), None)


def limit_on(
    config: Config, device: str, budget: Budget | None = None, free: int | None = None, *, steady: bool = False,
    processes: int = 1,
) -> Limit | None:  # fmt: skip
    """What a run may take: of a device all but the margin that stays free on it, and at most `training.max_memory`
    where `gradient_checkpointing: auto` or `model.weights: auto` has to stay within that.

    Args:
        device: cuda or cpu.
        budget: a device that is named.
        free: bytes that are free on the one that is here, in the place of `budget`.
        steady: whether those are rounded down, as what is free differs a little each time.
        processes: that share a named device, where that is a CPU; each has a card of its own.

    Returns:
        The least of the limits; None where there is none.
    """
    margin = margin_on(device)
    share = f"{1 - margin:.0%} of " if margin else ""
    limits = []
    if budget is not None:
        size = memory_size(budget.bytes)
        if card_of(budget):
            name = f"{share}{budget.name}'s {size}"
        elif budget.estimated:
            name = f"{share}the {size} of {budget.name}"
        else:
            name = f"{share}{size}" if margin else ""
        usable_bytes = usable(budget.bytes, margin)
        if device == "cpu" and processes > 1:
            usable_bytes, name = usable_bytes // processes, f"a share of {size}, for each of {processes} processes"
        limits.append(Limit(usable_bytes, name))
    elif free is not None:
        step = _FREE_STEP if steady else 1
        name = f"{share or 'all of '}the {memory_size(free)} free on {device}"
        limits.append(Limit(usable(free, margin) // step * step, name))
    left_to_it = "auto" in (config.training.gradient_checkpointing, config.model.weights)
    if config.training.max_memory is not None and left_to_it:
        limits.append(Limit(parse_size(config.training.max_memory), MAX_MEMORY))
    return min(limits, key=lambda found: found.bytes, default=None)


def without_limit(needed: int, device: str) -> str:
    """What to say of a run for which there is no limit: why there is no yes or no, and what gives one.

    Args:
        needed: bytes.
        device: cuda or cpu.
    """
    said = f"{memory_size(needed)} needed, and no size was given to hold it against"
    if device == "cpu":
        return f"{said}: for a yes or no add --device-memory 16GiB"
    size = next((gb for gb in _USUAL_GB if usable(estimate_total(gb), margin_on(device)) >= needed), None)
    if size is None:
        return f"{said}: a card of {_USUAL_GB[-1]} GB, the largest that is usual, has less"
    return f"{said}: for a yes or no add --device-memory {size}GB (the smallest usual card that it fits)"
