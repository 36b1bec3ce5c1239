"""Triton kernels, versions for CUDA devices of operations that are declared elsewhere, and whether they can be used.

A module of kernels imports Triton, so it is imported where one of its kernels is launched, never before `usable` has
said that it may be.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.ops.declare import Target

OPERATIONS = ("AdamW", "dequantization", "gated MLPs", "RMSNorm", "rotary embeddings")
"""What there are kernels for, in words."""
OLDEST = (7, 5)  # Turing, that Triton compiles for
_log = logging.getLogger(__name__)


def available(target: Target) -> bool:
    """Whether kernels run in a step that is meant for a device.

    Where this machine has a CUDA device, what it lacks decides. Where it has none, the step will run on another, which
    is taken to lack nothing: Triton comes with PyTorch for CUDA on Linux.
    """
    if target.type != "cuda" or target.capability < OLDEST:
        return False
    return not torch.cuda.is_available() or lacking() is None


@functools.cache
def lacking() -> str | None:
    """What Triton lacks on this machine to compile and launch a kernel, in a few words; None where nothing is seen."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.name != "posix":
        return None  # builds for Windows bring a compiler
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler (gcc, clang, or what CC names)"
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))
    return None if (headers / "Python.h").exists() else f"Triton needs Python's headers, and {headers} has no Python.h"


def usable(device: torch.device) -> bool:
    """Whether kernels run on a device of this machine; where they do not, a warning says so once."""
    return device.type == "cuda" and _obstacle(device) is None


@functools.cache
def _obstacle(device: torch.device) -> str | None:
    """Why kernels do not run on a CUDA device; found by running one."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        obstacle = f"compute capability {'.'.join(map(str, capability))} is below {'.'.join(map(str, OLDEST))}"
    elif (obstacle := lacking()) is None:
        obstacle = _failure(device)
    if obstacle is not None:
        _log.warning("slower operations run in place of Triton kernels: %s", obstacle)
    return obstacle


def _failure(device: torch.device) -> str | None:
    """What went wrong when a kernel was compiled and run; None where nothing did."""
    try:
        from qlora_tool.ops.kernels import trial

        with _disable_current_modes():  # whoever watches a step must not see it, and it needs data
            return trial.failure(device)
    except Exception as error:  # compilers, drivers and file systems fail in ways of their own
        return f"a first one failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels that are launched meanwhile run on the tensor's device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
