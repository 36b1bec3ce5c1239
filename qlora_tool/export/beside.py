"""What lies beside the weights of an export: config.json, generation settings, the tokenizer with its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.files.atomic import write_json
from qlora_tool.model.config_file import read_config_file
from qlora_tool.model.resized import with_vocabulary

if TYPE_CHECKING:
    from qlora_tool.export.merge import MergedModel

# Processors of images and sound: preprocessor_config.json, processor_config.json, video_preprocessor_config.json …
MODEL_FILES = ("*processor*.json", "*.py", "LICENSE*")


def write_config(merged: MergedModel, folder: Path, quantization: Mapping[str, Any] | None = None) -> None:
    """Write the base's config.json with the files' dtype; of quantization it says `quantization`, or nothing."""
    raw = read_config_file(merged.checkpoint.folder)
    raw = with_vocabulary(raw, merged.skeleton.config)
    dropped = ("quantization_config", "torch_dtype", "_name_or_path")
    config = {key: value for key, value in raw.items() if key not in dropped}
    config["dtype"] = str(merged.default_dtype).removeprefix("torch.")
    if merged.unties:
        config["tie_word_embeddings"] = False
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", config)

