"""A tiny configuration of every causal language model of transformers, and random weights for it.

Sizes go by the names that families give them: what a family's own configuration has of `SIZES`, and is larger there, is
made as small. `OWN` has what a family needs beside or instead.
"""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 320
LARGEST = 10_000_000  # weights of a model that is made
SIZES: dict[str, Any] = {
    "hidden_size": 64, "n_embd": 64, "n_embed": 64, "d_model": 64, "embed_dim": 64, "word_embed_proj_dim": 64,
    "embedding_size": 64, "input_embedding_size": 64, "emb_dim": 64, "dim_model": 64, "projection_dim": 64,
    "intermediate_size": 128, "ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128, "n_inner": 128,
    "d_inner": 128, "d_ff": 128, "dim_ff": 128, "ffn_hidden_size": 128, "shared_intermediate_size": 32, "dff": 128,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "dim_head": 16, "attention_head_dim": 16,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "max_target_positions": 128,
    "vocab_size": VOCABULARY, "decoder_vocab_size": VOCABULARY,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_topk": 2, "expert_ffn_hidden_size": 32,
    "shared_expert_ffn_hidden_size": 32,
    "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_dt_rank": 8, "time_step_rank": 8,
    "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_headdim": 16, "mamba_n_heads": 8, "mamba_num_heads": 8,
    "n_mamba_heads": 8, "mamba_n_groups": 1, "mamba_ngroups": 1, "n_groups": 1, "mamba_chunk_size": 16,
    "chunk_size": 16, "lru_width": 64, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "sliding_window": 16, "attention_window_size": 16,
    "attention_chunk_size": 16, "window_size": 16, "local_attention": 16, "index_topk": 16, "index_n_heads": 64,
    "index_head_dim": 16, "rotary_dim": 8, "zero_expert_num": 2,
}  # fmt: skip
"""What is made small, by the names that families give it. Not the heads that pick tokens: with few of them many scores
are 0, and which of equal ones `topk` takes depends on how many there are."""

OWN: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1},
    "cwm": {"bos_token_id": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
                "attention_multiplier": 0.0625},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "modernbert-decoder": {"bos_token_id": 1},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
"""What a family needs beside, or in the place of, what `tiny_config` finds for it."""


def tiny_config(model_type: str, **values: Any) -> Any:
    """The transformers configuration of a family, made small: a layer or more of each kind, no dropout.

    Raises:
        Exception: whatever the family's configuration says of such sizes.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    usual = kind()
    names = {name: value for name, value in SIZES.items() if _is_larger(usual, name, value)}
    names |= _of_each_kind(usual)
    quiet = {
        name: 0.0 for name, value in vars(usual).items()
        if isinstance(value, float) and any(word in name for word in ("drop", "pdrop"))
    }  # fmt: skip
    if "kv_lora_rank" in vars(usual):
        names["num_key_value_heads"] = 4  # as many as query heads
        if usual.__dict__.get("head_dim") == usual.__dict__.get("qk_rope_head_dim"):
            names["head_dim"] = names.get("qk_rope_head_dim", usual.qk_rope_head_dim)
    if vars(usual).get("is_decoder") is False:
        names["is_decoder"] = True
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    return kind(**{**names, **quiet, **tokens, **OWN.get(model_type, {}), **values})


def _is_larger(config: Any, name: str, size: int) -> bool:
    """Whether a configuration has such a size, and a larger one."""
    found = vars(config).get(name)  # what it goes by another name for is not there
    return isinstance(found, int) and not isinstance(found, bool) and found > size


def _of_each_kind(usual: Any) -> dict[str, Any]:
    """Where a configuration lists its layers' kinds (`layer_types`, `mlp_layer_types`): as few as have each kind."""
    depth = getattr(usual, "num_hidden_layers", None)
    lists = {
        name: list(dict.fromkeys(value)) for name, value in vars(usual).items()
        if isinstance(value, list) and len(value) == depth and all(isinstance(one, str) for one in value)
    }  # fmt: skip
    if not lists:
        return {}
    layers = max(2, *map(len, lists.values()))
    cut = {name: [kinds[place % len(kinds)] for place in range(layers)] for name, kinds in lists.items()}
    return cut | {usual.attribute_map.get("num_hidden_layers", "num_hidden_layers"): layers}


def random_model(model_config: Any, seed: int = 0) -> Any:
    """A model in bf16 with random weights of a useful size, no two alike: norms are not ones, biases not zeros.

    Raises:
        ValueError: it would not be tiny.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(model_config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} weights, which is no tiny model")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(noise.tanh())
            elif parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.08 * noise)
    return model.to(torch.bfloat16)
