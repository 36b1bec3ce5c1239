"""The forward pass of a mixture of experts whose weights lie behind handles.

transformers keeps the experts of a layer in three-dimensional parameters and lets their forward pass be chosen by
name; this one asks for the matrices of one expert, or of a few, at a time, so a layer never holds all of its experts
unquantized. On a CPU it goes from expert to expert. On a CUDA device, where each small operation costs the host more
than the card, all experts of a layer go through the same few (`ops/grouped.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora_tool.ops.declare import target_of
from qlora_tool.ops.grouped import Groups, grouped_frozen_linear
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
    k = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)  # (tokens·k,): grouped by expert
    tokens = order // k
    run = _all_experts if takes_together(module, hidden) else _one_after_another
    weighted = run(module, hidden, tokens, experts) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    result = torch.zeros_like(hidden)
    return result.index_add(0, tokens, weighted.to(hidden.dtype))


def takes_together(module: nn.Module, hidden: Tensor) -> bool:
    """Whether all experts of a module go through the same operations: on CUDA devices, where every active adapter of
    theirs says what it adds for all of them."""
    if target_of(hidden).type != "cuda":
        return False
    adapters = (one for place in getattr(module, "adapted", {}).values() for one in place.adapters_in_use())
    return all(getattr(one, "grouped_branch", None) is not None for one in adapters)


def _starts(experts: Tensor, count: int) -> Tensor:
    """(count + 1,): where in `experts` (tokens·k,), in ascending order, each expert begins, and where the last ends."""
    return torch.searchsorted(experts, torch.arange(count + 1, device=experts.device))


# ------------------------------------------------------------------------------------------------------ all together


def _all_experts(module: nn.Module, hidden: Tensor, tokens: Tensor, experts: Tensor) -> Tensor:
    """What each of `experts` (n,), in ascending order, makes of the one of `tokens` (n,) beside it → (n, hidden)."""
    groups = _groups(experts, module.num_experts)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    x = _grouped_product(module, first, hidden[tokens], groups)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _grouped_product(module, "down_proj", x, groups)
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _groups(experts: Tensor, count: int) -> Groups:
    """The host needs to know how many tokens there are of each expert: this waits for the device, once."""
    if (shares := _assumed.get()) is not None:
        counts = tuple(shares(experts.shape[0], count))
        return Groups(counts, torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=experts.device))
    starts = _starts(experts, count)
    return Groups(tuple(end - start for start, end in pairwise(starts.tolist())), starts[1:].to(torch.int32))


def _grouped_product(module: nn.Module, name: str, x: Tensor, groups: Groups) -> Tensor:
    places = getattr(module, "adapted", {})
    adapters = places[name].adapters_in_use() if name in places else ()
    added = [adapter.grouped_branch(x, groups) for adapter in adapters]
    y = grouped_frozen_linear(x, getattr(module, name), groups)
    while added:
        y = y.add_(added.pop(0))
    return y.add_(groups.of_experts(getattr(module, f"{name}_bias").to(y.dtype))) if module.has_bias else y


# ------------------------------------------------------------------------------------------------ one after another


def _one_after_another(module: nn.Module, hidden: Tensor, tokens: Tensor, experts: Tensor) -> Tensor:
    """The same, an expert at a time."""
    branches = {name: _branches(place, hidden.dtype) for name, place in getattr(module, "adapted", {}).items()}
    counts = _tokens_per_expert(experts, module.num_experts)
    outputs = [
        _expert(module, rows, index, branches)
        for index, rows in enumerate(hidden[tokens].split(counts[: module.num_experts]))
        if rows.shape[0]
    ]
    return torch.cat(outputs)


def _tokens_per_expert(experts: Tensor, count: int) -> list[int]:
    if (shares := _assumed.get()) is not None:
        return list(shares(experts.shape[0], count))
    return [end - start for start, end in pairwise(_starts(experts, count).tolist())]


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
