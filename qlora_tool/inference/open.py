"""Open what the user points at: the model, its tokenizer, and its adapter on top."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.adapters.peft_files import StoredAdapter
from qlora_tool.artifacts import base_folder
from qlora_tool.build import open_model
from qlora_tool.model.open import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.artifacts import Artifact
    from qlora_tool.config import ModelConfig
    from qlora_tool.model.causal_lm import CausalLM


def open_for_inference(
    config: ModelConfig, adapter: StoredAdapter | None = None
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """A model ready to answer, with `adapter` on it, and the tokenizer that it was trained with."""
    model = open_model(config, adapter)
    tokenizer = open_tokenizer(tokenizer_folder(model.folder, adapter), config.trust_remote_code)
    return model, tokenizer


def tokenizer_folder(model_folder: Path, adapter: StoredAdapter | None) -> Path:
    """The adapter's folder where it brings the tokenizer, else the model's."""
    if adapter is not None and (adapter.folder / "tokenizer_config.json").exists():
        return adapter.folder
    return model_folder


def open_artifact(artifact: Artifact) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """The model that an artifact stands for.

    Raises:
        UserError, MachineError: see `base_folder` and `open_model`.
    """
    base_folder(artifact)  # before anything else: here it is known whose base is missing
    return open_for_inference(artifact.model, artifact.adapter)
