"""What a device still has for this process, and how much of it a run is planned for."""

from __future__ import annotations

import torch

from qlora_tool.memory.allocator.cards import Budget
from qlora_tool.memory.allocator.target import CudaTarget
from qlora_tool.ops.free_memory import free_bytes
from qlora_tool.world import World

CUDA_MARGIN = 0.05  # of a card stays free: reserved memory is modelled, and not yet held against enough cards


def margin_on(device: str) -> float:
    """The share of a device, cuda or cpu, that stays free: CUDA_MARGIN, or nothing on a CPU, which may swap."""
    return CUDA_MARGIN if device == "cuda" else 0.0


def usable(budget_bytes: int, margin: float) -> int:
    """What a run may take of a device: all but the margin."""
    return int(budget_bytes * (1 - margin))


def available_bytes(device: torch.device, context_bytes: int) -> int:
    """What this process may take in all, the CUDA context included; on a CPU what the system has available, an equal
    share of it where several processes of a run are on this machine.

    Args:
        context_bytes: of the CUDA context, once every kernel is loaded. What of it is there already, and what this
            process's allocator holds, is in use by the driver's count, and still ours. Memory in use beyond that is
            others'.
    """
    free = free_bytes(device)
    if device.type != "cuda":
        return free // World.launched().local_size
    held = torch.cuda.memory_reserved(device)
    in_use = torch.cuda.mem_get_info(device)[1] - free - held
    return free + held + min(context_bytes, in_use)


def budget_here(device: str) -> Budget | None:
    """What a run may take now on this machine, of its card or of its memory; None where it has no card.

    Args:
        device: cuda or cpu.
    """
    if device == "cpu":
        return Budget(available_bytes(torch.device("cpu"), 0), "what this machine has free", False)
    if not torch.cuda.is_available():
        return None
    free = available_bytes(torch.device("cuda", torch.cuda.current_device()), CudaTarget.of(None).context_bytes)
    return Budget(free, f"what {torch.cuda.get_device_name()} has free", False)
