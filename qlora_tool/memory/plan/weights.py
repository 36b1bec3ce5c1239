"""`model.weights: auto`: where a base lies that the device has not the memory for.

All of it stays on the device where it fits. If not, layers are streamed from host memory, or from the disk on a CPU and
where the host has not the room, and as many of the first layers as the device has memory for stay on it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_tool.build.setup import base_is_kept, can_be_kept
from qlora_tool.config import with_values
from qlora_tool.errors import UserError
from qlora_tool.files.cache import lacking_room
from qlora_tool.memory.allocator.target import device_of
from qlora_tool.memory.breakdown import Breakdown
from qlora_tool.memory.plan.cached import cached
from qlora_tool.memory.plan.changes import CHECKPOINTING, RESIDENT, WEIGHTS
from qlora_tool.memory.plan.meanwhile import Meanwhile
from qlora_tool.memory.profile import Prediction
from qlora_tool.memory.trace.extrapolate import predict_deep
from qlora_tool.memory.trace.predict import BatchShape, Untraceable
from qlora_tool.model.layer_stack import layer_stack
from qlora_tool.model.slots import Quantization
from qlora_tool.ops.free_memory import free_bytes
from qlora_tool.sizes import memory_size

if TYPE_CHECKING:
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
            f"layers come from {place}, {memory_size(self.moved_bytes)} in each pass (forward, backward); to choose it "
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
        None where the configuration says how they are held, or it does not fit like this either.
    """
    trains_base = config.adapter.methods[config.adapter.method].trains_base
    if config.model.weights != "auto" or config.training.sharding != "none" or trains_base:
        return None
    layers = layer_stack(model_config, config.model.trust_remote_code, Quantization.of(config.model)).layers
    for place in ("host", "disk") if target is not None else ("disk",):
        run = _Place(config, model_config, shape, compute_dtype, target, place, layers)
        most = Meanwhile(run.with_resident, run.most)
        try:
            least = run.with_resident(0)
            reason = run.obstacle(least.predicted, here)
        except (UserError, Untraceable) as error:
            reason = str(error)
        if reason:
            logger.info("model.weights: auto: not %s: %s", place, reason)
        elif least.predicted.needed_bytes <= limit_bytes:
            return run.within(limit_bytes, least, most)
    return None


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

    def obstacle(self, least: Breakdown, here: bool) -> str:
        """Why layers cannot come from there, all of them in `least`; empty where they can."""
        if self.place == "disk" and not can_be_kept(self.config, self.model_config):
            return "this adapter brings a base of its own, which is not kept on the disk"
        if not least.elsewhere:
            return "no layer of it can be streamed"
        if not here:
            return ""
        free = int(free_bytes(torch.device("cpu")) * (1 - SPARE))
        if (needed := least.elsewhere["host_bytes"]) > free:
            return f"that takes {memory_size(needed)} of host memory, of which {memory_size(free)} are free"
        if self.place == "host" or base_is_kept(self.config, self.model_config, self.compute_dtype):
            return ""
        # The file holds what stays on the device, too.
        return lacking_room(least.elsewhere["disk_bytes"] + least.at_peak["other_weights"])

    @property
    def most(self) -> int:
        """Layers that can be on the device while others are streamed."""
        return max(0, self.layers - FEWEST_STREAMED)

    def within(self, limit: int, least: Placed, most: Meanwhile[Placed]) -> Placed:
        """As many layers resident as fit, where all of them streamed do.

        Args:
            least, most: with none of them resident, and with as many as can be.
        """
        resident = self.most
        more = most.result().predicted.needed_bytes if resident else least.predicted.needed_bytes
        layer = max(1, (more - least.predicted.needed_bytes) // max(1, resident))
        resident = min((limit - least.predicted.needed_bytes) // layer, resident)
        for _ in range(CONFIRMATIONS):
            if resident < 1:
                break
            placed = self.with_resident(resident)
            above = placed.predicted.needed_bytes - limit
            if above <= 0:
                return placed
            resident -= -(-above // layer)
        return least

    def with_resident(self, resident: int) -> Placed:
        """The run with so many layers on the device."""
        values = {WEIGHTS: self.place, RESIDENT: resident}
        if self.config.training.gradient_checkpointing == "auto":
            values[CHECKPOINTING] = True
        config = with_values(self.config, values)
        run = config, self.model_config, self.shape, self.compute_dtype
        predicted = cached(
            Breakdown, lambda: Prediction.of(predict_deep(*run, target=device_of(self.target)), self.target).breakdown,
            run, self.target,
        )  # fmt: skip
        return Placed(config, predicted, self.layers)
