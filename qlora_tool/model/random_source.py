"""A model's tensors where there is no checkpoint: random ones, and fake ones where fake tensors are being made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RandomSource:
    """A skeleton's tensors by name, small random numbers in one dtype.

    Args:
        model: a skeleton.
        device: where they are made.
        dtype: what a checkpoint would store.
    """

    has_values = False

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype):
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        tensors = model.state_dict(keep_vars=True)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in tied}
        self.names = list(self.shapes)
        self._device, self._dtype = device, dtype
        self._integers = {name for name, tensor in tensors.items() if not tensor.is_floating_point()}

    @classmethod
    def of(cls, model_config: Any) -> Callable[[PreTrainedModel, torch.device], RandomSource]:
        """What opens one for a skeleton of this configuration, in the dtype that its checkpoint is stored in."""
        stored = getattr(model_config, "dtype", None) or torch.bfloat16
        return lambda model, device: cls(model, device, stored)

    def stored_dtype(self, name: str) -> torch.dtype:
        return torch.int64 if name in self._integers else self._dtype

    def read(self, name: str) -> Tensor:
        if name in self._integers:
            return torch.zeros(self.shapes[name], dtype=torch.int64, device=self._device)
        # Small, so that nothing overflows and the optimizer takes its steps.
        return torch.randn(self.shapes[name], dtype=self._dtype, device=self._device).mul_(0.02)
