"""What PyTorch does otherwise with meta tensors than with a CPU's, made up for: the tracer then sees the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes


class LikeCpu(TorchFunctionMode):
    """Tensors are made on meta where no other device is named, and computed with as a CPU's are, meanwhile.

    One mode instead of two (`torch.device("meta")` is the other): every function that is called goes through each.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constructors = _device_constructors()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._constructors and kwargs.get("device") is None and torch.utils._device.CURRENT_DEVICE is None:
            kwargs["device"] = "meta"
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


def result_on_meta(func: torch._ops.OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What an operator makes of meta tensors. The commonest are not asked for it: their own answer is worked out in
    Python and takes up to 0.4 ms, most of a trace. Tensors with values are computed with.

    Returns:
        The result, an empty tensor of the same shape, dtype and strides; an argument where that is written into.
    """
    name = func._schema.name
    if name in _IN_PLACE and args[0].is_meta:
        return args[0]
    if name in _ELEMENTWISE and not kwargs and (found := _elementwise(args)) is not None:
        return found
    return func(*args, **kwargs)


_IN_PLACE = frozenset({
    "aten::add_", "aten::addmm_", "aten::copy_", "aten::div_", "aten::exp_", "aten::fill_", "aten::mul_",
    "aten::normal_", "aten::scatter_add_", "aten::sub_", "aten::uniform_", "aten::zero_",
})  # fmt: skip
_ELEMENTWISE = frozenset({"aten::add", "aten::sub", "aten::mul", "aten::exp", "aten::log", "aten::neg", "aten::silu"})


def _elementwise(args: tuple) -> Tensor | None:
    """The result where it has the dtype, shape and strides of one of one or two tensors; None where it may not."""
    first, second = args[0], args[1] if len(args) > 1 else None
    if not isinstance(first, Tensor) or not first.is_meta or not first.is_floating_point() or not first.is_contiguous():
        return None
    if isinstance(second, Tensor):
        if not second.is_meta or second.dtype != first.dtype or not second.is_contiguous():
            return None
        if second.shape != first.shape and torch.broadcast_shapes(first.shape, second.shape) != first.shape:
            return None
    elif isinstance(second, complex):
        return None
    found = torch.empty_like(first)
    return found if found.stride() == first.stride() else None  # dimensions of one


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask of booleans adds to scores."""
    hidden = torch.scalar_tensor(float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, torch.scalar_tensor(0.0, dtype=dtype, device=mask.device), hidden)
