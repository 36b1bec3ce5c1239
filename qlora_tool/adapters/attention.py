"""Adapters that sit on attention itself: LLaMA-Adapter's prompts, in the top layers of the families that PEFT has."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.errors import UserError
from qlora_tool.model.text_part import text_modules
from qlora_tool.sizes import counted
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import Adaptable, FrozenLinear

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig
    from qlora_tool.methods.llama_adapter import LlamaAdapter

NAMES = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}  # of attention, by family: those of PEFT
_APART, _FUSED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("c_attn", "c_proj")


class PromptedAttention(Adaptable):
    """What adapters on one attention module sit on. It is a module inside of that one, whose forward pass it takes
    over."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.take_adapters()
        attention.forward = functools.partial(_prompted_forward, attention)


def find_attention(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The attention modules of the top layers, as many as `adapter_layers` says, by name.

    Raises:
        UserError: another family, or more layers than there are.
    """
    found = all_attention(model)
    layers = getattr(config, "adapter_layers", None) or len(found)
    if layers > len(found):
        raise UserError(f"adapter.adapter_layers: {layers}, but the model has {counted(len(found), 'layer')}; set that "
                        "or less")  # fmt: skip
    return dict(list(found.items())[-layers:])


def all_attention(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a model that can take prompts, by name, from the lowest layer up.

    Raises:
        UserError: another family.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    ending = f".{NAMES[kind]}" if kind in NAMES else None
    found = {name: module for name, module in text_modules(model).items()
             if ending and name.endswith(ending) and is_attention(module)}  # fmt: skip
    if not found:
        raise UserError(
            f"adapter.method: llama_adapter puts prompts into the attention of {', '.join(NAMES)}, as PEFT does, "
            f"and this model is {kind}; choose another method"
        )
    return found


def is_attention(module: nn.Module) -> bool:
    """Whether a module is attention whose projections are known: four apart, or q, k and v in one as gpt2 has them."""
    return any(all(isinstance(getattr(module, part, None), FrozenLinear) for part in parts)
               for parts in (_APART, _FUSED))  # fmt: skip


def query_weight(attention: Any) -> WeightHandle:
    """The handle of what makes queries: (out, hidden)."""
    weight: WeightHandle = (attention.q_proj if hasattr(attention, "q_proj") else attention.c_attn).weight
    return weight


def prompted(attention: nn.Module) -> PromptedAttention:
    """What the adapters of an attention module are added to; it is made where there is none yet."""
    if "prompted" not in attention._modules:
        attention.add_module("prompted", PromptedAttention(attention))
    found = attention.prompted
    assert isinstance(found, PromptedAttention)
    return found


def _prompted_forward(attention: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """transformers' own forward pass, and what the prompts add to its output."""
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    output, *rest = type(attention).forward(attention, *args, **kwargs)
    for adapter in prompted(attention).adapters_in_use():
        if hasattr(attention, "c_attn"):
            added = _attended_by_gpt2(attention, adapter, hidden_states)
        else:
            rotation = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
            added = _attended(attention, adapter, hidden_states, *rotation)
        output = output + added
    return (output, *rest)


def _attended(attention: Any, adapter: Adapter, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the prompts of one adapter add: x (batch, tokens, hidden) → the same; cos and sin (batch, tokens, d)."""
    width = attention.head_dim
    prompts = adapter.tensors["adaption_prompt"].to(x.dtype)  # (1, n, hidden)
    q, k, v = (_heads(projection(one), width) for projection, one in
               ((attention.q_proj, x), (attention.k_proj, prompts), (attention.v_proj, prompts)))  # fmt: skip
    method = cast("LlamaAdapter", adapter.method)
    attended = method.attended(adapter, _rotated(q, cos.unsqueeze(1), sin.unsqueeze(1)), k, v)
    added: Tensor = attention.o_proj(attended)
    return added


def _attended_by_gpt2(attention: Any, adapter: Adapter, x: Tensor) -> Tensor:
    """The same in gpt2, which has no rotation; as in PEFT, what is attended to does not go through the output
    projection."""
    prompts = adapter.tensors["adaption_prompt"].to(x.dtype)  # (1, n, hidden)
    q = attention.c_attn(x).chunk(3, -1)[0]
    _, k, v = attention.c_attn(prompts).chunk(3, -1)
    method = cast("LlamaAdapter", adapter.method)
    return method.attended(adapter, *(_heads(one, attention.head_dim) for one in (q, k, v)))


def _heads(x: Tensor, width: int) -> Tensor:
    """(batch, tokens, heads · width) → (batch, heads, tokens, width)."""
    apart: Tensor = x.unflatten(-1, (-1, width))  # torch leaves this method untyped
    return apart.transpose(1, 2)


def _rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, equation 34), the halves of q being the two coordinates of each angle."""
    first, second = q.chunk(2, dim=-1)
    return q * cos + torch.cat([-second, first], -1) * sin
