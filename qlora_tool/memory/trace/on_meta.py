"""What PyTorch does otherwise with meta tensors than with a CPU's, made up for: the tracer then sees the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes


class LikeCpu(TorchFunctionMode):
    """Meta tensors are computed with as a CPU's are, meanwhile."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and args[0].is_meta:
            return attention_of_cpu(*args, **kwargs)
        result = func(*args, **kwargs)
        # Of numbers no operator makes a meta tensor, so that a dispatch mode would not see it.
        return torch.ops.aten.lift_fresh(result) if func is torch.tensor and result.is_meta else result


def attention_of_cpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` by the kernel that it chooses on a CPU; on meta it always takes the plain one."""

    def like(tensor: Tensor) -> Tensor:  # all that the choice looks at, in the memory of one row
        row = torch.empty(tensor.shape[-1] * max(1, tensor.stride(-1)), dtype=tensor.dtype, device="cpu")
        strides = (*[0] * (tensor.dim() - 1), tensor.stride(-1))
        return row.as_strided(tensor.shape, strides).requires_grad_(tensor.requires_grad)

    with _disable_current_modes():
        given = *map(like, (query, key, value)), None if attn_mask is None else like(attn_mask)
        chosen = torch._fused_sdp_choice(*given, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if chosen != SDPBackend.FLASH_ATTENTION.value:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _added(attn_mask, query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask of booleans adds to scores."""
    hidden = torch.scalar_tensor(float("-inf"), dtype=dtype)
    return torch.where(mask, torch.scalar_tensor(0.0, dtype=dtype), hidden)
