"""What streamed weights cost: bytes to move against time to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_tool.ops.bandwidths import known_bandwidths
from qlora_tool.ops.speeds import BFLOAT16, FLOAT32, FLOAT32_ONEDNN, known_speeds

if TYPE_CHECKING:
    from qlora_tool.memory.allocator.target import CudaTarget


@dataclass(frozen=True)
class Rates:
    """What a device reaches at most; 0 is what is not known.

    Attributes:
        host: bytes a second from pinned host memory, measured.
        disk: the same from the disk that the cache lies on.
        products: floating point operations a second: measured on a CPU, a card's by its maker.
    """

    host: float = 0.0
    disk: float = 0.0
    products: float = 0.0

    @classmethod
    def of(cls, target: CudaTarget | None, dtype: torch.dtype) -> Rates:
        """Of the card that a plan is for, and of its disk where that card is here; of this machine where it is a CPU.

        Nothing is measured for it but the products of a CPU, which every command measures once.
        """
        found = known_bandwidths(measure=False)
        if target is None:
            gflops = known_speeds().gflops
            name = BFLOAT16 if dtype == torch.bfloat16 else FLOAT32
            fastest = max(gflops[name], gflops[FLOAT32_ONEDNN] if name == FLOAT32 else 0.0)
            return cls(0.0, found.disk, fastest * 1e9)
        products = (target.tensor_tflops or 0.0) * 1e12
        if not target.here:
            return cls(0.0, 0.0, products)
        host = found.cards.get(f"cuda:{torch.cuda.current_device()}", 0.0)
        return cls(host, min(found.disk, host) if host else found.disk, products)


@dataclass(frozen=True)
class Streaming:
    """What a step with streamed weights moves, beside what it computes.

    Attributes:
        source: of the weights: host or disk.
        step_bytes: brought in a step, forward and backward, once for each batch that it accumulates.
        rate: bytes a second that the source was measured at; 0: it was not.
        product_seconds: of a step at least, at the highest speed of the device's products; 0: that is not known.
    """

    source: str
    step_bytes: int
    rate: float
    product_seconds: float

    @property
    def seconds(self) -> float:
        """Of a step, for moving alone; 0 where the source was not measured. It goes on while products run."""
        return self.step_bytes / self.rate if self.rate else 0.0

    def __str__(self) -> str:
        size = self.step_bytes / 1e6
        moved = f"{size / 1e3:.1f} GB" if size >= 1000 else f"{size:.1f} MB"
        moved += f" from the {self.source} in each step"
        if self.rate:
            moved += f", {_seconds(self.seconds)} at {self.rate / 1e9:.1f} GB/s"
        if self.product_seconds:
            moved += f"; products take {_seconds(self.product_seconds)} or more"
        return moved


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"
