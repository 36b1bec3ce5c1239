"""The card that a prediction is for: one of the table, the one that is here, or one that has to be assumed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.calibrate import Calibration, cached_calibration
from qlora_tool.memory.allocator.cards import Card, find_card
from qlora_tool.memory.allocator.operators import estimated_context
from qlora_tool.ops.declare import CPU, Target

ASSUMED = (8, 9)  # the capability of a card that is neither named nor here: the Ada generation


@dataclass(frozen=True)
class CudaTarget:
    """The card that a prediction is for.

    Attributes:
        capability: its compute capability.
        calibration: what was measured on it; None where nothing was.
        expandable_segments: whether its allocator is told to grow its segments.
        assumed: whether nothing said which card it is, so that its capability is `ASSUMED`.
        tensor_tflops: see `Card`; None where that is not known.
        here: whether it is in this machine.
        multiprocessors: how many it has; None: as many as any known card of its capability.
    """

    capability: tuple[int, int]
    calibration: Calibration | None
    expandable_segments: bool
    assumed: bool = False
    tensor_tflops: float | None = None
    here: bool = False
    multiprocessors: int | None = None

    @classmethod
    def of(cls, card: Card | None) -> CudaTarget:
        """A card of the table, or the one that is here; where there is none, one that is assumed."""
        settings = "".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
        expandable = "expandable_segments:true" in settings.lower()
        if torch.cuda.is_available() and (card is None or _card_here() == card):
            calibration, card = cached_calibration(torch.cuda.get_device_name()), _card_here()
            speed = card.tensor_tflops if card else None
            own = torch.cuda.get_device_properties()
            return cls((own.major, own.minor), calibration, expandable, False, speed, True, own.multi_processor_count)
        if card is None:
            return cls(ASSUMED, None, expandable, True)
        return cls(card.compute_capability, None, expandable, False, card.tensor_tflops,
                   multiprocessors=card.multiprocessors)  # fmt: skip

    @property
    def device(self) -> Target:
        """What a step is meant for that is predicted for the card."""
        return Target("cuda", self.capability)

    @property
    def context_bytes(self) -> int:
        """The CUDA context, measured or estimated."""
        return self.calibration.context_bytes if self.calibration else estimated_context(self.capability)

    def __str__(self) -> str:
        return f"compute capability {'.'.join(map(str, self.capability))}"


def target_on(device: str, card: Card | None = None) -> CudaTarget | None:
    """The card that a prediction for `device` (cuda or cpu) is for: `card`, or the one that is here; None on a CPU."""
    return CudaTarget.of(card) if device == "cuda" else None


def device_of(target: CudaTarget | None) -> Target:
    """What a step is meant for: the card, or a CPU where there is none."""
    return CPU if target is None else target.device


def _card_here() -> Card | None:
    try:
        return find_card(torch.cuda.get_device_name())
    except UserError:  # it is not in the table
        return None
