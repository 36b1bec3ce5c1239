"""Adapter methods, one file each. A method is registered by its line in `_FILES`."""

from __future__ import annotations

from importlib import import_module

from qlora_tool.methods.keys import MethodKeys
from qlora_tool.methods.method import Method

_FILES = (
    "lora",
    "dora",
    "loha",
    "lokr",
    "vera",
    "additive",
    "llama_adapter",
    "full",
)

METHODS: dict[str, Method] = {
    method.name: method for method in (import_module(f"{__name__}.{file}").METHOD for file in _FILES)
}


def method_keys() -> dict[str, type[MethodKeys]]:
    """The keys of every method by the method's name."""
    return {name: method.keys for name, method in METHODS.items()}
