"""The modules that hold frozen weights behind handles.

Each takes the place of a transformers module, or makes one its own. A weight is always (out, in) here; a Conv1D's
(in, out) is turned on the way in and back on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qlora_tool.errors import UserError
from qlora_tool.ops.linear import frozen_linear
from qlora_tool.weights.handles import WeightHandle


class Adaptable(nn.Module):
    """What adapters sit on: they are added by name, and it computes with the active ones.

    Attributes:
        adapters: by name.
    """

    _active: tuple[str, ...]

    def take_adapters(self) -> None:
        """Be ready to take adapters."""
        self.adapters = nn.ModuleDict()
        self._active = ()

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of the adapters that it computes with."""
        return self._active

    @property
    def adapter(self) -> nn.Module | None:
        """The active adapter where there is just one, else None."""
        return self.adapters[self._active[0]] if len(self._active) == 1 else None

    def add_adapter(self, name: str, adapter: nn.Module) -> None:
        """Add an adapter, or replace the one of this name, and let it be the only active one."""
        self.adapters[name] = adapter
        self.set_adapters([name])

    def set_adapters(self, names: Sequence[str]) -> None:
        """Choose the active adapters; none: the base alone.

        Raises:
            ValueError: a name that no adapter here has.
            UserError: one of several does more than add, so the others cannot be added to it.
        """
        if missing := [name for name in names if name not in self.adapters]:
            raise ValueError(f"no adapter {missing[0]!r} on this module: it has {', '.join(self.adapters) or 'none'}")
        for name in names if len(names) > 1 else ():
            if getattr(self.adapters[name], "branch", None) is None:
                others = ", ".join(repr(other) for other in names if other != name)
                kind = getattr(self.adapters[name], "method", type(self.adapters[name]).__name__)
                raise UserError(
                    f"the adapter {name!r} ({kind}) cannot be active together with {others}: it does more than add to "
                    f"the base's output; activate it alone, or merge it first"
                )
        self._active = tuple(names)

    def adapters_in_use(self) -> list[Any]:
        """The active adapters themselves."""
        return [self.adapters[name] for name in self._active]


class FrozenEmbedding(Adaptable, nn.Embedding):
    """Embeddings behind a handle, in int8 or as they are stored: the rows that are asked for, and they alone, are
    brought to the dtype of products.

    An adapter on it has `rows(index, looked_up, weight)`: index of any shape, the rows (*index.shape, dim) that the
    base, and adapters before it, have there, and the handle of them all → those it gives."""

    weight: WeightHandle  # type: ignore[assignment]  # set when the weight is read
    row_dtype: nn.Parameter

    @staticmethod
    def take_over(embedding: nn.Embedding, dtype: torch.dtype, device: torch.device) -> nn.Parameter | None:
        """Make one of `embedding` itself, without a weight yet, to give rows in `dtype`. What a subclass adds to
        `super().forward` (gemma's scale) it goes on to add.

        Returns:
            The weight that it had.
        """
        kind = type(embedding)
        bases = (FrozenEmbedding,) if kind is nn.Embedding else (kind, FrozenEmbedding)
        embedding.__class__ = FrozenEmbedding if kind is nn.Embedding else type(kind.__name__, bases, {})
        weight = embedding._parameters.pop("weight")
        # Models take the dtype of their first parameter for their own (openai-gpt does): this one, without elements,
        # goes before the codes.
        embedding.row_dtype = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        FrozenEmbedding.take_adapters(embedding)  # type: ignore[arg-type]  # which it is by now
        return weight

    @staticmethod
    def can_take_over(embedding: nn.Module | None) -> bool:
        """Whether a module does nothing with its weight but look rows up in it, the way nn.Embedding does."""
        if isinstance(embedding, FrozenEmbedding):
            return True
        if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
            return False
        names = getattr(getattr(type(embedding).forward, "__code__", None), "co_names", ())
        return type(embedding) is nn.Embedding or ("super" in names and "embedding" not in names)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.rows(input).to(self.row_dtype.dtype)
        for adapter in self.adapters_in_use():
            rows = adapter.rows(input, rows, self.weight)
        return rows


class LinearAdapter(Protocol):
    """What a `FrozenLinear` asks of an adapter.

    One whose effect is a sum, and which can be active beside others, also has `branch(x)`: x (…, in) → (…, out), what
    it adds to the product, its dropout included.
    """

    def __call__(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        """x (…, in) → (…, out): the linear with this adapter alone, bias included."""
        ...


class FrozenLinear(Adaptable):
    """y = x·Wᵀ + b with W behind a handle, and what its active adapters make of it.

    Args:
        in_features, out_features: of W (out, in).
        bias: (out,) or None.
        transposed: the module it replaces keeps its weight as (in, out) (transformers' Conv1D).

    Attributes:
        weight: the handle of W; set when the weight is read.
        adapters: by name; what they compute is in `LinearAdapter`.
    """

    weight: WeightHandle
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.register_parameter("bias", bias)
        self.take_adapters()

    def forward(self, x: Tensor) -> Tensor:
        if len(self._active) == 1:
            return cast(LinearAdapter, self.adapters[self._active[0]])(x, self)
        # Branches come first: they are all that backward needs, so recomputation ends before the base product.
        branches = [self.adapters[name].branch(x) for name in self._active]  # type: ignore[operator]
        y = self.product(x)
        for branch in branches:
            y = y + branch
        return self.with_bias(y)

    def with_bias(self, y: Tensor) -> Tensor:
        """y (…, out) + b, where there is one."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x (…, in) · Wᵀ → (…, out), without bias or adapter."""
        if self.weight.is_trained:
            return nn.functional.linear(x, self.weight.dense(x.dtype))
        return frozen_linear(x, self.weight)

    def extra_repr(self) -> str:
        kind = self.weight.kind if hasattr(self, "weight") else "unread"
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={kind}"

class ExpertsWeight(Adaptable):
    """What adapters of one three-dimensional weight of experts sit on; the experts themselves have its handle.

    An adapter on it has `expert_branches(dtype)`: what it adds to the product of each expert, a function
    x (n, in) → (n, out) an expert; and `grouped_branch`, a function of x (n, in) and its `Groups` that gives the same
    for all experts, or None.

    Args:
        weight: the handle of W (experts, out, in).
    """

    def __init__(self, weight: WeightHandle) -> None:
        super().__init__()
        self._weight = [weight]  # not a child: it is one of the experts' module already
        self.take_adapters()

    @property
    def weight(self) -> WeightHandle:
        """The handle of W (experts, out, in)."""
        return self._weight[0]
