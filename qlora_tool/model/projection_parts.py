"""The parts of projections that families fuse into one weight: which of its rows are q, k, v, or gate and up.

`qkv_proj` of phi3 is q, then k, then v; gpt_neox and bloom have q, k and v of a head beside one another; falcon has the
heads that share one k and v before them. Where a family is not here its fused weight has no parts to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Rows = Mapping[str, Tensor]
QKV = ("q", "k", "v")


def parts_of(model_config: Any, name: str, out_features: int) -> Rows:
    """The rows of each part of a linear module, by the part's name; empty where it has none.

    Args:
        model_config: of the model.
        name: the module's, in full or its end.
        out_features: its rows.
    """
    config = model_config.get_text_config()
    last = name.rpartition(".")[2]
    layout = LAYOUTS.get((config.model_type, last))
    if layout is None:
        return {}
    rows = layout(config, out_features)
    assert sum(len(part) for part in rows.values()) == out_features, f"{config.model_type}: {last}"
    return rows


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the width of one."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


def _stacked(names: tuple[str, ...], sizes: list[int]) -> Rows:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return {name: torch.arange(end - size, end) for name, size, end in zip(names, sizes, ends, strict=True)}


def _thirds(config: Any, out_features: int) -> Rows:
    return _stacked(QKV, [out_features // 3] * 3)


def _halves(config: Any, out_features: int) -> Rows:
    return _stacked(("gate", "up"), [out_features // 2] * 2)


def _by_kind(config: Any, out_features: int) -> Rows:
    """All of q, then all of k, then all of v, which may have fewer heads."""
    heads, shared, width = _heads(config)
    return _stacked(QKV, [heads * width, shared * width, shared * width])


def _by_head(config: Any, out_features: int) -> Rows:
    """q, k and v of a head beside one another."""
    return _grouped(out_features, _heads(config)[0], 1)


def _grouped(out_features: int, groups: int, queries: int) -> Rows:
    """Groups of some query heads, then their k, then their v."""
    rows = torch.arange(out_features).view(groups, queries + 2, -1)
    return {"q": rows[:, :queries].flatten(), "k": rows[:, queries].flatten(), "v": rows[:, queries + 1].flatten()}


def _falcon(config: Any, out_features: int) -> Rows:
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        return _grouped(out_features, config.num_kv_heads, heads // config.num_kv_heads)
    if config.multi_query:
        return _stacked(QKV, [heads * width, width, width])
    return _grouped(out_features, heads, 1)


def _gpt_bigcode(config: Any, out_features: int) -> Rows:
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    return _stacked(QKV, [heads * width, width, width]) if config.multi_query else _grouped(out_features, heads, 1)


def _codegen(config: Any, out_features: int) -> Rows:
    """Four blocks, made for as many cores, of q, v and k each."""
    rows = torch.arange(out_features).view(4, 3, -1)
    return {"q": rows[:, 0].flatten(), "k": rows[:, 2].flatten(), "v": rows[:, 1].flatten()}


def _dbrx(config: Any, out_features: int) -> Rows:
    width = config.d_model // config.n_heads
    shared = config.attn_config.kv_n_heads
    return _stacked(QKV, [config.d_model, shared * width, shared * width])


LAYOUTS: dict[tuple[str, str], Callable[[Any, int], Rows]] = {
    **{(family, "c_attn"): _thirds for family in ("gpt2", "openai-gpt")},
    ("mpt", "Wqkv"): _thirds,
    ("phi3", "qkv_proj"): _by_kind,
    **{(family, "query_key_value"): _by_head for family in ("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon")},
    ("falcon", "query_key_value"): _falcon,
    ("gpt_bigcode", "c_attn"): _gpt_bigcode,
    ("codegen", "qkv_proj"): _codegen,
    ("dbrx", "Wqkv"): _dbrx,
    **{(family, "gate_up_proj"): _halves for family in ("phi3", "glm", "glm4")},
}
"""By the family and the last name of the module."""
