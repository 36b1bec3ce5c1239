"""Rotary embeddings that depend on a sequence's length (dynamic NTK, longrope): by the length of each example.

transformers takes the greatest position of a batch, so that a long example changes the numbers of a short one in it,
and dynamic ones keep the frequencies of the longest batch that there was. Here each example has those that it has alone
and first. Lengths are known without looking at positions, so that a step can be traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_tool.model.layout import Layout, current_layout
from qlora_tool.model.trials import subclass

BY_LENGTH = ("dynamic", "longrope")


def rotate_by_example(model: nn.Module) -> list[str]:
    """Let rotary embeddings that depend on a length take that of each example, where it is known where a batch has its
    examples.

    Returns:
        The names of their modules.
    """
    found = [name for name, module in model.named_modules() if depends_on_length(module)]
    for name in found:
        module = model.get_submodule(name)
        module.__class__ = _class_by_example(type(module))
    return found


def depends_on_length(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding of transformers' form whose frequencies depend on a length."""
    kinds = getattr(module, "rope_type", None)
    kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    return any(kind in BY_LENGTH for kind in kinds) and any(name.endswith("inv_freq") for name in module._buffers)


@cache
def _class_by_example(kind: type[nn.Module]) -> type[nn.Module]:
    plain = inspect.unwrap(kind.forward)  # without the decorator that looks at the positions

    def forward(self: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        of_layer = {} if layer_type is None else {"layer_type": layer_type}
        rope_type = self.rope_type if layer_type is None else self.rope_type[layer_type]
        layout = current_layout()
        known = layout is not None and position_ids.shape[-1] == layout.length
        if rope_type not in BY_LENGTH or not known:
            return kind.forward(self, x, position_ids, **of_layer)
        with torch.no_grad():
            return _rotations(_OfLength(self, rope_type, layer_type, partial(plain, self, x, **of_layer)),
                              position_ids, layout)  # fmt: skip

    return subclass(kind, forward)


@dataclass(frozen=True)
class _OfLength:
    """A rotary embedding as it is for sequences of one length, whatever it saw before.

    Attributes:
        rotate: positions → cosines and sines, by the module's own code.
    """

    module: nn.Module
    rope_type: str
    layer_type: str | None
    rotate: Callable[[Tensor], tuple[Tensor, Tensor]]

    def like(self, length: int) -> int:
        """A length that has the same frequencies: one for all that need no others than those that were trained."""
        config = self.module.config
        if self.rope_type == "dynamic":
            return max(length, int(config.max_position_embeddings))
        parameters = config.rope_parameters if self.layer_type is None else config.rope_parameters[self.layer_type]
        limit = parameters["original_max_position_embeddings"]
        return int(limit) + (length > limit)

    def __call__(self, length: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        of_layer = {} if self.layer_type is None else {"layer_type": self.layer_type}
        name = "inv_freq" if self.layer_type is None else f"{self.layer_type}_inv_freq"
        frequencies, _ = ROPE_INIT_FUNCTIONS[self.rope_type](
            self.module.config, positions.device, seq_len=length, **of_layer
        )
        own = self.module._buffers[name]
        self.module._buffers[name] = frequencies
        try:
            return self.rotate(positions)
        finally:
            self.module._buffers[name] = own


def _rotations(embedding: _OfLength, position_ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (rows, length, …): made once for lengths of the same frequencies, then put together."""
    kinds = [embedding.like(length) for length in layout.lengths]
    if len(set(kinds)) == 1:
        return embedding(kinds[0], position_ids)
    tables = {}
    for kind in set(kinds):
        longest = max(length for length, of in zip(layout.lengths, kinds, strict=True) if of == kind)
        tables[kind] = embedding(kind, torch.arange(longest, device=position_ids.device).unsqueeze(0))
    parts = [[table[0, :length] for table in tables[kind]] for length, kind in zip(layout.lengths, kinds, strict=True)]
    cosines, sines = (torch.cat(each).unflatten(0, (layout.rows, layout.length)) for each in zip(*parts, strict=True))
    return cosines, sines
