"""The part of a multimodal model that reads and writes text, and what lies beside it: towers for images and sound."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn


def outside_text(module: nn.Module) -> list[str]:
    """The modules beside a transformers model's text part by name, each with all that is inside of it
    (`model.vision_tower`); none where text is all there is."""
    model = cast(Any, module)  # transformers leaves these methods untyped
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return []
    decoder = model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    own = [names.get(id(module)) for module in (decoder, model.get_input_embeddings(), model.get_output_embeddings())]
    kept = [name for name in own if name]  # the model itself has none
    if not names.get(id(decoder)):
        return []
    found: list[str] = []
    for owner in sorted({*_owners(kept[0]), ""}):
        for name, _ in model.get_submodule(owner).named_children():
            full = f"{owner}.{name}" if owner else name
            if not any(_within(full, one) or _within(one, full) for one in kept):
                found.append(full)
    return found


def is_outside(name: str, outside: Iterable[str]) -> bool:
    """Whether a module or tensor lies in one of `outside_text`'s modules."""
    return any(_within(name, one) for one in outside)


def text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name, without what lies beside its text part."""
    outside = outside_text(model)
    return {name: module for name, module in model.named_modules() if not is_outside(name, outside)}


def _within(name: str, owner: str) -> bool:
    return name == owner or name.startswith(f"{owner}.")


def _owners(name: str) -> list[str]:
    """`a.b.c` → `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
