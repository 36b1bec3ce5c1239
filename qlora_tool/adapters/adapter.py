"""The adapter of one module: a method's tensors, and the settings that they are used with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tool.methods.method import Method, PeftForm, Settings, Siblings
from qlora_tool.weights.modules import FrozenLinear


class Adapter(nn.Module):
    """What is trained on one linear module, by one method.

    The tensors have one dtype (but for those that the method wants in fp32) and cast to the input's for
    products.

    Args:
        method: how they are used.
        tensors: by the method's names.
        settings: rank, alpha, dropout.

    Attributes:
        shared: the modules that this one's input goes to as well, or None.
    """

    def __init__(self, method: Method, tensors: Mapping[str, Tensor], settings: Settings):
        super().__init__()
        self.method, self.settings = method, settings
        for name, tensor in tensors.items():
            if name in method.frozen:
                self.register_buffer(name, tensor, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        self.dropout = nn.Dropout(settings.dropout) if settings.dropout else None
        self.shared: Siblings | None = None

    @classmethod
    def start(
        cls, method: Method, linear: FrozenLinear, settings: Settings, dtype: torch.dtype, generator: torch.Generator,
        shared: Mapping[str, Tensor] | None = None, known: Mapping[str, Tensor] | None = None,
    ) -> Adapter:
        """A fresh adapter on `linear`, on its device.

        Args:
            dtype: of its tensors.
            generator: what the start is drawn from, a CPU one; see `generator_for`.
            shared: what it has in common with the model's other adapters, in its place.
            known: tensors that are there already, of a start that is made of weights or data.
        """
        tensors = method.start(linear.out_features, linear.in_features, settings, linear.weight, generator)
        # Laid out as those that a resumed run makes: products of other strides end in other bits.
        tensors |= {name: tensor.contiguous() for name, tensor in (known or {}).items()}
        return cls(method, placed(method, tensors, linear.weight.device, dtype) | dict(shared or {}), settings)

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors by the method's names, trained and frozen."""
        return self._parameters | self._buffers if self._buffers else self._parameters

    @property
    def drops(self) -> bool:
        """Whether anything is dropped now."""
        return self.dropout is not None and self.training

    def dropped(self, x: Tensor) -> Tensor:
        """x after dropout; x itself where nothing is dropped."""
        return x if self.dropout is None or not self.drops else self.dropout(x)

    def forward(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        """x (…, in) → (…, out): the linear module with this adapter, bias included."""
        return self.method.forward(self, x, linear)

    @property
    def branch(self) -> Callable[[Tensor], Tensor] | None:
        """What gives the adapter's addition to the module's output, dropout included: x (…, in) → (…, out). None where
        the method does more than add."""
        return self._branch if self.method.additive else None

    def _branch(self, x: Tensor) -> Tensor:
        return self.method.branch(self, self.dropped(x))

    def merge(self, weight: Tensor) -> Tensor:
        """The merged weight, fp32, (out, in); `weight`, fp32, may be overwritten."""
        return self.method.merge(self.tensors, self.settings, weight)

    def delta(self, weight: Tensor) -> Tensor:
        """What merging adds to `weight` (out, in), fp32."""
        return self.method.delta(self.tensors, self.settings, weight)

    def factors(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """B (out, k) and A (k, in), fp64, of the update of a weight of this shape (out, in); see `Method.factors`."""
        return self.method.factors(self.tensors, self.settings, shape)

    def bias_delta(self) -> Tensor | None:
        """What merging adds to the module's bias, fp32, (out,); None where nothing."""
        return self.method.bias_delta(self.tensors, self.settings)

    def trained(self) -> dict[str, Any]:
        """The trained tensors, and those that are kept with them, by the suffix that PEFT's files give them; where PEFT
        has no such, by the method's own names."""
        kept = {name: tensor for name, tensor in self._buffers.items() if name in self.method.kept}
        own = {**self._parameters, **kept}
        return {self.method.peft_names.get(name, name): tensor for name, tensor in own.items()}

    def peft_form(self) -> PeftForm:
        """What is saved of it."""
        return self.method.peft_form(self.tensors, self.settings)


def placed(
    method: Method, tensors: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A method's tensors on a device, in `dtype` but for those that the method keeps in fp32."""
    kept_in = {name: torch.float32 if name in method.fp32 else dtype for name in tensors}
    return {name: tensor.to(device, kept_in[name]) for name, tensor in tensors.items()}


def generator_for(seed: int, name: str) -> torch.Generator:
    """The source of a module's start: depends on the seed and the module's name alone, not on what was drawn before."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
