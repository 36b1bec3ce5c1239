"""Which programs compute with an adapter's files what was trained, and why others do not."""

from __future__ import annotations

from typing import Any

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.adapters.peft_names import taken_for_experts
from qlora_tool.adapters.stored import StoredAdapter

_CURES = {"vLLM": "adapter-portable", "llama.cpp": "gguf-adapter"}


def readers(stored: StoredAdapter, skeleton: Any, portable: bool) -> dict[str, str | None]:
    """By the name of each program that reads PEFT's files: None where it computes what was trained, else why not.

    Args:
        skeleton: the base's modules.
        portable: of the form without patterns and scales of its own.
    """
    other = _other_than_lora(stored)
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if stored.peft.get(key) and not portable]
    rslora = ["use_rslora"] if stored.peft.get("use_rslora") and not portable else []
    ignored = {"vLLM": patterns, "llama.cpp": [*rslora, *(key for key in patterns if key == "alpha_pattern")]}
    linears = [name for name in stored.by_module if stored.adapter_class(name) is Adapter]
    is_lora = stored.method.peft_type == "LORA"
    found = {"PEFT": taken_for_experts(linears, skeleton.config.get_text_config().model_type) if is_lora else None}
    for name, keys in ignored.items():
        cure = _CURES[name]
        found[name] = other or (f"it ignores {' and '.join(keys)}; --format {cure}" if keys else None)
    if other and _only_places(stored):
        found["llama.cpp"] = f"{other}; --format gguf-adapter"
    return found


def _only_places(stored: StoredAdapter) -> bool:
    """Whether an adapter is LoRA throughout, and more than linear modules have it."""
    return stored.method.name == "lora" and not stored.token_rows() and not _whole_tensors(stored)


def _whole_tensors(stored: StoredAdapter) -> bool:
    """Whether it has biases or tensors trained in full; adapted embeddings' own weights, which PEFT writes along, are
    not told from those here."""
    return bool(stored.replaced_tensors()) or any(name.endswith("lora_B.bias") for name in stored.tensors)


def _other_than_lora(stored: StoredAdapter) -> str | None:
    """What of an adapter only PEFT reads."""
    if stored.method.name != "lora":
        return f"it reads LoRA alone, and this is {stored.method.name}"
    if any(stored.adapter_class(name) is not Adapter for name in stored.by_module) or stored.token_rows():
        return "it reads LoRA on linear modules alone, and this is on embeddings or experts too"
    if _whole_tensors(stored):
        return "it reads no biases and no tensors trained in full"
    return None
