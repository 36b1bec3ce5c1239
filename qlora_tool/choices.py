"""The values of configuration keys that options of the command line take too.

They stand here, by themselves, so that `--help` answers without importing pydantic.
"""

from __future__ import annotations

from typing import Literal

Quantization = Literal["nf4", "fp4", "int8", "none"]
ComputeDtype = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cuda", "cpu"]
ExportFormat = Literal["safetensors", "gguf", "gguf-adapter", "adapter", "adapter-portable", "nf4", "fp4"]
ExportBase = Literal["auto", "dequantized", "original"]
GgufType = Literal["auto", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q4_0", "iq4_nl"]
DataFormat = Literal["auto", "messages", "sharegpt", "alpaca", "dolly", "prompt_completion", "text"]
