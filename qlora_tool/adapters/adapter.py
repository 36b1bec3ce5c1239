"""The adapter of one weight: a method's tensors, and the settings that they are used with, by the kind of its place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from qlora_tool.methods.method import Method, PeftForm, Settings, Siblings
from qlora_tool.ops.grouped import Groups
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear


class HasWeight(Protocol):
    """What an adapter is put on: a linear module, or a `Place`."""

    @property
    def weight(self) -> WeightHandle: ...


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

    place: ClassVar[str] = "linear modules"
    """What it is put on, in words, of several."""

    @classmethod
    def start(
        cls, method: Method, place: HasWeight, settings: Settings, dtype: torch.dtype, generator: torch.Generator,
        shared: Mapping[str, Tensor] | None = None, known: Mapping[str, Tensor] | None = None,
    ) -> Adapter:
        """A fresh adapter on a weight, on its device.

        Args:
            place: has the weight's handle.
            dtype: of its tensors.
            generator: what the start is drawn from, a CPU one; see `generator_for`.
            shared: what it has in common with the model's other adapters, in its place.
            known: tensors that are there already, of a start that is made of weights or data.
        """
        tensors = cls._start(method, place.weight, settings, generator)
        # Laid out as those that a resumed run makes: products of other strides end in other bits.
        tensors |= {name: tensor.contiguous() for name, tensor in (known or {}).items()}
        return cls(method, placed(method, tensors, place.weight.device, dtype) | dict(shared or {}), settings)

    @staticmethod
    def _start(
        method: Method, weight: WeightHandle, settings: Settings, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return method.start(weight.shape[0], weight.shape[1], settings, weight, generator)

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

    def factors(self, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor] | None]:
        """B (out, k) and A (k, in), fp64, of the update of each matrix of a weight of this shape; see
        `Method.factors`."""
        return [self.method.factors(self.tensors, self.settings, (shape[0], shape[1]))]

    def bias_delta(self) -> Tensor | None:
        """What merging adds to the module's bias, fp32, (out,); None where nothing."""
        return self.method.bias_delta(self.tensors, self.settings)

    def rates(self) -> dict[str, float]:
        """The learning rate of a parameter over the configured one, where that is not 1."""
        return self.method.rates(self.settings)

    @classmethod
    def names(cls, method: Method) -> Mapping[str, str]:
        """The suffixes that PEFT's files give a method's tensors, by the method's names."""
        return method.peft_names

    def trained(self) -> dict[str, Any]:
        """The trained tensors, and those that are kept with them, by their names in checkpoints: the suffix that PEFT's
        files give them; where PEFT has no such, the method's own names."""
        names, kept = self.names(self.method), self.method.kept
        own = {**self._parameters, **{name: tensor for name, tensor in self._buffers.items() if name in kept}}
        return {names.get(name, name): tensor for name, tensor in own.items()}

    def peft_form(self) -> PeftForm:
        """What is saved of it."""
        return self.method.peft_form(self.tensors, self.settings)


class EmbeddingAdapter(Adapter):
    """What is trained on embeddings, (vocabulary, dim): a method's tensors for the weight (dim, vocabulary)."""

    place = "embeddings"

    @staticmethod
    def _start(
        method: Method, weight: WeightHandle, settings: Settings, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return method.start_on_embedding(weight.shape[1], weight.shape[0], settings, weight, generator)

    def rows(self, index: Tensor, looked_up: Tensor, weight: WeightHandle) -> Tensor:
        """The rows that `index`, of any shape, names, `looked_up` being what the embeddings, `weight`, have there."""
        return self.method.looked_up(self, index, looked_up, weight)

    def merge(self, weight: Tensor) -> Tensor:
        """The merged embeddings, fp32, (vocabulary, dim)."""
        return self.method.merge(self.tensors, self.settings, weight.T).T

    def delta(self, weight: Tensor) -> Tensor:
        """What merging adds to them."""
        return self.method.delta(self.tensors, self.settings, weight.T).T

    def factors(self, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor] | None]:
        """Those of (vocabulary, dim)."""
        found = self.method.factors(self.tensors, self.settings, (shape[1], shape[0]))
        return [None if found is None else (found[1].T, found[0].T)]

    @classmethod
    def names(cls, method: Method) -> Mapping[str, str]:
        return method.peft_embedding_names


class AttentionAdapter(Adapter):
    """What is trained on the attention of one layer."""


