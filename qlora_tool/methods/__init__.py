"""Adapter methods: one module a method, none of which imports torch when it is imported.

A method brings a class of configuration keys of its own; `qlora_tool.config` puts them all into the section `adapter`.
"""

from __future__ import annotations

from qlora_tool.methods.keys import LoraKeys, MethodKeys


def method_keys() -> dict[str, type[MethodKeys]]:
    """The keys that each method reads beside those of every method, by the name that `adapter.method` has for it."""
    return {"lora": LoraKeys, "dora": LoraKeys}
