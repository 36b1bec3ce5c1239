"""Tiny checkpoints as they are published: quantized by bitsandbytes with exceptions, in FP8 with scales, in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny
from torch import Tensor

FP8_LIMIT = 448.0  # E4M3's largest value

# What bitsandbytes leaves of a family, as in "dynamic" 4-bit checkpoints.
SKIPPED = {
    "llama": ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn"],
    "gpt2": ["lm_head", "transformer.h.0.mlp", "c_attn"],
    "qwen3_moe": ["lm_head", "model.layers.1.self_attn"],
    "falcon": ["lm_head"],
}


def set_quantization(folder: Path, settings: dict) -> None:
    """Write `quantization_config` into a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))


def to_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(out, in) → FP8 and fp32 scales, one a block; the last blocks may be short."""
    height, width = block
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), []
    for top in range(0, weight.shape[0], height):
        row = []
        for left in range(0, weight.shape[1], width):
            part = weight[top : top + height, left : left + width].float()
            scale = part.abs().max() / FP8_LIMIT
            codes[top : top + height, left : left + width] = (part / scale).to(torch.float8_e4m3fn)
            row.append(scale)
        scales.append(torch.stack(row))
    return codes, torch.stack(scales)


def write_fp8(family: str, folder: Path, block: tuple[int, int] | None = (32, 32), suffix: str = "_scale_inv",
              settings: dict | None = None, **changes) -> Path:  # fmt: skip
    """A family's tiny model in bf16 with the matrices of its layers in FP8.

    Args:
        block: of weights that share a scale; None: one scale a weight, without a dimension.
        suffix: of the scales' names.
    """
    write_tiny(family, folder, dtype=torch.bfloat16, **changes)
    tensors = load_file(folder / "model.safetensors")
    for name, value in list(tensors.items()):
        outside = any(word in name for word in ("embed", "lm_head", "norm", "router", "mlp.gate.", "wte", "wpe"))
        if value.dim() == 2 and name.endswith(".weight") and not outside:
            size = block or tuple(value.shape)
            tensors[name], scale = to_fp8(value, size)
            tensors[f"{name}{suffix}"] = scale.reshape(()) if block is None else scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    block_size = None if block is None else list(block)
    set_quantization(folder, settings or {"quant_method": "fp8", "activation_scheme": "dynamic",
                                          "weight_block_size": block_size})  # fmt: skip
    return folder


def write_mxfp4(folder: Path, seed: int = 0, **changes) -> Path:
    """A tiny gpt-oss whose experts are random blocks in MXFP4, as OpenAI publishes them."""
    write_tiny("gpt_oss", folder, dtype=torch.bfloat16, **changes)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, value in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, rows = value.shape
            del tensors[name]
            shape = (experts, rows, width // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(118, 126, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_quantization(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return folder


def write_quantized(family: str, folder: Path, kind: str = "nf4", double_quant: bool = True, skipped=None):
    """A checkpoint that transformers and bitsandbytes quantized, and the model they read from it, in fp32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = write_tiny(family, folder / "plain", dtype=torch.bfloat16)
    common = {"llm_int8_skip_modules": SKIPPED[family] if skipped is None else skipped}
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, **common)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32,
                                    bnb_4bit_use_double_quant=double_quant, **common)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32,
                                                 device_map="cpu")  # fmt: skip
    model.save_pretrained(folder / "quantized")
    again = AutoModelForCausalLM.from_pretrained(folder / "quantized", dtype=torch.float32, device_map="cpu").eval()
    return folder / "quantized", again


def dequantized(model):
    """A model of bitsandbytes with the values of its weights, in fp32; transformers trips over one without any."""
    import bitsandbytes

    quantized = any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    return model.dequantize().float().eval() if quantized else model.eval()
