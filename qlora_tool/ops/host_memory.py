"""A tensor's copy in host memory, as what predicts a card sees it: nothing of the card's memory."""

from __future__ import annotations

import torch

from qlora_tool.ops.declare import declare

to_host = declare(
    "to_host(Tensor tensor) -> Tensor", reference=torch.clone, shapes=torch.empty_like, results_on_host=True
)
