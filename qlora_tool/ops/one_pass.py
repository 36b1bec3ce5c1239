"""Where operations that read and write each number once are kernels; elsewhere PyTorch's own steps are as good."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_tool.ops.declare import target_of
from qlora_tool.ops.kernels import available, usable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_one_pass(tensor: Tensor) -> bool:
    """Whether a kernel takes this tensor, on its device or on the one that its step is meant for."""
    return tensor.dtype in DTYPES and (usable(tensor.device) if tensor.is_cuda else available(target_of(tensor)))
