"""Configurations held against one another, as far as their keys matter to what is asked."""

from __future__ import annotations

from typing import Any

from qlora_tool.config.keys import SECTIONS, Config
from qlora_tool.methods.keys import Mark


def marked(mark: Mark) -> frozenset[str]:
    """The keys, as `section.key`, that have a mark."""
    return frozenset(
        f"{name}.{key}"
        for name, section in SECTIONS.items()
        for key, field in section.model_fields.items()
        if mark in field.metadata or mark in section.marks
    )


def memory_settings(config: Config) -> dict[str, Any]:
    """The values, by `section.key`, that the memory of a step depends on besides the shape of its batch; of more than
    two passes in a step, two: the others repeat the second."""
    values = {key: value for key, value in _flat(config).items() if key not in marked(Mark.NOT_IN_MEMORY)}
    passes = "training.gradient_accumulation_steps"
    return values | {passes: min(2, values[passes])}


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """The keys, as `section.key`, whose values differ: the one's and the other's."""
    values = _flat(other)
    return {key: (value, values[key]) for key, value in _flat(one).items() if value != values[key]}


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json")
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
