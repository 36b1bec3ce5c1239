"""`generation_config.json` of an export: the base's, with every token that ends an answer as it was trained."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.errors import UserError
from qlora_tool.files.atomic import write_json
from qlora_tool.inference.ends import SETTINGS, generation_settings, named_ends, with_trained
from qlora_tool.model.open import BrokenTokenizer, open_tokenizer
from qlora_tool.model.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


def named_and_trained(
    base: Path, config: PreTrainedConfig, tokenizer_folder: Path, trust_remote_code: bool = False
) -> tuple[list[int], list[int]]:
    """The tokens at which plain transformers ends an answer of the base, and those at which it has to end one of the
    model that was trained, the former among them.

    Args:
        base: the base's folder.
        config: its transformers configuration.
        tokenizer_folder: the tokenizer's, with the chat template that was trained.

    Raises:
        UserError: the base's generation settings are broken.
    """
    in_settings, in_config = named_ends(generation_settings(base), config)
    named = in_settings or in_config  # the configuration counts where the settings say nothing
    if not has_tokenizer(tokenizer_folder):
        return named, named
    try:
        tokenizer = open_tokenizer(tokenizer_folder, trust_remote_code)
    except BrokenTokenizer:  # it would be copied into the export
        raise
    except UserError as error:
        logger.warning("%s: the base's, which may not name the end of an answer: %s", SETTINGS, error)
        return named, named
    return named, with_trained(named, tokenizer)


def write_generation_config(
    base: Path, config: PreTrainedConfig, tokenizer_folder: Path, folder: Path, trust_remote_code: bool = False
) -> None:
    """Write the base's generation settings, sampling included, with the ends of `named_and_trained`: byte for byte
    where they name those already; none where there are none and config.json names them."""
    named, ends = named_and_trained(base, config, tokenizer_folder, trust_remote_code)
    if ends != named:
        settings: dict[str, Any] = generation_settings(base) or _of_config(config)
        write_json(folder / SETTINGS, settings | {"eos_token_id": ends[0] if len(ends) == 1 else ends})
    elif (base / SETTINGS).exists():
        shutil.copyfile(base / SETTINGS, folder / SETTINGS)


def _of_config(config: PreTrainedConfig) -> dict[str, Any]:
    """What plain transformers would take of the configuration, were there no generation settings."""
    from transformers import GenerationConfig

    settings = GenerationConfig.from_model_config(config).to_diff_dict()
    # Marked as made from a configuration, they would be made from it again.
    return {key: value for key, value in settings.items() if not key.startswith("_") and key != "transformers_version"}
