"""The configurations of models that recipes and measurements name, by hub id: what a prediction needs, and no more.

The figures are those of each model's own config.json, written by hand from what is public about it; the factors of
Phi-4-mini's rotary embeddings alone are made up, as no prediction depends on them.
"""

from __future__ import annotations

from typing import Any

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
          "attention_bias": False, "mlp_bias": False, "dtype": "bfloat16"}  # fmt: skip
_LLAMA_3 = _LLAMA | {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
                     "num_key_value_heads": 8}  # fmt: skip
_QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
          "attention_bias": False, "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936,
          "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": False,
          "dtype": "bfloat16"}  # fmt: skip


def _stretched(factor: float) -> dict[str, Any]:
    """Llama 3's scaling of its rotary embeddings."""
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip


def _size(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads}  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _LLAMA | _size(576, 1536, 30, 9)
    | {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0,
       "tie_word_embeddings": True},
    "huggyllama/llama-7b": _LLAMA | _size(4096, 11008, 32, 32)
    | {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "dtype": "float16"},
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA | _size(4096, 11008, 32, 32)
    | {"vocab_size": 32000, "max_position_embeddings": 4096, "dtype": "float16"},
    "meta-llama/Llama-2-13b-chat-hf": _LLAMA | _size(5120, 13824, 40, 40)
    | {"vocab_size": 32000, "max_position_embeddings": 4096, "dtype": "float16"},
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3 | _size(4096, 14336, 32, 32) | {"rope_scaling": _stretched(8.0)},
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3 | _size(3072, 8192, 28, 24)
    | {"head_dim": 128, "rope_scaling": _stretched(32.0), "tie_word_embeddings": True},
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3 | _size(8192, 28672, 80, 64) | {"rope_scaling": _stretched(8.0)},
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _size(4096, 14336, 32, 32)
    | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
       "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
       "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None, "dtype": "bfloat16"},
    "Qwen/Qwen3-4B": _QWEN3 | _size(2560, 9728, 36, 32) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-8B": _QWEN3 | _size(4096, 12288, 36, 32),
    "Qwen/Qwen3-14B": _QWEN3 | _size(5120, 17408, 40, 40),
    "Qwen/Qwen3-32B": _QWEN3 | _size(5120, 25600, 64, 64),
    "Qwen/Qwen3-30B-A3B": _QWEN3 | _size(2048, 6144, 48, 32)
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": 4,
       "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
       "decoder_sparse_step": 1, "mlp_only_layers": []},
    "openai/gpt-oss-20b": _size(2880, 2880, 24, 64)
    | {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "head_dim": 64, "num_key_value_heads": 8,
       "vocab_size": 201088, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
       "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
       "rms_norm_eps": 1e-5, "attention_bias": True, "tie_word_embeddings": False, "swiglu_limit": 7.0,
       "rope_theta": 150000, "eos_token_id": 200002, "pad_token_id": 199999,
       "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                        "original_max_position_embeddings": 4096},
       "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
           "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
       "dtype": "bfloat16"},
    "Qwen/Qwen2.5-7B-Instruct": _size(3584, 18944, 28, 28)
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
       "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
       "tie_word_embeddings": False, "use_sliding_window": False, "dtype": "bfloat16"},
    "mistralai/Mistral-7B-Instruct-v0.3": _size(4096, 14336, 32, 32)
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
       "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
       "sliding_window": None, "tie_word_embeddings": False, "dtype": "bfloat16"},
    "google/gemma-2-9b-it": _size(3584, 14336, 42, 16)
    | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
       "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000,
       "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256,
       "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "dtype": "bfloat16"},
    "google/gemma-3-4b-it": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256,
        "dtype": "bfloat16", "text_config": _size(2560, 10240, 34, 8)
        | {"model_type": "gemma3_text", "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
           "max_position_embeddings": 131072, "sliding_window": 1024,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "vision_config": _size(1152, 4304, 27, 16)
        | {"model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14, "vision_use_head": False}},
    "microsoft/Phi-4-mini-instruct": _size(3072, 8192, 32, 24)
    | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
       "num_key_value_heads": 8, "vocab_size": 200064, "max_position_embeddings": 131072, "rope_theta": 10000.0,
       "partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096, "sliding_window": 262144,
       "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
       "tie_word_embeddings": True, "eos_token_id": 199999, "bos_token_id": 199999, "pad_token_id": 199999,
       "dtype": "bfloat16"},
}  # fmt: skip
