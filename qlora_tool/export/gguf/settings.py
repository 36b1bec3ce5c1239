"""The hyperparameters that a GGUF file states under llama.cpp's keys, from a transformers configuration."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_tool.errors import UserError
from qlora_tool.export.gguf.families import Family

if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = logging.getLogger(__name__)


def add_settings(writer: GGUFWriter, family: Family, config, vocabulary: int) -> None:
    """Write a model's sizes, norms, attention and rotary embedding.

    Args:
        writer: of the file.
        config: the model's transformers configuration.
        vocabulary: rows of the embeddings.

    Raises:
        UserError: a rotary embedding that llama.cpp does not know.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_first(config, "intermediate_size", "n_inner") or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    if family.layer_norm:
        writer.add_layer_norm_eps(_first(config, "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps"))
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family.architecture != "gpt2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    if family.architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if experts := _first(config, "num_local_experts", "num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if family.architecture != "llama":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _add_window(writer, family, config)
    if getattr(config, "rope_parameters", None):
        _add_rope(writer, family, config, head_dim)


def _first(config, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _add_window(writer: GGUFWriter, family: Family, config) -> None:
    window = getattr(config, "sliding_window", None)
    if family.sliding_period:
        writer.add_sliding_window(window)
        return
    if family.architecture == "phi3":
        writer.add_sliding_window(0)
    if window and window < config.max_position_embeddings and "sliding_attention" in (
        getattr(config, "layer_types", None) or ["sliding_attention"]
    ):  # fmt: skip
        logger.warning(
            "this %s model attends to the last %d tokens, llama.cpp to all: results differ in longer contexts",
            config.model_type, window,
        )  # fmt: skip


def _add_rope(writer: GGUFWriter, family: Family, config, head_dim: int) -> None:
    rope = rope_of_full_attention(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(rotary_dimensions(config, head_dim))
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # llama3's factors are a tensor
        return
    import gguf

    original = _original_length(config, rope)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(original)
    elif kind == "longrope" and family.architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or factor)
    else:
        raise UserError(
            f"--format gguf: rope_type {kind!r} of this {config.model_type} model has no counterpart in llama.cpp; "
            "choose --format safetensors"
        )


def rope_of_full_attention(config) -> dict[str, Any]:
    """The rotary embedding's parameters, those of full attention where there are two kinds."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def rotary_dimensions(config, head_dim: int) -> int:
    """How many of a head's dimensions are rotated."""
    share = rope_of_full_attention(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1.0)
    return int(head_dim * share)


def _original_length(config, rope: dict[str, Any]) -> int:
    return (
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )


def rope_tensors(config) -> dict[str, Tensor]:
    """What divides the rotary frequencies, fp32, (rotated dimensions / 2,): llama3's smooth factors, or longrope's two
    lists; empty for other rotary embeddings."""
    if not getattr(config, "rope_parameters", None):
        return {}
    rope = rope_of_full_attention(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        return {
            "rope_factors_long.weight": torch.tensor(rope["long_factor"], dtype=torch.float32),
            "rope_factors_short.weight": torch.tensor(rope["short_factor"], dtype=torch.float32),
        }
    if kind != "llama3":
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"rope_freqs.weight": _llama3_factors(rope, rotary_dimensions(config, head_dim))}


def _llama3_factors(rope: dict[str, Any], dimensions: int) -> Tensor:
    """1 for wavelengths below original/high, `factor` above original/low, smooth between (Llama 3.1)."""
    frequency = rope["rope_theta"] ** -(torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()
