"""The frozen base shared out over processes: each holds an equal part of every layer, which are put together while the
layer computes, forward and backward (PyTorch's FSDP2; ZeRO-3: Rajbhandari et al. 2020, arXiv 1910.02054).

What is trained stays whole in every process: adapters are small, and their gradients are summed anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_tool.errors import UserError
from qlora_tool.model.checkpointing import decoder_layers
from qlora_tool.weights.handles import WeightHandle, model_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: Any, trained: Collection[nn.Parameter], mesh: DeviceMesh | None = None) -> list[nn.Module]:
    """Share the frozen weights of a model out over the processes that are connected.

    Args:
        model: a `CausalLM`.
        trained: parameters that stay whole.
        mesh: of other processes than those that are connected.

    Returns:
        The modules that were shared out, each as `fully_shard` makes it.

    Raises:
        UserError: this version of PyTorch cannot, or rows go through the model one by one, a different number of times
            in each process.
    """
    from torch.distributed.fsdp import fully_shard

    if not model.pads_apart:
        raise UserError(f"training.sharding: fsdp: rows of {model.config.model_type} go through the model one by one, "
                        "as often as each process has rows; leave it out")  # fmt: skip
    module, whole = model.module, {*trained}
    head = module.get_output_embeddings()
    if head is not None:
        _tie(head, module.base_model)
    # One that is trained, or has an adapter, is computed again in backward for some rows at a time, as often as a
    # process has rows: it stays whole.
    elsewhere = {id(parameter) for parameter in (*module.base_model.parameters(), *trained)}
    by_itself = head is not None and not elsewhere & {id(parameter) for parameter in head.parameters()}
    shared = [*decoder_layers(module).values(), module.base_model, *([head] if by_itself else [])]
    try:
        for part in shared:
            fully_shard(part, mesh=mesh, ignored_params=whole)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"training.sharding: fsdp: PyTorch {torch.__version__} cannot share these weights out "
                        f"({reason}); set it to none, or install a newer PyTorch") from error  # fmt: skip
    model.sharded_head = head if by_itself else None
    return shared


class _TiedHandle(WeightHandle):
    """The handle of a weight that is a parameter of another module too, which is asked for it every time: what shares
    weights out puts other tensors in the place of that module's.

    Args:
        handle: of the weight so far.
        owner, name: that module, and what it calls the parameter.
    """

    _owner: nn.Module
    _name: str

    def __init__(self, handle: WeightHandle, owner: nn.Module, name: str):
        self.__dict__.update(_owner=owner, _name=name)  # the owner is no module within this one
        super().__init__(handle.tensors()["values"], handle.dtype)

    def _store(self, tensors: Mapping[str, Tensor]) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        values: Tensor = getattr(self._owner, self._name)
        return {"values": values}


def _tie(head: nn.Module, base: nn.Module) -> None:
    """Let an output projection ask the embeddings for a weight that they share."""
    handle = getattr(head, "weight", None)
    if not isinstance(handle, WeightHandle) or any(module is handle for module in base.modules()):
        return
    values = handle.tensors().get("values")
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is values:
                head.weight = _TiedHandle(handle, module, name)
                return


@contextlib.contextmanager
def whole(head: nn.Module | None) -> Iterator[None]:
    """Meanwhile a module that was shared out by itself is whole, for what takes its weight without calling it."""
    if head is None:
        yield
        return
    head.unshard()
    try:
        yield
    finally:
        head.reshard()


def held_bytes(module: nn.Module) -> int:
    """What this process holds of a model's frozen weights, in bytes."""
    return sum(local(found.tensor).nbytes for found in model_tensors(module) if not found.tensor.requires_grad)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, all of it where it is not shared out."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
