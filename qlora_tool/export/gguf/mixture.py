"""Which type each tensor of a GGUF file has.

Types named after a mixture (q4_k_m) give more bits to what needs them: the output layer, values of attention, the way
down of feed-forward blocks in some of the layers. Rows that are no multiple of a type's block take another type. Both
are llama.cpp's choices for the same name (https://github.com/ggml-org/llama.cpp, src/llama-quant.cpp), so that a file
is as large as users know it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_tool.export.grids.block_types import BLOCK_TYPES

PLAIN = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Mixture:
    """The types of a mixture: `usual`, and `more` for the places that are named, by a rule for the layer."""

    usual: str
    values: Mapping[str, str] = field(default_factory=dict)  # rule → type, of attn_v and attn_qkv
    down: Mapping[str, str] = field(default_factory=dict)  # rule → type, of ffn_down
    of_eight_experts: str | None = None  # of attn_output, where there are eight experts


MIXTURES: dict[str, Mixture] = {
    "q4_k_m": Mixture("Q4_K", {"some": "Q6_K"}, {"some": "Q6_K"}, "Q5_K"),
    "q4_k_s": Mixture("Q4_K", {"first four": "Q5_K"}, {"first eighth": "Q5_K"}, "Q5_K"),
    "q5_k_m": Mixture("Q5_K", {"some": "Q6_K"}, {"some": "Q6_K"}),
    "q6_k": Mixture("Q6_K"),
    "q4_0": Mixture("Q4_0"),
    "iq4_nl": Mixture("IQ4_NL", {"shared": "Q5_K"}, {"first eighth": "Q5_K"}, "Q5_K"),
}


def is_fp32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp's operators take a tensor in no other type: vectors, norms, positions, routers."""
    return len(shape) == 1 or name.endswith("_norm.weight") or name.startswith("position_embd") or "gate_inp" in name


def tensor_types(shapes: Mapping[str, tuple[int, ...]], gguf_type: str, config: Any) -> dict[str, str]:
    """The type of every tensor, as `gguf.GGMLQuantizationType` calls it.

    Args:
        shapes: by GGUF's names, the last one that of a row.
        gguf_type: a key of `PLAIN` or of `MIXTURES`.
        config: the model's transformers configuration.
    """
    quantized = [name for name, shape in shapes.items() if not is_fp32(name, shape)]
    wanted = _mixed(quantized, shapes, gguf_type, config) if gguf_type in MIXTURES else dict.fromkeys(
        quantized, PLAIN[gguf_type])  # fmt: skip
    return {name: _fitting(wanted[name], shape[-1]) if name in wanted else "F32" for name, shape in shapes.items()}


def fallbacks(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str], gguf_type: str, config: Any) -> int:
    """How many tensors have another type than the mixture means, as their rows are no multiple of its block."""
    if gguf_type not in MIXTURES:
        return 0
    quantized = [name for name in shapes if types[name] != "F32"]
    wanted = _mixed(quantized, shapes, gguf_type, config)
    usual_block = _block(MIXTURES[gguf_type].usual)
    return sum(types[name] != wanted[name] or (_is_output(name, shapes) and shapes[name][-1] % usual_block != 0)
               for name in quantized)  # fmt: skip


def _mixed(names: list[str], shapes: Mapping[str, tuple[int, ...]], gguf_type: str, config: Any) -> dict[str, str]:
    mixture, layers = MIXTURES[gguf_type], config.num_hidden_layers
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts"))
    experts = next((count for count in counts if count), 1)
    heads = config.num_attention_heads
    sharing = heads // (getattr(config, "num_key_value_heads", None) or heads)
    found = {}
    for name in names:
        layer = int(match[1]) if (match := _LAYER.match(name)) else 0
        chosen = mixture.usual
        if _is_output(name, shapes):
            chosen = "Q8_0" if shapes[name][-1] % _block(mixture.usual) else "Q6_K"
        elif "attn_v.weight" in name or "attn_qkv.weight" in name:
            chosen = _by_rule(mixture.values, layer, layers, sharing, mixture.usual)
            chosen = "Q5_K" if chosen == "Q4_K" and _is_70b(config, sharing) else chosen
            chosen = "Q8_0" if experts == 8 else chosen
        elif "attn_k.weight" in name and experts == 8:
            chosen = "Q8_0"
        elif "ffn_down" in name:
            chosen = _by_rule(mixture.down, layer, layers, sharing, mixture.usual)
        elif "attn_output" in name and experts == 8:
            chosen = mixture.of_eight_experts or mixture.usual
        found[name] = chosen
    return found


def _by_rule(rules: Mapping[str, str], layer: int, layers: int, sharing: int, usual: str) -> str:
    """The type that a rule gives a layer.

    Args:
        sharing: how many heads share a key and a value.
    """
    eighth = layers // 8
    applies = {
        "some": layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2,
        "first eighth": layer < eighth, "first four": layer < 4, "shared": sharing >= 4,
    }  # fmt: skip
    return next((kind for rule, kind in rules.items() if applies[rule]), usual)


def _is_70b(config: Any, sharing: int) -> bool:
    """What llama.cpp takes for a 70B: a llama of 80 layers whose heads share keys, and any qwen2 of 80."""
    if config.num_hidden_layers != 80:
        return False
    return config.model_type == "qwen2" or (config.model_type in ("llama", "mistral", "mixtral") and sharing > 1)


def _is_output(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor makes the logits: the output layer, or the embeddings that are tied to it."""
    return name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in shapes)


def _block(kind: str) -> int:
    return BLOCK_TYPES[kind].weights if kind in BLOCK_TYPES else 32 if kind == "Q8_0" else 1


def _fitting(kind: str, columns: int) -> str:
    """The type itself, or what llama.cpp takes instead where rows are no multiple of its block."""
    if columns % _block(kind) == 0:
        return kind
    kind = _FALLBACK.get(kind, "F16")
    return kind if columns % _block(kind) == 0 else "F16"
