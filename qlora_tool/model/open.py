"""From the `model` section of a configuration to a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_tool.errors import UserError
from qlora_tool.model.tokenizer_check import read_as_written
from qlora_tool.ops.precision import COMPUTE_DTYPES, choose_compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` or a dtype's name as a dtype."""
    return choose_compute_dtype(device) if name == "auto" else COMPUTE_DTYPES[name]


def open_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which gives the ids that its `tokenizer.json` does; see `tokenizer_check`.

    Raises:
        UserError: the folder has none, or transformers reads it otherwise than it is written.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: its tokenizer cannot be read: {reason}; download the model again") from error
    return read_as_written(tokenizer, folder)


def positions_of(model_config) -> int | None:
    """How many positions a model has; None where it says nothing of a limit (xlnet: -1)."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None


def check_length(model_config, max_length: int, key: str = "data.max_length") -> None:
    """Refuse rows longer than the model's positions, unless RoPE scaling stretches them.

    Raises:
        UserError: naming both lengths.
    """
    text = model_config.get_text_config()
    limit = positions_of(model_config)
    rope = getattr(text, "rope_parameters", None) or {}
    scaled = any(
        parameters.get("rope_type", "default") != "default"
        for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]
    )
    if limit and limit < max_length and not scaled:
        raise UserError(
            f"{key}: {max_length}, but the model's max_position_embeddings is {limit}; set {key} "
            f"to {limit} or less, or configure RoPE scaling in the model's config.json"
        )
