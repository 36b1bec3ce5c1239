"""Which device a run takes, and why not the one that is there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from qlora_tool.errors import UserError
from qlora_tool.once import log_once

logger = logging.getLogger(__name__)

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(name: str) -> torch.device:
    """`auto`, `cuda` or `cpu` as a device. A graphics card that `auto` leaves unused is named in a warning, once.

    Raises:
        UserError: cuda is asked for and cannot be used.
    """
    if name == "cpu" or (name == "auto" and not _has_cuda()):
        if name == "auto" and (reason := unused_card()) is not None:
            log_once(logger, logging.WARNING, f"{reason}; running on the CPU")
        return torch.device("cpu")
    if not _has_cuda():
        raise UserError(
            f"model.device: cuda, but {unused_card() or 'PyTorch sees no CUDA device here'}; `qlora-tool doctor` shows "
            "what it sees"
        )
    return torch.device("cuda")


def _has_cuda() -> bool:
    """Whether there is an NVIDIA card that PyTorch can use; its builds for AMD call their devices cuda too."""
    return torch.version.hip is None and torch.cuda.is_available()


def unused_card() -> str | None:
    """Of a machine without a usable CUDA device: which card is there, and why it is not used; None where none is
    seen."""
    if torch.version.hip is not None and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} is not used: AMD's cards are not supported"
    if torch.backends.mps.is_available():
        return "Apple's GPU is not used: only NVIDIA's cards are supported"
    if torch.xpu.is_available():
        return f"{torch.xpu.get_device_name()} is not used: Intel's cards are not supported"
    if not NVIDIA_DRIVER.exists() and shutil.which("nvidia-smi") is None:
        return None
    if torch.version.cuda is None:
        return "an NVIDIA driver is there, but this PyTorch is built without CUDA: install one that is built with it"
    return f"an NVIDIA driver is there, but PyTorch {torch.__version__} cannot use it: {_failure()}"


def _failure() -> str:
    """What PyTorch says when it is made to start CUDA: that the driver is too old, say."""
    try:
        torch.cuda.init()
    except Exception as error:  # of several kinds
        return " ".join(str(error).split()) or type(error).__name__
    return "it sees no device; CUDA_VISIBLE_DEVICES may hide them"
