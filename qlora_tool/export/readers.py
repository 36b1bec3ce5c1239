"""Which programs compute with an adapter's files what was trained, and why others do not."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.adapters.stored import StoredAdapter

# PEFT 0.21 takes the linear modules by these names for experts of transformers 4, and adapts today's experts instead.
_REWRITTEN = {
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj", "gate"), "mixtral": ("w1", "w2", "w3", "gate"),
}  # fmt: skip


def readers(stored: StoredAdapter, skeleton: nn.Module, portable: bool) -> dict[str, str | None]:
    """By the name of each program that reads PEFT's files: None where it computes what was trained, else why not.

    Args:
        skeleton: the base's modules.
        portable: of the form without patterns and scales of its own.
    """
    other = _other_than_lora(stored)
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if stored.peft.get(key) and not portable]
    rslora = ["use_rslora"] if stored.peft.get("use_rslora") and not portable else []
    ignored = {"vLLM": patterns, "llama.cpp": [*rslora, *(key for key in patterns if key == "alpha_pattern")]}
    found = {"PEFT": rewritten(stored, skeleton)}
    for name, keys in ignored.items():
        found[name] = other or (f"it ignores {' and '.join(keys)}; --format adapter-portable" if keys else None)
    return found


def _other_than_lora(stored: StoredAdapter) -> str | None:
    """What of an adapter only PEFT reads."""
    if stored.method.name != "lora":
        return f"it reads LoRA alone, and this is {stored.method.name}"
    if any(stored.adapter_class(name) is not Adapter for name in stored.by_module) or stored.token_rows():
        return "it reads LoRA on linear modules alone, and this is on embeddings or experts too"
    if stored.replaced_tensors() or any(name.endswith("lora_B.bias") for name in stored.tensors):
        return "it reads no biases and no tensors trained in full"
    return None


def rewritten(stored: StoredAdapter, skeleton: Any) -> str | None:
    """Why PEFT would not adapt what was adapted, in families whose experts were linear modules once."""
    family = _family(skeleton.config.get_text_config().model_type)
    names = [name for name in stored.by_module if stored.adapter_class(name) is Adapter
             and name.rpartition(".")[2] in _REWRITTEN.get(family or "", ())]  # fmt: skip
    if stored.method.peft_type != "LORA" or not names:
        return None
    return (
        f"PEFT 0.21 takes {names[0].rpartition('.')[2]} for weights of experts in this family and drops LoRA on "
        f"{len(names)} dense and shared modules ({names[0]} …); export it merged"
    )


def _family(model_type: str) -> str | None:
    """The family whose names PEFT converts those of this one by; it asks the same table, which has no other name."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
    except ImportError:
        return None
    return _MODEL_TO_CONVERSION_PATTERN.get(model_type)
