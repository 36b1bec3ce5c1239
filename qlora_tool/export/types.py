"""What an export can be, by name: they stand here by themselves, so that options are checked before anything heavy is
imported."""

from __future__ import annotations

from qlora_tool.choices import ExportFormat

BITSANDBYTES: tuple[ExportFormat, ...] = ("nf4", "fp4")
WITH_DTYPE: tuple[ExportFormat, ...] = ("safetensors", *BITSANDBYTES)
"""Formats of whose tensors the user may choose a dtype: folders of shards."""
ADAPTER_ALONE: tuple[ExportFormat, ...] = ("adapter", "adapter-portable")
"""Formats for which no base is read, and that are held against nothing."""

GGUF_TYPES = ("q4_0", "iq4_nl", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "bf16", "f16")  # each finer than the last
MIXED = ("q4_k_m", "q4_k_s", "q5_k_m", "q6_k", "q4_0", "iq4_nl")
"""GGUF types of few bits: the keys of `gguf.mixture.MIXTURES`."""
