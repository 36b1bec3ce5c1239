"""From the `model` section of a configuration to a model and its tokenizer."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_tool.errors import UserError, printable
from qlora_tool.model.tokenizer_check import read_as_written
from qlora_tool.model.tokenizer_files import check_tokenizer_files
from qlora_tool.once import log_once
from qlora_tool.ops.precision import COMPUTE_DTYPES, choose_compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "spm", "source.spm", "tekken")
"""How the names of files begin that hold tokenizers; classes of their own have others, and say more."""


class BrokenTokenizer(UserError):
    """A tokenizer's files are there, and hold what no tokenizer does."""


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
        check_tokenizer_files(folder)
    except UserError as error:
        raise BrokenTokenizer(error.lines) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(tokenizer, "split_special_tokens", False):
            log_once(logger, logging.WARNING, f"{folder}: its tokenizer_config.json has split_special_tokens: true: "
                     "special tokens are split like other words, a chat template's too, so that no end of a turn is "
                     "trained as the model knows it; take the key out unless that is meant")  # fmt: skip
        return read_as_written(tokenizer, folder)
    except UserError:
        raise
    except BaseException as error:  # files of any content: what reads them raises anything, Rust's panics too
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        if reason := _lacking(folder, error, trust_remote_code):
            raise UserError(f"{folder}: {reason}") from error
        raise BrokenTokenizer(
            f"{folder}: its tokenizer cannot be read: {_reason(error)}; download the model again"
        ) from error


def _lacking(folder: Path, error: BaseException, trust_remote_code: bool) -> str:
    """What is not there that reading a folder's tokenizer takes, and what to do; empty where its files are broken."""
    if "custom code" in str(error) and not trust_remote_code:
        return "its tokenizer brings its own code; read it, then set model.trust_remote_code: true to run it"
    files = [file.name for file in folder.iterdir()]
    if not any(name.startswith(_TOKENIZER_FILES) and name != "tokenizer_config.json" for name in files):
        return "no tokenizer in it (tokenizer.json, tokenizer.model, vocab.json …); copy those it was made with"
    alone = "tokenizer.json" not in files and any(name.endswith(".model") for name in files)
    if alone and not find_spec("sentencepiece"):
        return "its tokenizer is a SentencePiece model without tokenizer.json; pip install sentencepiece to read it"
    return ""


def _reason(error: BaseException) -> str:
    text = printable(" ".join(str(error).split()), 300)
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__} {text}".strip()


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
