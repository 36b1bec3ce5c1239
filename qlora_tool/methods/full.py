"""Full fine-tuning: no adapter, every weight of the text part trained. The yardstick that methods are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_tool.methods.keys import MethodKeys
from qlora_tool.methods.method import Adapter, Method, SavedWith, Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.weights.handles import WeightHandle


class FullKeys(MethodKeys):
    """Of an adapter's keys it reads where to start from, and no other."""

    only_read = frozenset({"init_from"})
    trains_base = True


class Full(Method):
    """y = x·Wᵀ + b, W and b trained. It adds nothing to a module, so none of what follows is asked for."""

    name = "full"
    peft_type = "FULL"  # none of PEFT's: what it saves are whole weights
    keys = FullKeys
    peft_names: ClassVar[Mapping[str, str]] = {}
    has_delta = False
    additive = False
    usual_rates = (1e-6, 1e-4)

    def shapes(self, out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        return {}

    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Nothing: training begins with the base's own values."""
        return {}

    def branch(self, adapter: Adapter, x: Tensor) -> Tensor:
        raise NotImplementedError("full fine-tuning puts no adapter on a module")

    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        raise NotImplementedError("full fine-tuning has no update beside the weight")

    def to_peft(self, settings: Settings, saved: SavedWith) -> dict[str, Any]:
        return {}

    def from_peft(self, file: Path, config: Mapping[str, Any]) -> Settings | None:
        return Settings(1, 1.0, keys=self.keys()) if config.get("peft_type") == self.peft_type else None

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
        return 0, 0, 0


METHOD = Full()
