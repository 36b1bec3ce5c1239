"""What only the machine can tell: the size of its CUDA context, and of cuBLAS' workspaces. Measured once and cached."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.cache import cache_folder
from qlora_tool.ops.measured import read_measured, write_measured
from qlora_tool.ops.precision import choose_compute_dtype
from qlora_tool.sizes import memory_size

LARGEST_CONTEXT = 1_500_000_000  # bytes; more than any context known: someone else's memory
_SIDE = 64


@dataclass(frozen=True)
class Calibration:
    """What a device takes beside tensors, in bytes.

    Attributes:
        device_name: as `torch.cuda.get_device_name` says it.
        context_bytes: the CUDA context, kernels and libraries of a training step included.
        workspace_forward, workspace_backward: cuBLAS' workspace of the thread that runs the forward pass, and of
            autograd's. 0 where PyTorch keeps none.
    """

    device_name: str
    context_bytes: int
    workspace_forward: int
    workspace_backward: int

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """
        Raises:
            ValueError, TypeError: it is none.
        """
        found = cls(**data)
        sizes = (found.context_bytes, found.workspace_forward, found.workspace_backward)
        if not isinstance(found.device_name, str) or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError("no calibration")
        return found


def calibrate(device: int = 0) -> Calibration:
    """Measure a CUDA device, and keep the result.

    Nothing else should use the device meanwhile: what other programs take looks like the context.

    Args:
        device: its number.

    Raises:
        UserError: there is no such device.
        MachineError: other programs use it.
    """
    if not torch.cuda.is_available() or device >= torch.cuda.device_count():
        raise UserError("there is no CUDA device to calibrate; run this on the machine that has it")
    with torch.cuda.device(device):
        name = torch.cuda.get_device_name(device)
        forward, backward = measure_workspaces(device)
        _load_kernels(device)
        context = context_bytes(device)
    if context > LARGEST_CONTEXT:
        raise MachineError(
            f"{memory_size(context)} of {name} are in use beside this process's tensors, more than a CUDA context "
            "takes: end the other programs that use it, then calibrate again"
        )
    measured = Calibration(name, context, forward, backward)
    known = read_measured(_file(), Calibration.from_json)
    write_measured(_file(), known | {_key(name): measured})
    return measured


def cached_calibration(device_name: str) -> Calibration | None:
    """What `calibrate` found on a device of this name with the version of torch that is at work; None if it never
    ran."""
    return read_measured(_file(), Calibration.from_json).get(_key(device_name))


def context_bytes(device: int = 0) -> int:
    """Bytes of the device that are in use, and not held by this process's caching allocator."""
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def measure_workspaces(device: int = 0) -> tuple[int, int]:
    """Bytes that stay allocated after the first product of a forward pass, and after that of a backward pass."""
    left = torch.ones(_SIDE, _SIDE, dtype=torch.float16, device=f"cuda:{device}", requires_grad=True)
    gradient = torch.ones(_SIDE, _SIDE, dtype=torch.float16, device=f"cuda:{device}")
    torch._C._cuda_clearCublasWorkspaces()  # of products that ran before
    before = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        left @ gradient
    after_forward = torch.cuda.memory_allocated(device)
    (left @ gradient).backward(gradient)
    left.grad = None
    after_backward = torch.cuda.memory_allocated(device)
    return after_forward - before, after_backward - after_forward


def _load_kernels(device: int) -> None:
    """Take steps with one layer of a 7B, in plain rows and in packed ones: kernels are loaded into the context when
    they are first used, and which those are depends on the sizes."""
    from transformers import LlamaConfig

    from qlora_tool.config import Config, with_values
    from qlora_tool.memory.trace.predict import BatchShape, Watch, trial_run

    cuda = torch.device("cuda", device)
    model_config = LlamaConfig(num_hidden_layers=1, vocab_size=4096)
    values = {"training.gradient_checkpointing": True, "training.optim": "adamw_8bit"}
    for shape in (BatchShape.full(1, 512), BatchShape(1, 512, 509, segments=(100, 12, 400))):
        trial_run(with_values(Config(), values), model_config, shape, choose_compute_dtype(cuda), watch=Watch(),
                  device=cuda)  # fmt: skip


def _file() -> Path:
    return cache_folder() / "cuda.json"


def _key(device_name: str) -> str:
    return f"{device_name}, torch {torch.__version__}"
