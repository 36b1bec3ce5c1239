"""Processes that are not here: what one of several does and holds, seen in this one alone.

What the others would send is not sent; of shapes and of memory nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.model.sharding import shard
from qlora_tool.world import World

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.model.causal_lm import CausalLM

Found = TypeVar("Found")


@dataclass(frozen=True)
class AssumedWorld(World):
    """The first of `size` processes. What it gives is taken to be what all give."""

    def gather(self, found: Found) -> list[Found]:
        return [found] * self.size

    def from_first(self, found: Found) -> Found:
        return found

    def _reduced(self, numbers: Sequence[float], operation: str) -> list[float]:
        return [number * self.size if operation == "SUM" else number for number in numbers]

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def copy_from_first(self, tensor: Tensor) -> None:
        pass


def shard_over(processes: int, model: CausalLM, adapters: AdapterSet) -> None:
    """Leave this process what it would hold of a model that is shared out over so many.

    Raises:
        UserError: see `shard`.
    """
    gather = _nothing_comes()
    for part in shard(model, adapters.parameters(), _mesh(processes, model.device)):
        part.set_custom_all_gather(gather)


def _mesh(processes: int, device: torch.device) -> DeviceMesh:
    """A mesh of processes none of which is connected."""
    from torch.distributed.device_mesh import DeviceMesh

    class Group:
        def size(self) -> int:
            return processes

        def rank(self) -> int:
            return 0

    class Mesh(DeviceMesh):
        def get_group(self, mesh_dim: int | str | None = None) -> Any:
            return Group()

    with unset_fake_temporarily(), _disable_current_modes():  # it looks at its numbers
        return Mesh(device.type, list(range(processes)), _init_backend=False, _rank=0)


def _nothing_comes() -> Any:
    """In the place of an all-gather: the same buffers, into which nothing is sent."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    class Nothing(DefaultAllGather):
        def __call__(self, *arguments: Any, **options: Any) -> None:
            return None

    return Nothing()
