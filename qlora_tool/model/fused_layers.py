"""Decoder layers whose residual sums and norms take one pass over memory: x + attention and the norm of it forward, and
backward the gradients of x through a norm and beside it.

A layer is found by what its code does with four modules under the names of the field, tried on stand-ins for them:

    x = x + self_attn(input_layernorm(x), …)[0]        y = x + mlp(post_attention_layernorm(x))

where everything else that the layer is given goes on to its attention.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_tool.model.trials import AsText, attributes_of, subclass, trying, twin
from qlora_tool.ops.norm import NormKind, add_and_norm, pass_and_norm
from qlora_tool.ops.one_pass import in_one_pass

CHILDREN = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})


class Norm(NamedTuple):
    """How a norm of a layer computes; see `ops.norm`."""

    kind: NormKind
    eps: float

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the operation gives what the module would. A weight of a wider dtype would widen what was rounded."""
        weight = weight_of(module)
        return weight is None or (
            not weight.requires_grad and (not self.kind.rounds or weight.dtype == x.dtype)
        )


def weight_of(norm: nn.Module) -> Tensor | None:
    """Its weight; None where it has none."""
    weight: Tensor | None = getattr(norm, "weight", None)
    return weight


def is_pre_norm(layer: nn.Module) -> bool:
    """Whether a layer computes the two lines above."""
    return {name for name, _ in layer.named_children()} == CHILDREN and _tried(type(layer), attributes_of(layer))


class _Attention(nn.Module):
    """Stands in for attention, and notes what it is given."""

    def forward(self, *, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        self.given = options
        return hidden_states.cos(), None


class _Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@functools.lru_cache(maxsize=64)
def _tried(kind: type[nn.Module], attributes: AsText) -> bool:
    with trying():
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        layer, attention = twin(kind, attributes), _Attention()
        layer.training = True  # so that dropout shows
        layer.gradient_checkpointing = False
        functions = {"input_layernorm": torch.sin, "post_attention_layernorm": torch.tanh, "mlp": torch.exp}
        layer.self_attn = attention
        for name, function in functions.items():
            setattr(layer, name, _Applied(function))
        options: dict[str, Any] = {name: object() for name in (*_named_options(kind), "something_else")}
        try:
            found = kind.forward(layer, x, **options)
        except Exception:  # it takes or does something else, whatever that is
            return False
        middle = x + x.sin().cos()
        expected = middle + middle.tanh().exp()
        given = getattr(attention, "given", {})
        layer.mlp = _Applied(lambda hidden: (hidden.exp(), None))  # with experts, say, and what they were chosen by
        try:
            kind.forward(layer, x, **options)
            return False  # its code looks at what the MLP gives
        except TypeError:  # a sum of a tensor and a tuple
            pass
        return (
            isinstance(found, Tensor) and torch.allclose(found, expected)
            and given.keys() == options.keys() and all(given[name] is value for name, value in options.items())
        )  # fmt: skip


def _named_options(kind: type[nn.Module]) -> dict[str, Any]:
    """The layer's arguments after the hidden states, with their defaults."""
    _, _, *rest = inspect.signature(kind.forward).parameters.values()
    named = (one for one in rest if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))
    return {one.name: one.default for one in named}


@functools.cache
def layer_class(kind: type[nn.Module], first: Norm, second: Norm) -> type[nn.Module]:
    """A subclass of a layer of the kind that `is_pre_norm` finds, whose norms these are."""
    defaults = {name: value for name, value in _named_options(kind).items() if value is not inspect.Parameter.empty}

    def forward(self: Any, hidden_states: Tensor, *rest: Any, **options: Any) -> Tensor:
        before, between = self.input_layernorm, self.post_attention_layernorm
        taken = in_one_pass(hidden_states) and all(
            norm.takes(module, hidden_states) for norm, module in ((first, before), (second, between))
        )
        if rest or not taken:
            result: Tensor = kind.forward(self, hidden_states, *rest, **options)
            return result
        x, normed = pass_and_norm(hidden_states, weight_of(before), first.eps, first.kind)
        update = self.self_attn(hidden_states=normed, **(defaults | options))[0]
        if update.dtype == x.dtype:
            x, normed = add_and_norm(x, update, weight_of(between), second.eps, second.kind)
        else:
            x = x + update
            normed = between(x)
        return x + self.mlp(normed)

    return subclass(kind, forward)
