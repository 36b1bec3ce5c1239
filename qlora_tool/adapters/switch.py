"""Several adapters on one model, one or none of them active: a switch moves names of objects, and reads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from qlora_tool.adapters.attach_stored import attach_stored
from qlora_tool.adapters.stored import StoredAdapter

_MISSING = object()


class _Change(NamedTuple):
    """One entry of one module's own dictionaries, or its class, before and after an adapter was put on."""

    module: nn.Module
    entries: dict[str, Any] | None
    key: str
    before: Any
    after: Any

    def put(self, value: Any) -> None:
        if self.entries is None:
            self.module.__class__ = value
        elif value is _MISSING:
            self.entries.pop(self.key, None)
        else:
            self.entries[self.key] = value


class Switch:
    """Several adapters on one model.

    What an adapter makes of a module, or gives it (its tensors, tensors of the base that it replaces, another class, a
    forward pass that runs several modules as one), is found by looking at the modules before and after it is put on; so
    each adapter is put on the base alone.

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
        before = [(module, type(module), [(entries, dict(entries)) for entries in _dictionaries(module)])
                  for module in self.model.modules()]  # fmt: skip
        try:
            attach_stored(self.model, stored, dtype)
        finally:
            changes = [change for module, kind, entries in before for change in _changes(module, kind, entries)]
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


def _dictionaries(module: nn.Module) -> list[dict[str, Any]]:
    """A module's attributes, and its parameters, buffers and children."""
    return [vars(module), module._parameters, module._buffers, module._modules]


def _changes(
    module: nn.Module, kind: type[nn.Module], before: Iterable[tuple[dict[str, Any], dict[str, Any]]]
) -> Iterator[_Change]:
    """What differs from how a module was.

    Args:
        kind: its class then.
        before: each of its dictionaries, and what was in it.
    """
    if type(module) is not kind:
        yield _Change(module, None, "", kind, type(module))
    for entries, old in before:
        for key in {**old, **entries}:
            if old.get(key, _MISSING) is not entries.get(key, _MISSING):
                yield _Change(module, entries, key, old.get(key, _MISSING), entries.get(key, _MISSING))
