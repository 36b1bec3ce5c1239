"""How much memory a device has free."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int:
    """What nobody has taken: free on the card; on a CPU what the system has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