class ExpertsAdapter(Adapter):
    """What is trained on one weight of experts, (experts, out, in): a method's tensors for each, stacked."""

    place = "weights of experts"

    @staticmethod
    def _start(
        method: Method, weight: WeightHandle, settings: Settings, generator: torch.Generator
    ) -> dict[str, Tensor]:
        experts, out_features, in_features = weight.shape
        starts = [method.start(out_features, in_features, settings, weight, generator) for _ in range(experts)]
        return {name: torch.stack([start[name] for start in starts]) for name in starts[0]}

    def expert_branches(self, dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
        """What it adds to the product of each expert: x (n, in) → (n, out), in `dtype`."""
        # Taken apart once: a gradient of an index would be as large as all experts together, for each of them.
        apart = {name: tensor.to(dtype).unbind(0) for name, tensor in self.tensors.items()}
        count = len(next(iter(apart.values())))
        experts = (_OneExpert(self, {name: tensors[index] for name, tensors in apart.items()})
                   for index in range(count))  # fmt: skip
        return [expert.branch for expert in experts]

    @property
    def grouped_branch(self) -> Callable[[Tensor, Groups], Tensor] | None:
        """What gives the same for all experts at once: x (n, in), rows grouped by expert → (n, out). None where the
        method has it expert by expert."""
        return self._grouped_branch if self.method.groups_experts else None

    def _grouped_branch(self, x: Tensor, groups: Groups) -> Tensor:
        return self.method.grouped_branch(self, x, groups)

    def merge(self, weight: Tensor) -> Tensor:
        """The merged weight, fp32, (experts, out, in)."""
        for index in range(weight.shape[0]):
            weight[index] = self.method.merge(self._of(index), self.settings, weight[index])
        return weight

    def delta(self, weight: Tensor) -> Tensor:
        """What merging adds to `weight`."""
        return torch.stack([self.method.delta(self._of(index), self.settings, one) for index, one in enumerate(weight)])

    def factors(self, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor] | None]:
        """Those of each expert."""
        return [self.method.factors(self._of(index), self.settings, (shape[1], shape[2])) for index in range(shape[0])]

    def _of(self, expert: int) -> dict[str, Tensor]:
        return {name: tensor[expert] for name, tensor in self.tensors.items()}

    def peft_form(self) -> PeftForm:
        """PEFT's A (experts·r, in), by experts, and B (out, r·experts), the experts of a rank beside one another."""
        form = super().peft_form()
        return PeftForm(form.method, self.to_peft(form.tensors), form.settings)

    @staticmethod
    def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file for these (experts, …); see `peft_form`."""
        lora_A, lora_B = tensors["lora_A"], tensors["lora_B"]
        return {"lora_A": lora_A.flatten(0, 1), "lora_B": lora_B.permute(1, 2, 0).flatten(1)}

    @staticmethod
    def from_peft(tensors: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
        """The tensors (experts, …) of a file's; see `peft_form`."""
        lora_A, lora_B = tensors["lora_A"], tensors["lora_B"]
        return {
            "lora_A": lora_A.reshape(experts, -1, lora_A.shape[1]),
            "lora_B": lora_B.reshape(lora_B.shape[0], -1, experts).permute(2, 0, 1).contiguous(),
        }


class PartsAdapter(Adapter):
    """What is trained on some parts of a fused projection (q and v of qkv, say): LoRA with an A and a B for each.

    Together they are one LoRA, of the A's one below the other and of B's with zeros in the rows of other parts, which
    is what computes, is merged and is saved; trained are the parts' own alone.

    Args:
        tensors: `lora_A_PART` (r, in), `lora_B_PART` (rows of the part, r).
        rows: those of each part in the projection's (out,).
        out_features: of the projection.
    """

    place = "projections in part"

    def __init__(
        self, method: Method, tensors: Mapping[str, Tensor], settings: Settings, rows: Mapping[str, Tensor],
        out_features: int,
    ):  # fmt: skip
        super().__init__(method, tensors, settings)
        self.out_features, self.parts = out_features, tuple(rows)
        device = next(iter(tensors.values())).device
        for part, index in rows.items():
            self.register_buffer(f"rows_{part}", index.to(device), persistent=False)

    @classmethod
    def start(
        cls, method: Method, place: HasWeight, settings: Settings, dtype: torch.dtype, generator: torch.Generator,
        shared: Mapping[str, Tensor] | None = None, known: Mapping[str, Tensor] | None = None,
    ) -> Adapter:  # fmt: skip
        weight, rows = place.weight, place.parts  # type: ignore[attr-defined]  # of a Place
        tensors: dict[str, Tensor] = {}
        for part, index in rows.items():
            made = method.start(len(index), weight.shape[1], settings, weight, generator)
            tensors |= {f"{name}_{part}": tensor for name, tensor in made.items()}
        return cls(method, placed(method, tensors, weight.device, dtype), settings, rows, weight.shape[0])

    @property
    def tensors(self) -> dict[str, Any]:
        """The LoRA that they are together: lora_A (parts·r, in), lora_B (out, parts·r)."""
        lora_A = torch.cat([self.get_parameter(f"lora_A_{part}") for part in self.parts])
        blocks = []
        for part in self.parts:
            rows, lora_B = self.get_buffer(f"rows_{part}"), self.get_parameter(f"lora_B_{part}")
            blocks.append(lora_B.new_zeros(self.out_features, lora_B.shape[1]).index_copy(0, rows, lora_B))
        return {"lora_A": lora_A, "lora_B": torch.cat(blocks, 1)}

    def peft_form(self) -> PeftForm:
        """One LoRA of rank parts·r with the same scale."""
        count, settings = len(self.parts), self.settings
        wider = replace(settings, r=settings.r * count)
        alpha = settings.alpha * self.method.scaling(settings) / self.method.scaling(wider)
        return self.method.peft_form(self.tensors, replace(wider, alpha=alpha))

    def rates(self) -> dict[str, float]:
        return {f"{name}_{part}": rate for name, rate in super().rates().items() for part in self.parts}


class _OneExpert:
    """The adapter of one expert as a method sees it."""

    drops = False

    def __init__(self, adapter: ExpertsAdapter, tensors: Mapping[str, Tensor]):
        self.shared: Siblings | None = None
        self.settings, self.tensors, self._method = adapter.settings, tensors, adapter.method

    def dropped(self, x: Tensor) -> Tensor:
        return x

    def branch(self, x: Tensor) -> Tensor:
        return self._method.branch(self, x)


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
