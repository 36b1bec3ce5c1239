"""The handle of one frozen weight: what the rest of the program asks for it.

Nobody else knows how a weight is stored. A handle is resident here: its tensors lie on the device of the products, or
are sharded over processes by `fully_shard`, which takes them as it takes any parameter. One that keeps them elsewhere
(streams them) overrides `_store`, `tensors` and `_fetch`, and nothing that uses handles changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, Token
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qlora_tool.ops.linear import frozen_linear
from qlora_tool.weights.quantized import QuantizedTensor

Role = Literal["codes", "quantization_state", "unquantized"]


class KeptWeights:
    """Weights that are dequantized while it is open are kept until they are asked for again, once.

    It is opened where a part of a model is computed again within a backward pass, whose gradients need the same
    weights. Each is given up with its use, what was left when it is opened again, and what no gradient needed (those of
    the first layer's input are nobody's) when the backward pass ends.
    """

    def __init__(self) -> None:
        self._handles: list[WeightHandle] = []
        self._opened: list[Token[KeptWeights | None]] = []

    def __enter__(self) -> KeptWeights:
        self.release()
        in_backward = torch._C._current_graph_task_id() >= 0
        if in_backward:  # elsewhere nothing would say when to give up what is left
            torch.autograd.Variable._execution_engine.queue_callback(self.release)
        # Of this thread: a card's backward has its own.
        self._opened.append(_keeping.set(self if in_backward else None))
        return self

    def __exit__(self, *raised: object) -> None:
        _keeping.reset(self._opened.pop())

    def add(self, handle: WeightHandle) -> None:
        """A handle keeps its weight."""
        self._handles.append(handle)

    def release(self) -> None:
        """Give up what is left."""
        for handle in self._handles:
            handle.give_up()
        self._handles.clear()


_keeping: ContextVar[KeptWeights | None] = ContextVar("keeping", default=None)


class WeightHandle(nn.Module):
    """One frozen weight (out, in) or (experts, out, in), quantized or not.

    Its tensors are parameters that are not trained, so that what moves, shards or counts parameters finds them.

    Args:
        value: the weight. An unquantized one that is a parameter stays that object: tied modules share it, and one that
            requires a gradient is trained.
        dtype: what products with it run in: family code casts what it multiplies to `weight.dtype`. The value's own, or
            what it was quantized from, where that is not said.

    Attributes:
        shape: of the weight.
        kind: nf4, fp4, int8 or none.
        dtype: as above.
    """

    shape: tuple[int, ...]

    def __init__(self, value: QuantizedTensor | Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape = torch.Size(value.shape)
        self.dtype = dtype or value.dtype
        self._held: Tensor | None = None
        self._kept: Tensor | None = None
        if isinstance(value, QuantizedTensor):
            self.kind, self._block_size, self._quantized_from = value.kind, value.block_size, value.dtype
            self._store(value.tensors())
        else:
            self.kind = "none"
            self._store({"values": value})

    # ------------------------------------------------------------------------------------------- how it is stored

    def _store(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors that the weight is made of."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, nn.Parameter):
                # `fully_shard` refuses parameters without a dimension.
                tensor = nn.Parameter(tensor if tensor.dim() else tensor.view(1), requires_grad=False)
            self.register_parameter(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """What the weight is made of, as it is stored: the fields of a `QuantizedTensor`, or `values`.

        For those who count bytes and tell storages apart; a tensor without a dimension has one here.
        """
        return dict(self._parameters)  # type: ignore[arg-type]  # none of them is None

    def _fetch(self) -> dict[str, Tensor]:
        """The same tensors, complete, where products can use them.

        A sharded one is gathered. Inside a module that `fully_shard` runs it has been already, forward and backward;
        anywhere else all processes have to ask.
        """
        return {name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)()
                for name, tensor in self.tensors().items()}  # fmt: skip

    # ----------------------------------------------------------------------------------------------- what it gives

    @property
    def device(self) -> torch.device:
        """Where `dense` gives the weight."""
        return next(iter(self.tensors().values())).device

    @property
    def is_trained(self) -> bool:
        """Whether it takes a gradient (`modules_to_save`): `dense` is then differentiable."""
        return self.kind == "none" and self.tensors()["values"].requires_grad

    def stored(self) -> QuantizedTensor | Tensor:
        """The weight as it is stored, for those who write it to disk."""
        tensors = self._fetch()
        if self.kind == "none":
            return tensors["values"]
        offset = tensors.get("nested_offset")
        return QuantizedTensor(
            self.kind, tuple(self.shape), self._quantized_from, tensors["codes"], tensors["scales"],
            tensors.get("nested_scales"), None if offset is None else offset.view(self.shape[:-2]), self._block_size,
        )  # fmt: skip

    def dense(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The weight in `dtype`: (out, in), or (experts, out, in); one expert's (out, in) where `expert` names it."""
        if self._held is not None and self._held.dtype == dtype:
            return self._held if expert is None else self._held[expert]
        keeping = _keeping.get()
        if self._kept is not None and expert is None and self._kept.dtype == dtype:
            kept, self._kept = self._kept, self._kept if keeping else None
            return kept
        value = self.stored()
        if not isinstance(value, QuantizedTensor):
            return (value if expert is None else value[expert]).to(dtype)
        dense = (value if expert is None else value.expert(expert)).dequantize(dtype)
        if keeping and expert is None:
            self._kept = dense
            keeping.add(self)
        return dense

    def dense_experts(self, dtype: torch.dtype, first: int, stop: int) -> Tensor:
        """The experts from `first` up to `stop` in `dtype`, (stop - first, out, in), by one operation."""
        if self._held is not None and self._held.dtype == dtype:
            return self._held[first:stop]
        value = self.stored()
        if isinstance(value, QuantizedTensor):
            return value.experts(first, stop).dequantize_at_once(dtype)
        return value[first:stop].to(dtype)

    def give_up(self) -> None:
        """Forget what `KeptWeights` had it keep."""
        self._kept = None

    def rows(self, index: Tensor) -> Tensor:
        """The rows that `index`, of any shape, names: (*index.shape, in), in what they were quantized from.

        Raises:
            ValueError: 4-bit weights, whose blocks may straddle rows.
        """
        value = self.stored()
        return value.dequantize(value.dtype, rows=index) if isinstance(value, QuantizedTensor) else value[index]

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the weight dense in `dtype` until `release`: for many products in a row, as in generation."""
        self._held = self.dense(dtype)

    def lend(self, value: Tensor) -> None:
        """Give `value`, another weight of this shape, in the place of this one, until `release`; to products in its
        dtype."""
        self._held = value

    def release(self) -> None:
        """Give up what `hold` keeps, or `lend` has given."""
        self._held = None

    # ------------------------------------------------------ for family code that multiplies by a weight itself

    def __matmul__(self, x: Tensor) -> Tensor:
        """W (out, in) · x (…, in, n) → (…, out, n): mamba's dt_proj."""
        return frozen_linear(x.transpose(-1, -2), self).transpose(-1, -2)

    def type(self, dst_type: torch.dtype) -> Tensor:  # type: ignore[override]  # a tensor's, not a module's
        """The weight in a dtype: longcat_flash's router."""
        return self.dense(dst_type)

    def float(self) -> Tensor:  # type: ignore[override]
        """The weight in fp32."""
        return self.dense(torch.float32)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What a function of torch's makes of the weight in its `dtype`."""
        return function(*tree_map_only(cls, cls._as_tensor, args), **tree_map_only(cls, cls._as_tensor, kwargs or {}))

    def _as_tensor(self) -> Tensor:
        return self.dense(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, {tuple(self.shape)}"


class ModelTensor(NamedTuple):
    """A tensor of a model.

    Attributes:
        name: of the parameter or buffer; all tensors of a handle have the name of its weight.
        tensor: as it is stored.
        role: quantized codes, the scales and offsets that belong to them, or unquantized values.
    """

    name: str
    tensor: Tensor
    role: Role


def model_tensors(model: nn.Module) -> Iterator[ModelTensor]:
    """Every parameter and buffer of a model that has elements, those inside of handles too; tied ones once, under their
    first name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for found in _own_tensors(prefix, module):
            if id(found.tensor) not in seen and found.tensor.numel():
                seen.add(id(found.tensor))
                yield found


def _own_tensors(prefix: str, module: nn.Module) -> Iterator[ModelTensor]:
    if isinstance(module, WeightHandle):
        for field, tensor in module.tensors().items():
            role: Role = "unquantized" if module.kind == "none" else "quantization_state"
            yield ModelTensor(prefix, tensor, "codes" if field == "codes" else role)
        return
    own = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    for name, tensor in own:
        yield ModelTensor(f"{prefix}.{name}" if prefix else name, tensor, getattr(module, "tensor_role", "unquantized"))
