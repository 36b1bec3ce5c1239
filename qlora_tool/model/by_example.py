"""Modules that mix tokens by other means than attention (recurrences, convolutions), run on each example by itself.

In a packed row their state would run on from one example into the next. Here such a module gets the examples of a batch
as rows of their own, those of about one length together, and what it gives is put back in its place: the module's own
code and kernels on the numbers that each example alone would give them. What fills a row up comes after the example,
where causal code does not see it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from qlora_tool.model.checkpointing import decoder_layers
from qlora_tool.model.layout import Layout, current_layout
from qlora_tool.model.trials import subclass


def keep_mixers_apart(model: nn.Module) -> list[str]:
    """Let modules that convolve along the tokens, recurrences around such a convolution included, run on each example
    by itself, where it is known where a batch has its examples.

    Returns:
        Their names.
    """
    layers = list(decoder_layers(model))
    found = [
        name for name, module in model.named_modules()
        if is_mixer(module) and any(name.startswith(f"{layer}.") for layer in layers)
    ]  # fmt: skip
    for name in found:
        module = model.get_submodule(name)
        module.__class__ = _class_by_example(type(module))
    return found


def is_mixer(module: nn.Module) -> bool:
    """Whether a module has a convolution along the tokens for a child, whose weight it may use by itself."""
    convolutions = [child for child in module.children() if isinstance(child, nn.Conv1d)]
    return any(child.kernel_size[0] > 1 and child.stride == (1,) for child in convolutions)


@cache
def _class_by_example(kind: type[nn.Module]) -> type[nn.Module]:
    signature = inspect.signature(kind.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layout = current_layout()
        if layout is None or layout.is_by_rows:
            return kind.forward(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        for name in given.arguments:
            if name.endswith("_mask"):
                given.arguments[name] = None  # of padding, and there is none left
        return run_by_example(layout, kind.forward, given)

    return subclass(kind, forward)


def run_by_example(layout: Layout, forward: Callable[..., Any], given: inspect.BoundArguments) -> Any:
    """What a forward pass gives on each example by itself: every tensor of it is (rows, length, …).

    Args:
        given: its arguments; every tensor (rows, length, …) among them is cut to examples.
    """
    whole = (layout.rows, layout.length)
    arguments, shape = tree_flatten((given.args, given.kwargs))
    cut = [isinstance(value, Tensor) and value.shape[:2] == whole for value in arguments]
    groups, back = layout.places(arguments[cut.index(True)].device)
    outputs = []
    for tokens in groups:
        part = [value.flatten(0, 1)[tokens] if fits else value for value, fits in zip(arguments, cut, strict=True)]
        args, kwargs = tree_unflatten(part, shape)
        leaves, form = tree_flatten(forward(*args, **kwargs))
        outputs.append(leaves)
    joined = [_joined(parts)[back].unflatten(0, whole) if isinstance(parts[0], Tensor) else parts[0]
              for parts in zip(*outputs, strict=True)]  # fmt: skip
    return tree_unflatten(joined, form)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(examples, longest, …) of every group → (all of their tokens, …)."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
