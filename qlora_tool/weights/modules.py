"""The modules that hold frozen weights, and the handle through which everything asks for them.

Each takes the place of a transformers module, or makes one its own. A weight is always (out, in) here; a Conv1D's
(in, out) is turned on the way in and back on the way out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_tool.ops.linear import frozen_linear
from qlora_tool.weights.quantized import QuantizedTensor

if TYPE_CHECKING:
    from qlora_tool.adapters.adapter import Adapter


class FrozenWeight(nn.Module):
    """The handle of one frozen weight, quantized or plain. Its tensors are buffers, so they are seen by all that walks
    a model; how they are stored is nobody else's concern."""

    def __init__(self, value: QuantizedTensor | Tensor):
        super().__init__()
        self.shape = torch.Size(value.shape)
        self._held: Tensor | None = None
        if isinstance(value, QuantizedTensor):
            self._description = value.map(lambda tensor: tensor.new_empty(0, device="meta"))
            for name, tensor in value.tensors().items():
                self.register_buffer(name, tensor)
        else:
            self._description = None
            # A parameter, so that one tied to another module's stays the same object.
            self.plain = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)

    @property
    def quantized(self) -> QuantizedTensor | None:
        """The quantized tensor, or None where the weight is plain."""
        if self._description is None:
            return None
        return replace(self._description, **{name: getattr(self, name) for name in self._description.tensors()})

    @property
    def is_trained(self) -> bool:
        return self._description is None and self.plain.requires_grad

    @property
    def dtype(self) -> torch.dtype:
        return self.plain.dtype if self._description is None else self._description.dtype

    @property
    def device(self) -> torch.device:
        return self.plain.device if self._description is None else self.codes.device

    def dense(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The weight in `dtype`: (out, in), or one expert's."""
        if self._held is not None and self._held.dtype == dtype:
            return self._held if expert is None else self._held[expert]
        if (quantized := self.quantized) is not None:
            return (quantized if expert is None else quantized.expert(expert)).dequantize(dtype)
        return (self.plain if expert is None else self.plain[expert]).to(dtype)

    def __matmul__(self, x: Tensor) -> Tensor:
        """W (out, in) · x (…, in, n) → (…, out, n): some families multiply by a weight themselves (mamba's dt_proj)."""
        return frozen_linear(x.transpose(-1, -2), self).transpose(-1, -2)

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the weight dense in `dtype` until `release`: for many products in a row, as in generation."""
        self._held = self.dense(dtype)

    def release(self) -> None:
        self._held = None


class FrozenEmbedding(nn.Embedding):
    """Embeddings in int8 behind a handle: the rows that are asked for, and they alone, are brought to its dtype."""

    weight: FrozenWeight | None

    @staticmethod
    def take_over(embedding: nn.Embedding) -> None:
        """Make one of `embedding` itself, without a weight yet. What a subclass adds to `super().forward` (gemma's
        scale) it goes on to add."""
        kind = type(embedding)
        bases = (FrozenEmbedding,) if kind is nn.Embedding else (kind, FrozenEmbedding)
        embedding.__class__ = FrozenEmbedding if kind is nn.Embedding else type(kind.__name__, bases, {})
        del embedding.weight
        embedding.weight = None

    @staticmethod
    def can_take_over(embedding: nn.Module | None) -> bool:
        """Whether a module does nothing with its weight but look rows up in it, the way nn.Embedding does."""
        if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
            return False
        names = getattr(getattr(type(embedding).forward, "__code__", None), "co_names", ())
        return type(embedding) is nn.Embedding or ("super" in names and "embedding" not in names)

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.quantized.dequantize(self.weight.dtype, rows=input)


class FrozenLinear(nn.Module):
    """y = x·Wᵀ + b with W behind a handle, and what an adapter makes of it.

    Args:
        in_features, out_features: of W (out, in).
        bias: (out,) or None.
        transposed: the module it replaces keeps its weight as (in, out) (transformers' Conv1D).
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, transposed: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.weight: FrozenWeight | None = None  # set when the weight is read
        self.register_parameter("bias", bias)
        self.adapter: Adapter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is not None:
            return self.adapter(x, self)
        return self.with_bias(self.product(x))

    def with_bias(self, y: Tensor) -> Tensor:
        """y (…, out) + b, where there is one."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x (…, in) · Wᵀ → (…, out), without bias or adapter."""
        if self.weight.is_trained:
            return nn.functional.linear(x, self.weight.plain.to(x.dtype))
        return frozen_linear(x, self.weight)

    def extra_repr(self) -> str:
        kind = "unread" if self.weight is None else self.weight.quantized.kind if self.weight.quantized else "plain"
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={kind}"
