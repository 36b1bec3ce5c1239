"""What a device still has for this process."""

from __future__ import annotations

import torch


def available_bytes(device: torch.device, context_bytes: int) -> int:
    """What this process may take in all, the CUDA context included; on a CPU what the system has available.

    Args:
        context_bytes: of the CUDA context, once every kernel is loaded. What of it is there already, and what this
            process's allocator holds, is in use by the driver's count, and still ours. Memory in use beyond that is
            others'.
    """
    free = free_bytes(device)
    if device.type != "cuda":
        return free
    held = torch.cuda.memory_reserved(device)
    in_use = torch.cuda.mem_get_info(device)[1] - free - held
    return free + held + min(context_bytes, in_use)


def free_bytes(device: torch.device) -> int:
    """What nobody has taken: free on the card; on a CPU what the system has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
