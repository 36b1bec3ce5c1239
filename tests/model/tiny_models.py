"""Tiny random transformers models of many families, written to folders as `save_pretrained` writes them."""

from __future__ import annotations

from pathlib import Path

import torch

# Sizes by the names that most families give them; widths are multiples of 64, so every row begins a new block.
_PLAIN = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 2,
           "topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16,
           "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
           "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 16}  # fmt: skip
_DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
          "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_GPT2 = {
    "vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

# What a family needs beside the plain sizes, or instead of them.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    # 36 × 36 and 36 × 45 weights: blocks of 64 straddle rows, the last one is short, and one width is odd.
    "llama-odd": {"hidden_size": 36, "intermediate_size": 45, "head_dim": 18, "num_attention_heads": 2},
    "mistral": {"sliding_window": 4},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 4,
               "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.25},
    "cohere2": {"tie_word_embeddings": True, "logit_scale": 0.25, "sliding_window": 4},
    "granite": {"tie_word_embeddings": True, "logits_scaling": 8.0, "embedding_multiplier": 12.0,
                "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {},
    "olmo2": {},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "smollm3": {"tie_word_embeddings": True},
    "starcoder2": {"tie_word_embeddings": True},
    "gpt_neox": {},
    "helium": {},
    "exaone4": {"sliding_window": 4},
    "ernie4_5": {"tie_word_embeddings": True},
    "seed_oss": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "tie_word_embeddings": True},
    "opt-projected": {"ffn_dim": 128, "word_embed_proj_dim": 128, "tie_word_embeddings": True,
                      "do_layer_norm_before": False, "type": "opt"},
    "gpt2": {"sizes": _GPT2},
    "gpt_bigcode": {"sizes": _GPT2},
    "gptj": {"sizes": _GPT2 | {"rotary_dim": 8, "tie_word_embeddings": False}},
    "gpt_neo": {"sizes": {"vocab_size": 131, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 4,
                          "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
                          "bos_token_id": 1, "eos_token_id": 2}},
    "codegen": {"sizes": _GPT2 | {"rotary_dim": 8, "tie_word_embeddings": False}},
    "bloom": {"sizes": {"vocab_size": 131, "hidden_size": 64, "n_layer": 2, "n_head": 4}},
    "mpt": {"sizes": {"vocab_size": 131, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}},
    "falcon": {"sizes": {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "bos_token_id": 1, "eos_token_id": 2}},
    "falcon-alibi": {"sizes": {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                               "alibi": True, "multi_query": False, "bias": True, "parallel_attn": False,
                               "bos_token_id": 1, "eos_token_id": 2}, "type": "falcon"},
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": _EXPERTS | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "gpt_oss": _EXPERTS | {"sliding_window": 4},
    "granitemoe": _EXPERTS | {"logits_scaling": 8.0},
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "ernie4_5_moe": _EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "deepseek_v3": _LATENT,
    # Each token attends to 4 others, which 32 heads pick: of fewer heads many scores are 0, and equal ones a matter of
    # chance.
    "deepseek_v32": _LATENT | {"index_topk": 4, "index_n_heads": 32, "index_head_dim": 32},
}  # fmt: skip

# Families that take another way somewhere, for tests of that alone.
OTHERS: dict[str, dict] = {
    "cpmant": {"sizes": {"vocab_size": 131, "hidden_size": 64, "num_attention_heads": 4, "dim_head": 16, "dim_ff": 128,
                         "num_hidden_layers": 2}},
    # Old families that fuse q, k and v.
    "dbrx": {"sizes": {"vocab_size": 131, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
                       "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                       "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}},
    "persimmon": {},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "openai-gpt": {"sizes": _GPT2, "type": "openai-gpt"},
    "modernbert-decoder": {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 4,
                           "type": "modernbert-decoder", "tie_word_embeddings": True},
    "llama4_text": _EXPERTS | {"intermediate_size_mlp": 128, "attention_chunk_size": 32},
    "mamba": {"sizes": {"vocab_size": 131, "hidden_size": 64, "state_size": 16, "num_hidden_layers": 2,
                        "time_step_rank": 32, "bos_token_id": 1, "eos_token_id": 2}},
    "longcat_flash": _LATENT | {"num_layers": 1, "num_hidden_layers": 2, "ffn_hidden_size": 64,
                                "expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2},
    "rwkv": {"sizes": {"vocab_size": 131, "hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 4,
                       "rescale_every": 2, "context_length": 64, "bos_token_id": 1, "eos_token_id": 2}},
    "jetmoe": _EXPERTS | {"kv_channels": 16, "intermediate_size": 64},
    # Recurrences and convolutions, by themselves or between layers of attention.
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": _EXPERTS | _DELTA | {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "qwen3_5_text": _DELTA | {"type": "qwen3_5_text"},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "type": "falcon_h1"},
    "granitemoehybrid": _MAMBA | _EXPERTS | {"shared_intermediate_size": 64, "layer_types": ["mamba", "attention"],
                                             "position_embedding_type": "rope"},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "jamba": _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                         "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 8,
                        "type": "recurrent_gemma"},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16,
                   "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8, "type": "nemotron_h"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 16, "mamba_headdim": 16, "n_mamba_heads": 8,
               "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "attention_head_dim": 32,
               "use_mem_rope": True, "adapter_rank": 8, "hybrid_layer_ids": [1], "num_key_value_heads": 4},
}  # fmt: skip


def tiny_config(family: str, **changes):
    """The transformers configuration of one of the families above."""
    from transformers import AutoConfig

    values = dict((FAMILIES | OTHERS)[family])
    model_type = values.pop("type", family.partition("-")[0])
    values = (values.pop("sizes", None) or _PLAIN) | values | changes
    return AutoConfig.for_model(model_type, **values)


def tiny_model(family: str, *, seed: int = 0, **changes):
    """A random model in fp32 in which no two tensors are alike: norms are not ones, biases not zeros."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(parameter + 0.1 * noise)
    return model


def read_tiny(folder: Path, kind: str = "none", double_quant: bool = True, **options):
    """The model as `load_base` reads it, with products in fp32, on the CPU."""
    from qlora_tool.model.load import load_base
    from qlora_tool.model.slots import Quantization
    from qlora_tool.model.source import read_model_config

    return load_base(folder, read_model_config(folder), Quantization(kind, double_quant), torch.device("cpu"),
                     torch.float32, **options)  # fmt: skip


def read_by_transformers(folder: Path, **options):
    """The same folder as transformers reads it, in fp32."""
    from transformers import AutoModelForCausalLM

    if "gemma2" in (folder / "config.json").read_text():  # transformers 5.17 chooses attention without its cap
        options.setdefault("attn_implementation", "eager")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length) that are none of the special ones."""
    return torch.randint(3, 131, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids: torch.Tensor, **inputs) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **inputs).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def write_tiny(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Path:
    """Write a tiny model of a family in `dtype` and return its folder."""
    tiny_model(family, seed=seed, **changes).to(dtype).save_pretrained(folder)
    return folder
