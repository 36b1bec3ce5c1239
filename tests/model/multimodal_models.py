"""Tiny multimodal checkpoints, written as their makers publish them: text, a tower for images, what joins the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16, "patch_size": 4,
}  # fmt: skip
_GEMMA4_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64,
}  # fmt: skip
_TEXT = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_QWEN_TEXT = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_IMAGE_TOKENS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_PIXTRAL = _SIGLIP | {"model_type": "pixtral", "head_dim": 16}
_CLIP = _SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 32}

# By model type: the values of its configuration, and the name that its tower for images has in the model.
MULTIMODAL: dict[str, tuple[dict[str, Any], str]] = {
    "gemma3": ({"text_config": _TEXT | {"query_pre_attn_scalar": 16, "sliding_window": 4}, "vision_config": _SIGLIP,
                "mm_tokens_per_image": 4, "image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122},
               "model.vision_tower"),
    "gemma4": ({"text_config": _TEXT | {"sliding_window": 4, "hidden_size_per_layer_input": 16,
                                        "vocab_size_per_layer_input": 131},
                "vision_config": _GEMMA4_VISION, "audio_config": None, "image_token_id": 120, "video_token_id": 121,
                "audio_token_id": 122}, "model.vision_tower"),
    "qwen3_5": ({"text_config": _TEXT | _QWEN_TEXT, "vision_config": _QWEN_VISION} | _IMAGE_TOKENS, "model.visual"),
    "qwen3_vl": ({"text_config": _TEXT | _MROPE, "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]}}
                 | _IMAGE_TOKENS, "model.visual"),
}  # fmt: skip

# More that take the same ways, for tests of that alone.
MORE: dict[str, tuple[dict[str, Any], str]] = {
    "qwen2_5_vl": ({"text_config": _TEXT | _MROPE, "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [1]}}
                   | _IMAGE_TOKENS, "model.visual"),
    "mistral3": ({"text_config": _TEXT | {"model_type": "mistral"}, "vision_config": _PIXTRAL,
                  "image_token_index": 120}, "model.vision_tower"),
    "llava": ({"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _CLIP, "image_token_index": 120,
               "vision_feature_layer": -1}, "model.vision_tower"),
    "idefics3": ({"text_config": _TEXT | {"model_type": "llama"},
                  "vision_config": _SIGLIP | {"model_type": "idefics3_vision"}, "image_token_id": 120,
                  "scale_factor": 2}, "model.vision_model"),
    "smolvlm": ({"text_config": _TEXT | {"model_type": "llama"},
                 "vision_config": _SIGLIP | {"model_type": "smolvlm_vision"}, "image_token_id": 120,
                 "scale_factor": 2}, "model.vision_model"),
}  # fmt: skip


def write_multimodal(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a tiny multimodal model, its tower for images included, and the settings of its processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    values, _ = (MULTIMODAL | MORE)[family]
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + 0.1 * noise
            parameter.copy_(spread)
    model.to(dtype).save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text('{"image_mean": [0.5, 0.5, 0.5]}\n')
    return folder
