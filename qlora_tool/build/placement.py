"""Where the layers of a frozen base lie: on the device, in host memory or on the disk."""

from __future__ import annotations

from typing import Literal

import torch

from qlora_tool.config import ModelConfig
from qlora_tool.ops.declare import target_of
from qlora_tool.weights.on_card import CudaQueues, Queues

Where = Literal["resident", "host", "disk"]
SAME_ON_CPU = "model.weights: host: the model is in host memory already; all of it stays there"


def on_card(device: torch.device) -> bool:
    """Whether a base on this device is on a card, or meant for one."""
    return target_of(torch.empty(0, device=device)).type == "cuda"


def weights_on(config: ModelConfig, device: torch.device) -> Where:
    """Where the layers lie of a base on a device; `auto` that nothing has decided is resident."""
    if config.weights == "auto" or (config.weights == "host" and not on_card(device)):
        return "resident"
    return config.weights


def queues_of(device: torch.device) -> Queues:
    """The queues of a card, by which weights come to it."""
    return CudaQueues(device)
