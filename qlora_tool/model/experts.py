"""The forward pass of a mixture of experts whose weights lie behind handles.

transformers keeps the experts of a layer in three-dimensional parameters and lets their forward pass be chosen by
name; this one asks for one expert's matrix at a time, so a layer never holds all of its experts unquantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora_tool.ops.linear import frozen_linear
from qlora_tool.weights.modules import ExpertsWeight

IMPLEMENTATION = "qlora_tool"

Branch = Callable[[Tensor], Tensor]  # x (n, in) → (n, out)
Shares = Callable[[int, int], Sequence[int]]
_assumed: ContextVar[Shares | None] = ContextVar("assumed_routing", default=None)


@contextmanager
def assuming_routing(shares: Shares) -> Iterator[None]:
    """Meanwhile `shares(tokens · k, experts)` says how many tokens each expert gets, whatever the router says.

    For tensors without data, where no router says anything, and to measure with the same sizes. Tokens then go to
    experts they were not meant for. What is assumed already stays.
    """
    before = _assumed.set(_assumed.get() or shares)
    try:
        yield
    finally:
        _assumed.reset(before)


def even_shares(total: int, experts: int) -> list[int]:
    """Every expert gets as many as every other, the first ones one more where that does not come out."""
    share, more = divmod(total, experts)
    return [share + (index < more) for index in range(experts)]


def experts_forward(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Each token through its experts, weighted and summed.

    Args:
        module: transformers' experts module; its `gate_up_proj` (or `up_proj`) and `down_proj` are `WeightHandle`s.
        hidden: (tokens, hidden).
        top_k_index: (tokens, k), which experts.
        top_k_weights: (tokens, k), their weights.

    Returns:
        (tokens, hidden).
    """
    branches = {name: _branches(place, hidden.dtype) for name, place in getattr(module, "adapted", {}).items()}
    k = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)  # (tokens·k,): grouped by expert
    tokens = order // k
    counts = _tokens_per_expert(experts, module.num_experts)
    outputs = [
        _expert(module, rows, index, branches)
        for index, rows in enumerate(hidden[tokens].split(counts[: module.num_experts]))
        if rows.shape[0]
    ]
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order].unsqueeze(-1)  # (tokens·k, hidden)
    result = torch.zeros_like(hidden)
    return result.index_add(0, tokens, weighted.to(hidden.dtype))


def _tokens_per_expert(experts: Tensor, count: int) -> list[int]:
    """How many of `experts` (tokens·k,), in ascending order, name each expert. The host needs to know: this waits for
    the device, once."""
    if (shares := _assumed.get()) is not None:
        return list(shares(experts.shape[0], count))
    starts = torch.searchsorted(experts, torch.arange(count + 1, device=experts.device)).tolist()
    return [end - start for start, end in pairwise(starts)]


def _branches(place: ExpertsWeight, dtype: torch.dtype) -> list[list[Branch]]:
    """What each active adapter adds to the product of each expert."""
    return [adapter.expert_branches(dtype) for adapter in place.adapters_in_use()]


def _expert(module: nn.Module, x: Tensor, index: int, branches: Mapping[str, list[list[Branch]]]) -> Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    x = _product(module, first, x, index, branches.get(first, ()))
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _product(module, "down_proj", x, index, branches.get("down_proj", ()))
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _product(module: nn.Module, name: str, x: Tensor, index: int, adapters: Sequence[list[Branch]]) -> Tensor:
    added = [of_experts[index](x) for of_experts in adapters]
    y = frozen_linear(x, getattr(module, name), index)
    for branch in added:
        y = y + branch
    return y + getattr(module, f"{name}_bias")[index].to(y.dtype) if module.has_bias else y


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers lets this module's forward pass be chosen, and it computes as `experts_forward` does."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def expert_weight_names(module: nn.Module) -> list[str]:
    """The three-dimensional parameters of an experts module."""
    return [name for name, parameter in module.named_parameters(recurse=False)
            if is_expert_weight(module, parameter.shape)]  # fmt: skip


def is_expert_weight(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape, of this module, holds experts' matrices: `experts_forward` asks a handle."""
    return len(shape) == 3 and is_experts_module(module)


def use_expert_handles(model: nn.Module) -> None:
    """Let the model's experts run through `experts_forward`."""
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    model.set_experts_implementation(IMPLEMENTATION)
