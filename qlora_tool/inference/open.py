"""Open what the user points at: the model, its tokenizer, and its adapter on top."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.artifacts import base_folder, changed_base
from qlora_tool.build.open import open_model
from qlora_tool.errors import UserError
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.model.devices import choose_device
from qlora_tool.model.open import choose_dtype, open_tokenizer
from qlora_tool.model.source import read_model_config
from qlora_tool.model.tokenizer_files import has_tokenizer
from qlora_tool.ops.precision import COMPUTE_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.artifacts import Artifact
    from qlora_tool.config import ModelConfig
    from qlora_tool.model.causal_lm import CausalLM

logger = logging.getLogger(__name__)


def open_for_inference(
    config: ModelConfig, adapter: StoredAdapter | None = None
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """A model ready to answer, with `adapter` on it, and the tokenizer that it was trained with."""
    model = open_model(config, adapter)
    tokenizer = open_tokenizer(tokenizer_folder(model.folder, adapter), config.trust_remote_code)
    return model, tokenizer


def tokenizer_folder(model_folder: Path, adapter: StoredAdapter | None) -> Path:
    """The adapter's folder where it brings the tokenizer, else the model's."""
    if adapter is not None and has_tokenizer(adapter.folder):
        return adapter.folder
    return model_folder


def open_artifact(artifact: Artifact) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """The model that an artifact stands for. One without an adapter computes in the dtype of its files, as plain
    transformers does, where nothing else is asked for and the device is made for it.

    Raises:
        UserError, MachineError: an adapter that was trained on other weights; and see `base_folder` and `open_model`.
    """
    folder = base_folder(artifact)  # before anything else: here it is known whose base is missing
    config = artifact.model
    if artifact.adapter is not None and (changed := changed_base(artifact, folder)):
        if not artifact.base_named:
            raise UserError(f"{changed}; bring the old files back, or name a base with --model to use it all the same")
        logger.warning("%s; used on it all the same, as --model names it", changed)
    if artifact.adapter is None and config.compute_dtype == "auto":
        dtype = str(_own_dtype(folder, config)).removeprefix("torch.")
        config = config.model_copy(update={"compute_dtype": dtype})
    return open_for_inference(config, artifact.adapter)


def _own_dtype(folder: Path, config: ModelConfig) -> torch.dtype:
    """The dtype of a model's files, or the one to take in its place, which is said."""
    device = choose_device(config.device)
    usual, stored = choose_dtype("auto", device), _stored_dtype(folder, config)
    if stored is None or stored == usual:
        return usual
    if stored == torch.float32 or (device.type == "cuda" and stored == torch.float16):
        return stored
    taken = torch.float32 if device.type == "cpu" else usual  # which holds all that 16 bits do
    files, instead = (str(dtype).removeprefix("torch.") for dtype in (stored, taken))
    logger.info("products in %s: the model's files are %s, in which this device is slow or cannot compute; "
                "--compute-dtype %s takes it all the same", instead, files, files)  # fmt: skip
    return taken


def _stored_dtype(folder: Path, config: ModelConfig) -> torch.dtype | None:
    """What products of a model's weights run in by its own files: what config.json says, else the first weight's."""
    described = read_model_config(folder, config.trust_remote_code)
    quantization = getattr(described, "quantization_config", None)
    quantized = quantization.get("bnb_4bit_compute_dtype") if isinstance(quantization, dict) else None
    named = quantized or described.dtype or described.get_text_config().dtype
    if isinstance(named, str):
        named = COMPUTE_DTYPES.get(named.removeprefix("torch."))
    if named is None:
        found = (entry.dtype for entry in Checkpoint(folder).values() if entry.dtype in COMPUTE_DTYPES.values())
        named = next(found, None)
    return named if named in COMPUTE_DTYPES.values() else None
