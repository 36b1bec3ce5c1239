"""What a command's arguments name: a run, an adapter or a model; or a base with several adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_tool.artifacts import Artifact, BaseOptions, find_artifact
from qlora_tool.inference.options import Adapters, AnyPath, as_options
from qlora_tool.inference.several import Several, find_several


def find_named(
    name: AnyPath,
    options: BaseOptions,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    adapter: Adapters = (),
    *,
    several: bool = False,
    weighted: bool = False,
) -> Artifact | Several:
    """What a name, the options about its base and its chat template, and `--adapter` stand for.

    Args:
        adapter: NAME=FOLDER, several of them, or a mapping from names.
        several: whether one adapter is to be opened as several are, so that the base alone can be asked too.
        weighted: whether adapters may have weights.

    Raises:
        UserError: see `find_artifact` and `find_several`.
    """
    given = as_options(adapter)
    if not given and not several:
        artifact = find_artifact(os.fspath(name), options)
        return artifact if chat_template_kwargs is None else _given(artifact, chat_template_kwargs)
    found = find_several(os.fspath(name), given, options, weighted=weighted)
    if chat_template_kwargs is None:
        return found
    adapters = {key: _given(one, chat_template_kwargs) for key, one in found.adapters.items()}
    return replace(found, base=_given(found.base, chat_template_kwargs), adapters=adapters)


def _given(artifact: Artifact, chat_template_kwargs: Mapping[str, Any]) -> Artifact:
    return replace(artifact, chat_template_kwargs=chat_template_kwargs)
