"""The command that looks at the memory of a run for longer, with what the user typed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import yaml

from qlora_tool.memory.plan.result import set_line

_TYPED: ContextVar[tuple[str, ...]] = ContextVar("_TYPED", default=())  # the words, but for the options of the device


@contextmanager
def typed(
    config: Any, overrides: Sequence[str] | Mapping[str, Any], device_memory: str | int | None = None
) -> Iterator[None]:
    """Meanwhile `typed_command` is about a run that was given so.

    Args:
        config: the configuration; one that is neither a file nor a recipe cannot be typed.
        overrides: of its keys.
        device_memory: see `--device-memory`; None: what the device that is here has free.
    """
    words = []
    if isinstance(config, str | os.PathLike):
        with suppress(yaml.YAMLError):  # a value of Python's own that no option can have
            words = _words(os.fspath(config), overrides, device_memory)
    before = _TYPED.set(tuple(words))
    try:
        yield
    finally:
        _TYPED.reset(before)


def _words(
    config: str, overrides: Sequence[str] | Mapping[str, Any], device_memory: str | int | None
) -> list[str]:
    if isinstance(overrides, Mapping):
        plain = {key: os.fspath(value) if isinstance(value, os.PathLike) else value
                 for key, value in overrides.items()}  # fmt: skip
        overrides = [set_line({key: value}).removeprefix("--set ") for key, value in plain.items()]
    words = ["qlora-tool", "profile-memory", config]
    for setting in [overrides] if isinstance(overrides, str) else overrides:
        words += ["--set", setting]
    if device_memory is not None:
        words += ["--device-memory", f"{device_memory}B" if isinstance(device_memory, int) else device_memory]
    return words


def typed_command(device: str, processes: int) -> str:
    """`qlora-tool profile-memory my-run.yaml --set data.max_length=512 --device cuda`, to be pasted into a shell; empty
    where what was given cannot be typed."""
    if not _TYPED.get():
        return ""
    several = ["--processes", str(processes)] if processes > 1 else []
    return shlex.join([*_TYPED.get(), "--device", device, *several])
