"""Several adapters on one model, one or none of them active: a switch moves names of objects, and reads nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from qlora_tool.adapters.peft_files import StoredAdapter, attach_stored

_MISSING = object()


class _Change(NamedTuple):
    """One entry of one module's own dictionaries, before and after an adapter was put on."""

    entries: dict[str, Any]
    key: str
    before: Any
    after: Any

    def put(self, value: Any) -> None:
        if value is _MISSING:
            self.entries.pop(self.key, None)
        else:
            self.entries[self.key] = value


class Switch:
    """Several adapters on one model.

    Whatever an adapter puts in a module's place, or gives a module (its tensors, tensors of the base that it replaces,
    a forward pass that runs several modules as one), is found by looking at the modules before and after it is put on;
    so each adapter is put on the base alone.

    Args:
        model: without adapters, as `load_base` reads it.

    Attributes:
        active: the name of the active adapter; None: the base alone.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.active: str | None = None
        self._changes: dict[str, list[_Change]] = {}

    @property
    def names(self) -> list[str]:
        """Of the adapters, in the order in which they were added."""
        return list(self._changes)

    def add(self, name: str, stored: StoredAdapter, dtype: torch.dtype | None = None) -> None:
        """Put a stored adapter on the model under a name, and leave the base alone active.

        Args:
            dtype: of its tensors; by default the one that they are stored in.

        Raises:
            ValueError: the name is taken.
            UserError: it does not fit this model, which stays as it was.
        """
        if name in self._changes:
            raise ValueError(f"an adapter is called {name!r} already")
        self.use(None)
        before = [(entries, dict(entries)) for entries in _dictionaries(self.model)]
        try:
            attach_stored(self.model, stored, dtype)
        finally:
            changes = [_Change(entries, key, old.get(key, _MISSING), entries.get(key, _MISSING))
                       for entries, old in before for key in {**old, **entries}
                       if old.get(key, _MISSING) is not entries.get(key, _MISSING)]  # fmt: skip
            for change in changes:
                change.put(change.before)
        self._changes[name] = changes

    def use(self, name: str | None) -> None:
        """Let the adapter of this name be the active one; None: the base alone.

        Raises:
            ValueError: no adapter has this name.
        """
        if name is not None and name not in self._changes:
            raise ValueError(f"no adapter {name!r} on this model: it has {', '.join(self._changes) or 'none'}")
        if self.active is not None:
            for change in self._changes[self.active]:
                change.put(change.before)
        self.active = name
        if name is not None:
            for change in self._changes[name]:
                change.put(change.after)
        self.model.train(self.model.training)  # one that was away meanwhile has not heard of it


def _dictionaries(model: nn.Module) -> list[dict[str, Any]]:
    """Every module's attributes, and its parameters, buffers and children."""
    found: list[dict[str, Any]] = []
    for module in model.modules():
        found += [vars(module), module._parameters, module._buffers, module._modules]
    return found
