"""The same bits each time, on CUDA too: PyTorch's deterministic kernels while a run goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_tool.errors import UserError

# Two cuBLAS handles share no workspace; PyTorch reads this when the first one is made, and refuses products without.
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def full_determinism(wanted: bool) -> Iterator[None]:
    """What runs meanwhile on CUDA runs on kernels that add in a fixed order.

    Raises:
        UserError: the model needs an operation that has no such kernel.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")
    settings: Any = torch.utils.deterministic  # it makes its attributes when they are asked for
    before, filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # it would write all that is about to be written
    try:
        yield
    except RuntimeError as error:
        text = next(iter(str(error).splitlines()), "")
        if "does not have a deterministic implementation" not in text:
            raise
        raise UserError(
            f"training.full_determinism: {text.split(',')[0]}, which this model needs; leave the key out"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled
