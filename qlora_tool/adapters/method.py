"""What an adapter method is: what it adds to a linear, how it starts, its merged delta, its tensors on disk."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from qlora_tool.weights.modules import FrozenLinear


@dataclass(frozen=True)
class AdapterSettings:
    """One layer's settings, patterns resolved.

    Attributes:
        r: rank.
        alpha: `lora_alpha`.
        dropout: on the adapter's input.
        use_rslora: scale by α/√r instead of α/r (arXiv 2312.03732).
        init: `default` or `gaussian`.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    init: str = "default"

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.r) if self.use_rslora else self.alpha / self.r


class Adapter(nn.Module, ABC):
    """The adapter of one linear module.

    Its parameters are kept in one dtype and cast to the input's for products. Made by `start` or `from_peft`.
    """

    method: ClassVar[str]

    @classmethod
    @abstractmethod
    def start(
        cls, linear: FrozenLinear, settings: AdapterSettings, dtype: torch.dtype, generator: torch.Generator
    ) -> Adapter:
        """A fresh adapter for `linear`, on its device, its start drawn from `generator` (a CPU one)."""

    @classmethod
    @abstractmethod
    def from_peft(cls, tensors: Mapping[str, Tensor], settings: AdapterSettings) -> Adapter:
        """An adapter with these values: what `peft_tensors` gives, read from a file."""

    @abstractmethod
    def forward(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        """x (…, in) → (…, out): the linear with this adapter, bias included."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """What merging adds to `weight` (out, in), fp32, (out, in)."""

    @abstractmethod
    def peft_tensors(self) -> dict[str, nn.Parameter]:
        """The trained tensors by the suffix that PEFT's files give them."""


def generator_for(seed: int, name: str) -> torch.Generator:
    """The source of a layer's start: depends on the seed and the layer's name alone, not on what was drawn before."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
