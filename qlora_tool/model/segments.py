"""Attention by segment: every example of a packed row attends to itself alone, and no mask of row × row is made.

An attention implementation for transformers' attention interface, named `qlora_tool`, with a mask function of the same
name. Where transformers would make a mask, the mask function hands the layers a `SegmentMask`: which tokens belong
together and how far back they look. It travels through the layers as the mask does, so that a layer that is computed
again in backward has it at hand, whatever thread that runs on. Without segments both are transformers' own `sdpa`.

A segment by itself is causal, which the flash kernels know without a mask: on CUDA all segments go through one kernel
of variable length, on a CPU one kernel takes neighbours of one length.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_tool.model.masks import known_padding
from qlora_tool.ops.declare import CPU, Target, target_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_tool.data.batches import Segments

logger = logging.getLogger(__name__)

NAME = "qlora_tool"
FLASH_HEAD_DIM = 256

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Read while masks are made, in the forward pass alone; from there on they are arguments.
_segments: ContextVar[Segments | None] = ContextVar("segments", default=None)


class SegmentMask:
    """What the layers are given in a mask's place.

    Attributes:
        segments: tokens that belong together, over all rows.
        window: a token attends to as many, itself included; None where that is all of its segment.
    """

    def __init__(self, segments: Segments, window: int | None = None):
        self.segments = segments
        self.window = window if window is not None and window < segments.longest else None
        self._masks: dict[tuple, Tensor] = {}

    def window_mask(self, length: int, like: Tensor) -> Tensor | None:
        """(length, length), 0 where a token attends and -inf elsewhere; None where causality is all there is to it.

        Made once for the layers of a kind.
        """
        if self.window is None or length <= self.window:
            return None
        key = (length, like.dtype, like.device)
        if key not in self._masks:
            seen = like.new_ones(length, length, dtype=torch.bool).tril_().triu_(1 - self.window)
            self._masks[key] = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
        return self._masks[key]


def leave_out_cudnn() -> None:
    """Attention of this process runs on flash where it can, never on cuDNN: that plans a kernel for every new shape,
    and PyTorch prefers it on Hopper and Blackwell."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def use_segments(model: PreTrainedModel) -> bool:
    """Give the model attention by segment, where its family allows for that; whether it does.

    It must take its attention from transformers' interface and run on `sdpa`: families with more in it (a cap on the
    scores, sinks) run on `eager`. Chunks of fixed places (llama4) are not windows.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        return True
    if config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    if getattr(config, "attention_chunk_size", None) is not None or not getattr(config, "is_causal", True):
        return False
    model.set_attn_implementation(NAME)
    return config._attn_implementation == NAME


@contextmanager
def attending_by(segments: Segments) -> Iterator[None]:
    """Masks that are made meanwhile are these segments. The model must be given an attention mask of ones."""
    before = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(before)


def segment_mask(
    *args,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **options,
) -> SegmentMask | Tensor | None:
    """transformers' mask function: what stands for the mask of one kind of layer.

    Args:
        attention_mask: (rows, length), False where a token is padding.
        local_size: the window of layers that have one.
        allow_is_causal_skip: whether causality, and the window, are all there is to the mask.
        use_vmap: whether the family adds conditions of its own.
    """
    segments = _segments.get()
    if segments is None:
        # `sdpa_mask` looks whether the mask hides anything: one that does not is not given to it.
        padded = known_padding()
        options |= {"attention_mask": None if padded is False else attention_mask, "use_vmap": use_vmap}
        return sdpa_mask(
            *args, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip and not padded, **options
        )
    if use_vmap or not allow_is_causal_skip:
        raise NotImplementedError("a mask with conditions of the family's own")
    return SegmentMask(segments, local_size)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SegmentMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        query: (rows, heads, length, head_dim).
        key, value: (rows, key heads, length, head_dim).

    Returns:
        (rows, length, heads, head_dim), and no attention weights.
    """
    if not isinstance(attention_mask, SegmentMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache")):
        raise NotImplementedError("attention with something of the family's own in it")
    rows, _, length, _ = query.shape
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (tokens, heads, head_dim)
    target = target_of(query)
    if not dropout and has_flash_cuda(target, q, k, v):
        output = _flash_cuda(q, k, v, attention_mask, scaling)
    elif not dropout and has_flash_cpu(target, q, k, v):
        output = _FlashCpu.apply(q, k, v, attention_mask, scaling)
    else:
        if query.is_cuda:
            _say_plain(target, q.dtype, q.shape[-1], v.shape[-1], bool(dropout))
        output = plain_attention(q, k, v, attention_mask, scaling, dropout)
    return output.unflatten(0, (rows, length)), None


@functools.cache
def _say_plain(target: Target, dtype: torch.dtype, head_dim: int, value_dim: int, dropout: bool) -> None:
    have = f"{str(dtype).removeprefix('torch.')}, capability {target.capability[0]}.{target.capability[1]}, heads of "
    have += f"{head_dim}" if head_dim == value_dim else f"{head_dim} and {value_dim}"
    have += ", dropout" if dropout else ""
    have += "" if torch.backends.cuda.is_flash_attention_available() else ", a PyTorch without flash attention"
    logger.warning("packed rows: attention goes from example to example, which is slower than one kernel for all of "
                   "them; that takes float16 or bfloat16, capability 8.0, heads of one size of at most %d, a multiple "
                   "of 8, no dropout (here %s)", FLASH_HEAD_DIM, have)  # fmt: skip


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: SegmentMask, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """The reference, and what runs where no kernel fits: torch's attention on one run of segments after the other.

    Args:
        query, key, value: (tokens, heads, head_dim); keys may have fewer heads.
    """
    groups = query.shape[1] // key.shape[1]
    if target_of(query).type == "cuda" and groups > 1:  # kernels that group heads without a mask do not come here
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        groups = 1
    outputs = []
    for (count, length), *parts in _parts(mask.segments.runs(), query, key, value):
        q, k, v = (_heads_first(part, count, length) for part in parts)
        window = mask.window_mask(length, query)
        output = nn.functional.scaled_dot_product_attention(
            q, k, v, window, dropout, window is None, scale=scaling, enable_gqa=groups > 1
        )
        outputs.append(_tokens_first(output))
    return _joined(outputs)


# ------------------------------------------------------------------------------------------------------ flash, on CUDA


# Several query heads may share a key head in the kernel (`mha_varlen_fwd`, `mha_varlen_bwd`). Since torch 2.12
# `varlen_attn` wants to be told that this is meant; before, it had no such argument and asked for none.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def has_flash_cuda(target: Target, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel of variable length takes these on a CUDA device. A card that a step is only meant for is taken
    to have a PyTorch with flash attention."""
    return (
        target.type == "cuda"
        and target.capability >= (8, 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= FLASH_HEAD_DIM
        and query.shape[-1] % 8 == 0
        and (not query.is_cuda or torch.backends.cuda.is_flash_attention_available())
    )


def _flash_cuda(query: Tensor, key: Tensor, value: Tensor, mask: SegmentMask, scaling: float | None) -> Tensor:
    """All segments in one kernel. A window of n is n - 1 tokens back and none ahead."""
    offsets, longest = mask.segments.offsets, mask.segments.longest
    window = (-1 if mask.window is None else mask.window - 1, 0)
    options = GROUPED if query.shape[1] != key.shape[1] else {}
    return varlen_attn(
        query, key, value, offsets, offsets, longest, longest, scale=scaling, window_size=window, **options
    )


# ----------------------------------------------------------------------------------------------------- flash, on a CPU


def has_flash_cpu(target: Target, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the CPU's flash kernel takes these."""
    return target == CPU and query.shape[-1] == value.shape[-1]


class _FlashCpu(torch.autograd.Function):
    """`plain_attention` with each output kept once: autograd would keep those of the parts beside the whole."""

    @staticmethod
    def forward(ctx, query, key, value, mask: SegmentMask, scaling: float | None) -> Tensor:
        outputs, sums = [], []
        for (count, length), *parts in _parts(mask.segments.runs(), query, key, value):
            window = mask.window_mask(length, query)
            parts = (_heads_first(part, count, length) for part in parts)
            output, log_sum = _flash_cpu(*parts, 0.0, window is None, attn_mask=window, scale=scaling)
            outputs.append(_tokens_first(output))
            sums.append(log_sum.transpose(1, 2).flatten(0, 1))  # (tokens, heads)
        output = _joined(outputs)
        ctx.save_for_backward(query, key, value, output, _joined(sums))
        ctx.mask, ctx.scaling = mask, scaling
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, output, sums = ctx.saved_tensors
        gradients = []
        for (count, length), grad, *parts, log_sum in _parts(
            ctx.mask.segments.runs(), grad_output, query, key, value, output, sums
        ):
            # In 16 bits the kernel takes five times as long (torch 2.13, AMX), and rounds in between.
            parts = [part.float() if part.itemsize == 2 else part for part in (grad, *parts)]
            window = ctx.mask.window_mask(length, parts[0])
            found = _flash_cpu_backward(
                *(_heads_first(part, count, length) for part in parts),
                log_sum.unflatten(0, (count, length)).transpose(1, 2),
                0.0, window is None, attn_mask=window, scale=ctx.scaling,
            )  # fmt: skip
            del parts
            gradients.append([part.to(query.dtype) for part in found])
            del found
        parts = [[_tokens_first(part) for part in each] for each in zip(*gradients, strict=True)]
        del gradients
        return (*(_joined(each) for each in parts), None, None)


def _parts(runs: list[tuple[int, int]], *tensors: Tensor) -> Iterator[tuple]:
    """Each run with its part of every tensor, (tokens, …)."""
    sizes = [count * length for count, length in runs]
    return zip(runs, *(tensor.split(sizes) for tensor in tensors), strict=True)


def _heads_first(part: Tensor, count: int, length: int) -> Tensor:
    """(count · length, heads, head_dim) → (count, heads, length, head_dim)."""
    return part.unflatten(0, (count, length)).transpose(1, 2)


def _tokens_first(part: Tensor) -> Tensor:
    """(count, heads, length, head_dim) → (count · length, heads, head_dim)."""
    return part.transpose(1, 2).flatten(0, 1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, segment_mask)
