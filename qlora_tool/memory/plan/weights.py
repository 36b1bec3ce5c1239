"""`model.weights: auto`: where a base lies that the device has not the memory for.

All of it stays on the device where it fits. If not, layers are streamed from host memory, or from the disk on a CPU and
where the host has not the room, and as many of the first layers as the device has memory for stay on it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_tool.config import with_values
from qlora_tool.errors import UserError
from qlora_tool.files.cache import cache_folder
from qlora_tool.memory.allocator.target import device_of
from qlora_tool.memory.breakdown import Breakdown
from qlora_tool.memory.plan.cached import cached
from qlora_tool.memory.plan.changes import CHECKPOINTING, RESIDENT, WEIGHTS
from qlora_tool.memory.profile import Prediction
from qlora_tool.memory.trace.predict import BatchShape, Untraceable, predict
from qlora_tool.model.layer_stack import layer_stack
from qlora_tool.model.slots import Quantization
from qlora_tool.ops.free_memory import free_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.target import CudaTarget

logger = logging.getLogger(__name__)

CONFIRMATIONS = 3
SPARE = 0.05  # of the host's memory stays free, as `HostLayers` has it
# Layers that are streamed at the least: two of them lie in buffers of the device, where more would save nothing.
FEWEST_STREAMED = 3


@dataclass(frozen=True)
class Placed:
    """Where a base's layers lie, so that its run fits.

    Attributes:
        config: of the run, with that said; whatever can be recomputed is, where that was left to a budget.
        predicted: what the run takes then, by a full prediction.
        layers: of the model.
    """

    config: Config
    predicted: Breakdown
    layers: int

    @property
    def moved_bytes(self) -> int:
        """What comes to the device in each forward and in each backward pass."""
        elsewhere = self.predicted.elsewhere
        return elsewhere["host_bytes" if self.config.model.weights == "host" else "disk_bytes"]

    def __str__(self) -> str:
        model = self.config.model
        place = "host memory" if model.weights == "host" else "the disk"
        return (
            f"model.weights: auto: not all of the base fits, so {self.layers - model.resident_layers} of {self.layers} "
            f"layers come from {place}, {self.moved_bytes / 1e9:.2f} GB in each pass (forward, backward); to choose it "
            f"yourself: --set {WEIGHTS}={model.weights} --set {RESIDENT}={model.resident_layers}"
        )


def place_weights(
    config: Config,
    model_config,
    shape: BatchShape,
    compute_dtype: torch.dtype,
    target: CudaTarget | None,
    limit_bytes: int,
    *,
    here: bool,
) -> Placed | None:
    """Where the layers of a run's base lie that takes more than it may with all of them on the device.

    Args:
        config: the run's, resolved.
        shape: of its largest batch.
        target: the card that it is for; None: a CPU.
        limit_bytes: what it may take.
        here: whether it is for this machine, whose memory and disk must then have the room.

    Returns:
        None where the configuration says where they lie, or it does not fit like this either.
    """
    if config.model.weights != "auto":
        return None
    layers = layer_stack(model_config, config.model.trust_remote_code, Quantization.of(config.model)).layers
    for place in ("host", "disk") if target is not None else ("disk",):
        try:
            placed = _Place(config, model_config, shape, compute_dtype, target, place, layers).within(
                limit_bytes, _has_room if here else lambda _: True)  # fmt: skip
        except (UserError, Untraceable) as error:  # what cannot be streamed stays where it is
            logger.debug("model.weights: %s: %s", place, error)
            continue
        if placed is not None:
            return placed
    return None


def _has_room(predicted: Breakdown) -> bool:
    elsewhere = predicted.elsewhere
    if elsewhere["host_bytes"] > free_bytes(torch.device("cpu")) * (1 - SPARE):
        return False
    return elsewhere["disk_bytes"] <= shutil.disk_usage(_existing(cache_folder())).free


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


@dataclass(frozen=True)
class _Place:
    """A run whose layers come from one place."""

    config: Config
    model_config: object
    shape: BatchShape
    compute_dtype: torch.dtype
    target: CudaTarget | None
    place: str
    layers: int

    def within(self, limit: int, has_room: Callable[[Breakdown], bool]) -> Placed | None:
        """As many layers resident as fit; None where not even all of them streamed do, or there is no room for them."""
        least = self._with(0)
        if least.predicted.needed_bytes > limit or not least.predicted.elsewhere or not has_room(least.predicted):
            return None
        resident = self.layers - FEWEST_STREAMED
        most = self._with(resident) if resident > 0 else least
        layer = max(1, (most.predicted.needed_bytes - least.predicted.needed_bytes) // max(1, resident))
        resident = min((limit - least.predicted.needed_bytes) // layer, resident)
        for _ in range(CONFIRMATIONS):
            if resident < 1:
                break
            placed = self._with(resident)
            above = placed.predicted.needed_bytes - limit
            if above <= 0:
                return placed
            resident -= -(-above // layer)
        return least

    def _with(self, resident: int) -> Placed:
        values = {WEIGHTS: self.place, RESIDENT: resident}
        if self.config.training.gradient_checkpointing == "auto":
            values[CHECKPOINTING] = True
        config = with_values(self.config, values)
        run = config, self.model_config, self.shape, self.compute_dtype
        predicted = cached(
            Breakdown, lambda: Prediction.of(predict(*run, target=device_of(self.target)), self.target).breakdown,
            run, self.target,
        )  # fmt: skip
        return Placed(config, predicted, self.layers)
