"""What PyTorch does otherwise with meta tensors than with a CPU's, made up for: the tracer then sees the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from qlora_tool.ops.declare import target_meant


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
    """What an operator makes of meta tensors. Each is asked once for what it makes of arguments like these: its answer
    is worked out in Python and takes up to 3 ms, and layers that are alike ask again. Tensors with values are computed
    with.

    Returns:
        The result, empty tensors of the same shapes, dtypes and strides; an argument where that is written into.
    """
    gives = _gives(func)
    if gives is None:
        return func(*args, **kwargs)
    try:
        looks = _looks((args, tuple(kwargs.items())))
        question = func, looks, torch.get_default_dtype(), target_meant()
        answer = _answers.get(question)
    except (_HasValues, TypeError):  # or it cannot be hashed
        return func(*args, **kwargs)
    if answer is None:
        result = func(*args, **kwargs)
        if len(_answers) >= MOST_ANSWERS:
            _answers.clear()
        if gives is NEW:
            answer = _Results.of((args, kwargs), result)
        else:  # known if it is left as it was
            answer = _Results(known=_looks((args, tuple(kwargs.items()))) == looks)
        _answers[question] = answer
        return result
    if not answer.known:
        return func(*args, **kwargs)
    if gives is NEW:
        return answer.again()
    return args[0] if gives is FIRST else kwargs[gives]


MOST_ANSWERS = 1 << 15  # some 20 MB
_answers: dict[Hashable, _Results] = {}
NEW, FIRST = "new tensors", "the first argument"


def forget_answers() -> None:
    """Give back what is kept of answers."""
    _answers.clear()


@cache
def _gives(func: torch._ops.OpOverload) -> str | None:
    """What an operator gives: NEW ones alone; what it writes into, FIRST or a keyword; None: something else."""
    schema = func._schema
    shared = [argument for argument in schema.arguments if argument.alias_info is not None]
    if not schema.returns or any(str(value.type) != "Tensor" for value in schema.returns):
        return None
    if not shared:
        return NEW if all(value.alias_info is None for value in schema.returns) else None
    if len(shared) > 1 or len(schema.returns) > 1 or not shared[0].alias_info.is_write:
        return None
    if shared[0].kwarg_only:
        return str(shared[0].name)
    return FIRST if shared[0].name == schema.arguments[0].name else None


class _HasValues(Exception):
    """Not all that is told of a tensor is its shape, dtype and strides."""


def _looks(argument: Any) -> Hashable:
    """All that an answer can depend on."""
    if isinstance(argument, Tensor):
        if not argument.is_meta or type(argument) not in _PLAIN:
            raise _HasValues
        return argument.dtype, argument.shape, argument.stride()
    if isinstance(argument, (tuple, list)):
        return tuple([_looks(part) for part in argument])
    return type(argument), argument  # True is 1, and 1.0


_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class _Results:
    """What an operator gave, to be given again.

    Attributes:
        known: whether it can be: each new one is a meta tensor in memory of its own, just as large as it needs.
        tensors: shape, strides and dtype of each that is new; None where there was none.
        several: whether it gives a tuple.
    """

    known: bool
    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...] = ()
    several: bool = False

    @classmethod
    def of(cls, given: tuple, result: Any) -> _Results:
        results = result if isinstance(result, tuple) else (result,)
        made = [tensor for tensor in results if tensor is not None]
        if len(_storages(made) - _storages(tree_leaves(given))) < len(made) or not all(map(_is_whole, made)):
            return cls(known=False)
        tensors = tuple(one if one is None else (one.shape, one.stride(), one.dtype) for one in results)
        return cls(True, tensors, isinstance(result, tuple))

    def again(self) -> Any:
        made = [one and torch.empty_strided(one[0], one[1], dtype=one[2], device="meta") for one in self.tensors]
        return tuple(made) if self.several else made[0]


def _storages(values: Iterable[Any]) -> set[int]:
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}


def _is_whole(tensor: Tensor) -> bool:
    """Whether a new tensor with this shape, dtype and these strides takes the same memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.itemsize if tensor.numel() else 0
    return tensor.is_meta and type(tensor) is Tensor and tensor.untyped_storage().nbytes() == size


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask of booleans adds to scores."""
    hidden = torch.scalar_tensor(float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, torch.scalar_tensor(0.0, dtype=dtype, device=mask.device), hidden)
