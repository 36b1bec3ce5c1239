"""A base that has another vocabulary than its files: what `resize_token_embeddings` of transformers makes of it, for an
adapter that brings the rows of its own.

Rows that the files have and the model has too keep their values, further ones are 0 until the adapter's come.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_IN_FILES = "rows_in_files"  # beside what transformers has in a configuration


def resized_config(model_config: Any, rows: int) -> Any:
    """A copy of a transformers configuration with a vocabulary of `rows` tokens."""
    resized = copy.deepcopy(model_config)
    text = resized.get_text_config()
    setattr(resized, _IN_FILES, text.vocab_size)
    if getattr(resized, "vocab_size", None) == text.vocab_size:
        resized.vocab_size = rows
    text.vocab_size = rows
    return resized


def rows_in_files(model_config: Any) -> int | None:
    """The vocabulary of the base's files; None where the model has the same."""
    found: int | None = getattr(model_config, _IN_FILES, None)
    return found


def with_vocabulary(raw: Mapping[str, Any], model_config: Any) -> dict[str, Any]:
    """What a config.json says, with the vocabulary of the model where that was resized."""
    if rows_in_files(model_config) is None:
        return dict(raw)
    text = model_config.get_text_config()
    own = {"vocab_size": text.vocab_size}
    parts = {key: value | own for key, value in raw.items()
             if isinstance(value, dict) and getattr(model_config, key, None) is text}  # fmt: skip
    return {**raw, **parts, **(own if text is model_config or "vocab_size" in raw else {})}


def fitted(value: Tensor, shape: tuple[int, ...], model_config: Any) -> Tensor:
    """A tensor of the files with as many rows as the model has, where a resized vocabulary makes the difference.

    Args:
        value: (rows in the files, …).
        shape: (rows of the model, …).
    """
    rows = rows_in_files(model_config)
    if rows is None or value.dim() == 0 or value.shape[0] != rows or value.shape[1:] != shape[1:]:
        return value
    made = value.new_zeros(shape)
    kept = min(rows, shape[0])
    made[:kept] = value[:kept]
    return made
