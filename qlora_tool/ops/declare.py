"""How an operation is declared: once, with all that anything else asks of it.

    matmul = declare(
        "matmul(Tensor left, Tensor right) -> Tensor",
        reference=torch.mm,                                    # on every device that has no version of its own
        shapes=lambda left, right: left.new_empty(left.shape[0], right.shape[1]),
        versions={"cpu": fast_matmul},
        workspace={"cpu": lambda left, right: 4096},
    )

An operation is opaque: what watches a step (a prediction on fake tensors, the tracer on real ones) sees its results and
nothing that happens inside, so that it is also told what is taken inside and given back, the workspace.

A prediction runs on fake CPU tensors whatever it predicts. `meant_for` says which device the step is meant for, and
what depends on the device asks `target_of`, never where a tensor lies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMESPACE = "qlora_tool"
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# `Library` and not `custom_op`: 3 µs a call instead of 12 (torch 2.13), where torch.mm itself takes 1.3.
_library = torch.library.Library(NAMESPACE, "DEF")


class Target(NamedTuple):
    """A device that a step is meant for.

    Attributes:
        type: cpu or cuda.
        capability: the compute capability of a CUDA device.
    """

    type: str
    capability: tuple[int, int] = (0, 0)


CPU = Target("cpu")
_meant_for: ContextVar[Target | None] = ContextVar("meant_for", default=None)


@contextmanager
def meant_for(target: Target) -> Iterator[None]:
    """What runs meanwhile, on CPU tensors without data, is meant for another device."""
    before = _meant_for.set(target)
    try:
        yield
    finally:
        _meant_for.reset(before)


def target_meant() -> Target | None:
    """What a step is meant for that runs on other tensors; None where it is for the device that it runs on."""
    return _meant_for.get()


def target_of(tensor: Tensor) -> Target:
    """What a step on this tensor is meant for: what `meant_for` says, else the tensor's own device."""
    return _meant_for.get() or _target_of_device(tensor.device)


@functools.cache
def _target_of_device(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target(device.type)
    return Target("cuda", torch.cuda.get_device_capability(device))


@dataclass(frozen=True)
class Operation:
    """A declared operation; calling it runs the version of its arguments' device.

    Attributes:
        name: as dispatch modes see it, e.g. `qlora_tool::matmul`.
        reference: the same in plain torch (or another library's), on any device.
        versions: faster ones, by device.
        workspaces: by device, what gives the bytes that are taken inside, from the arguments.
        results_on_host: its results are in host memory, and not on the device.
    """

    name: str
    reference: Callable[..., Any]
    versions: Mapping[str, Callable[..., Any]]
    workspaces: Mapping[str, Callable[..., int]]
    results_on_host: bool
    _call: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def workspace(self, target: Target, *arguments: Any) -> int:
        """Bytes that the operation takes on a device beside its results, at most, and gives back before it returns."""
        workspace = self.workspaces.get(target.type)
        return 0 if workspace is None else workspace(*arguments)


OPERATIONS: dict[str, Operation] = {}
"""All that are declared, by name."""


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    shapes: Callable[..., Any],
    versions: Mapping[str, Callable[..., Any]] | None = None,
    workspace: Mapping[str, Callable[..., int]] | None = None,
    results_on_host: bool = False,
) -> Operation:
    """Declare an operation. Nothing here is differentiable: those that use it write their own backward.

    Args:
        schema: name, arguments and results, as `torch.library.define` takes them; results share no memory with
            arguments. The first argument is a tensor, or a list of them.
        reference: see `Operation`.
        shapes: makes empty results of the right shapes, dtypes and sizes in memory; never looks at values.
        versions: by device (cpu, cuda).
        workspace: by device; 0 where none is given. It is asked with real and with fake tensors.
        results_on_host: see `Operation`.
    """
    name = _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    for device, version in (versions or {}).items():
        _library.impl(name, version, _KEYS[device])
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_library)
    call = getattr(getattr(torch.ops, NAMESPACE), name).default
    operation = Operation(
        f"{NAMESPACE}::{name}", reference, versions or {}, workspace or {}, results_on_host, call
    )  # fmt: skip
    OPERATIONS[operation.name] = operation
    return operation
