"""Which 16-bit model a quantized one was made from, as far as its folder tells."""

from __future__ import annotations

import re
from pathlib import Path

_ENDINGS = re.compile(
    r"[-_.](gptq|awq|bnb|exl2|hqq|quanto|torchao|aqlm|eetq|fp8|nvfp4|mxfp4|fp4|int4|int8|4bit|8bit|w4a16|w8a8|w8a16|w4a4"
    r"|dynamic|static|block|marlin|g\d+|quantized|autoround|auto-round|unsloth)([-_.].*)?$", re.IGNORECASE
)  # fmt: skip


def original_of(folder: Path | None) -> str:
    """What to take in place of a quantized model, for the end of an error's line: the base that the header of its
    README.md names, else what its name is without what it says of quantization."""
    if folder is not None:
        if named := _named_in_card(folder):
            return f"use {named}, the 16-bit model that its README.md names as its base"
        name = next((part.removeprefix("models--").replace("--", "/") for part in folder.parts
                     if part.startswith("models--")), folder.name)  # fmt: skip
        if (plain := _ENDINGS.sub("", name)) != name:
            return f"use the 16-bit model that it was made from, {plain} by its name"
    return "use the unquantized model that it was made from"


def _named_in_card(folder: Path) -> str | None:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    card = folder / "README.md"
    try:
        header = metadata_load(card) if card.exists() else None
    except (ValueError, YAMLError):  # no header that could be read: as good as none
        header = None
    named = (header or {}).get("base_model")
    named = named[0] if isinstance(named, list) and named else named
    return named if isinstance(named, str) and named else None
