"""What was predicted or chosen before, on the disk: the same run asks again each time it is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from qlora_tool._version import __version__
from qlora_tool.config import memory_settings
from qlora_tool.files.cache import cache_folder, read_cached, write_cached
from qlora_tool.ops.products import products_choice

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.memory.allocator.target import CudaTarget
    from qlora_tool.memory.trace.predict import BatchShape


class AsJson(Protocol):
    """What can be written as JSON and read back."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Any:
        """Raises ValueError, TypeError or KeyError for anything else."""
        ...


_T = TypeVar("_T", bound=AsJson)


def cached(
    kind: type[_T],
    make: Callable[[], _T],
    run: tuple[Config, Any, BatchShape, torch.dtype],
    target: CudaTarget | None,
    budget_bytes: int | None = None,
    how: str = "",
) -> _T:
    """What `make` gave for the same run before, or gives now.

    Args:
        kind: of what it gives.
        run: the configuration, the model's, the shape of the batch, and the dtype of products.
        target: the card it is for; None: the CPU that is here.
        budget_bytes: what it must stay within, where it depends on that.
        how: what sets it apart from another one of this kind for the same run.
    """
    config, model_config, shape, compute_dtype = run
    device = dataclasses.astuple(target) if target else products_choice()
    identity = [__version__, torch.__version__, model_config.to_json_string(), memory_settings(config),
                dataclasses.astuple(shape), str(compute_dtype), device, budget_bytes]  # fmt: skip
    identity += [how] if how else []
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder() / "predictions" / f"{kind.__name__.lower()}-{digest}.json"
    try:
        return kind.from_json(read_cached(file))
    except (ValueError, TypeError, KeyError):
        pass  # not made yet, or not as it was written
    found = make()
    write_cached(file, found.to_json())
    return found
