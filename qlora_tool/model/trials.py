"""Finding out what a family's code computes by running it on random numbers, once a class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def trying() -> Iterator[None]:
    """What runs meanwhile is a trial on small real tensors, and no part of a step that is watched."""
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        yield


class AsText(dict[str, Any]):
    """A module's attributes, equal to others that read the same."""

    def __hash__(self) -> int:  # type: ignore[override]  # nothing changes it
        return hash(str(self))

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)


def attributes_of(module: nn.Module) -> AsText:
    """What a module was made with that is neither a parameter nor a module."""
    return AsText({name: value for name, value in vars(module).items() if not name.startswith("_")})


def twin(kind: type[nn.Module], attributes: AsText) -> nn.Module:
    """A module of a class with these attributes, without parameters or modules yet."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.__dict__.update(attributes)
    return made


def subclass(kind: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A class that differs from another in its forward pass alone, and goes by its name."""
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**named, "forward": forward})
