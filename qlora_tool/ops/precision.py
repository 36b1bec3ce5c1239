"""Which dtype products run in: what the device can do, measured once where it cannot be asked.

A processor without bf16 instructions emulates bf16 products, hundreds of times slower than fp32 ones; one that has
them is several times faster than in fp32.
"""

from __future__ import annotations

import torch

from qlora_tool.ops.speeds import BFLOAT16, FLOAT32, FLOAT32_ONEDNN, known_speeds

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype that `compute_dtype: auto` stands for on this device.

    CUDA: bf16 where the card has it, else fp16. CPU: bf16 where its products are measured faster than fp32's.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    gflops = known_speeds().gflops
    return torch.bfloat16 if gflops[BFLOAT16] > max(gflops[FLOAT32], gflops[FLOAT32_ONEDNN]) else torch.float32
