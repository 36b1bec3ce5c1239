"""What an adapter method is: one file with its keys, its start, what it computes, what it merges, PEFT's form of it.

A method's file imports no torch while it is imported itself, as the configuration reads its keys from there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from pydantic import ValidationError

from qlora_tool.errors import UserError
from qlora_tool.methods.keys import MethodKeys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.ops.grouped import Groups
    from qlora_tool.ops.lora import LoraWeights
    from qlora_tool.weights.handles import WeightHandle
    from qlora_tool.weights.modules import FrozenLinear

_K = TypeVar("_K", bound=MethodKeys)


@dataclass(frozen=True)
class Settings:
    """One adapter's settings, patterns resolved.

    Attributes:
        r: rank.
        alpha: `lora_alpha`.
        dropout: on the adapter's input, while training.
        keys: the method's own.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    keys: MethodKeys = field(default_factory=MethodKeys)


@dataclass(frozen=True)
class SavedWith:
    """What a PEFT configuration says beside the settings.

    Attributes:
        bias: none, lora_only or all.
        modules: how many modules are adapted.
        names: their last names.
        transposed: whether a module keeps its weight as (in, out) (transformers' Conv1D).
        tensors: names of the tensors that the adapters have.
    """

    bias: str
    transposed: bool
    tensors: frozenset[str]
    modules: int = 0
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PeftForm:
    """What one adapter is saved as: a method that PEFT has, and its tensors by that method's names."""

    method: Method
    tensors: Mapping[str, Tensor]
    settings: Settings


class Siblings(Protocol):
    """The modules that one input goes to: `adapters.fusion.SharedInput`."""

    def output(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        """x (…, in) → (…, out) of one of them, bias and adapter included."""
        ...


class Adapter(Protocol):
    """What a method sees of the adapter that computes: `adapters.adapter.Adapter`.

    Attributes:
        tensors: the trained tensors by the method's names for them.
        drops: whether anything is dropped now.
        shared: the modules that this one's input goes to as well, or None.
    """

    settings: Settings
    shared: Siblings | None

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def drops(self) -> bool: ...

    def dropped(self, x: Tensor) -> Tensor:
        """x after dropout."""
        ...


class Method(ABC):
    """One adapter method. Methods have no state; what is trained is in an `Adapter`.

    Class attributes:
        name: as `adapter.method` has it.
        peft_type: as PEFT's adapter_config.json has it.
        keys: the method's own keys of the configuration.
        peft_names: its tensors, in order, and the suffix that PEFT's files give each.
        peft_embedding_names: the same on embeddings; empty where it cannot be on them.
        on_attention: whether it is on the attention of whole layers, and on nothing else.
        on_experts: whether it can be on the three-dimensional weights of experts, a pair of tensors for each.
        groups_experts: whether it says what it adds for all experts at once, in `grouped_branch`.
        on_parts: whether it can be on parts of a fused projection; its tensors are then LoRA's.
        peft_unread: what names of further tensors that PEFT's files may have contain, and what those are, in words;
            files with such are refused.
        optional: those of its tensors that an adapter may be without.
        has_delta: whether there is an update of a weight, ΔW.
        additive: whether it adds to the output of its module, so that several can be active together.
        peft_takes_conv1d: whether PEFT can load it onto transformers' Conv1D.
        scales: tensors such that w times these, the others as they are, is w times the update; of additive methods.
        fp32: those of its tensors that are fp32 whatever the others are.
        frozen: those of its tensors that are not trained: they are made again from the seed, and saved nowhere.
        shared_names: those of them that all adapters of a model have in common, and their full names in PEFT's file,
            which may hold them.
        shared_saved_by: PEFT's key, and the method's, that says whether it holds them.
        kept: those of `frozen` that are saved all the same, in checkpoints and with the adapter, as what they were made
            of is not there any more.
        usual_rates: the lowest and the highest learning rate that is usual with it; one far outside is warned of.

    Raises:
        TypeError: a subclass is defined that lacks a part; the part is named.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str]
    keys: ClassVar[type[MethodKeys]]
    peft_names: ClassVar[Mapping[str, str]]
    peft_embedding_names: ClassVar[Mapping[str, str]] = {}
    on_attention: ClassVar[bool] = False
    on_experts: ClassVar[bool] = False
    groups_experts: ClassVar[bool] = False
    on_parts: ClassVar[bool] = False
    peft_unread: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[frozenset[str]] = frozenset()
    has_delta: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    peft_takes_conv1d: ClassVar[bool] = True
    scales: ClassVar[frozenset[str]] = frozenset()
    fp32: ClassVar[frozenset[str]] = frozenset()
    frozen: ClassVar[frozenset[str]] = frozenset()
    shared_names: ClassVar[Mapping[str, str]] = {}
    shared_saved_by: ClassVar[str] = ""
    kept: ClassVar[frozenset[str]] = frozenset()
    usual_rates: ClassVar[tuple[float, float]] = (1e-5, 2.5e-3)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        attributes = [name for name in ("name", "peft_type", "keys", "peft_names") if not hasattr(cls, name)]
        functions = [
            name for name in dir(Method) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)
        ]  # fmt: skip
        if missing := [*attributes, *functions]:
            raise TypeError(
                f"the adapter method {cls.__qualname__} of {cls.__module__} has no {', '.join(missing)}; each method "
                "needs all of its life, as qlora_tool.methods.method.Method lists it"
            )

    def __str__(self) -> str:
        return self.name

    # What it starts from

    @abstractmethod
    def shapes(self, out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor on a weight (out, in), optional ones included."""

    @abstractmethod
    def start(
        self, out_features: int, in_features: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The tensors that training begins with, fp32, drawn from `generator` (a CPU one)."""

    def shared_shapes(self, shapes: Collection[tuple[int, int]], settings: Settings) -> dict[str, tuple[int, ...]]:
        """The shapes of what all adapters of a model have in common: those of its frozen tensors that are not a
        module's own.

        Args:
            shapes: (out, in) of the adapted weights, at least one.
        """
        return {}

    def shared(self, shapes: Collection[tuple[int, int]], settings: Settings) -> dict[str, Tensor]:
        """The tensors of `shared_shapes`, fp32: made once for the whole model, the same ones every time."""
        return {}

    def start_on_embedding(
        self, dim: int, vocabulary: int, settings: Settings, weight: WeightHandle, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The same on embeddings: what is adapted is (dim, vocabulary), `weight` has it as (vocabulary, dim)."""
        raise NotImplementedError

    def reads_weights(self, settings: Settings) -> bool:
        """Whether it starts from the unquantized weight as it is read, and may change what is quantized: by
        `from_weight` and `without`."""
        return False

    def from_weight(
        self, weight: Tensor, settings: Settings, dtype: torch.dtype, generator: torch.Generator,
        quantized: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """The tensors that training begins with, of a start that reads the unquantized weight.

        Args:
            weight: (out, in), as the checkpoint has it.
            dtype: of the adapter, to which they are rounded.
            quantized: gives what products will see of a weight, fp32, (out, in).
        """
        raise NotImplementedError(f"{self.name} starts without weights")

    def without(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        """What is quantized in the place of `weight` (out, in): all but what the adapter took over."""
        return weight

    # What it computes

    @abstractmethod
    def branch(self, adapter: Adapter, x: Tensor) -> Tensor:
        """What the adapter adds to the output of its module: x (…, in) → (…, out), in the dtype of x.

        Of a method that is not additive it is what `forward` makes use of.
        """

    def grouped_branch(self, adapter: Adapter, x: Tensor, groups: Groups) -> Tensor:
        """The same for all experts of a weight at once, the adapter's tensors being stacked: x (n, in), rows grouped by
        expert → (n, out). Of methods with `groups_experts`."""
        raise NotImplementedError(f"{self} does not group experts")

    def forward(self, adapter: Adapter, x: Tensor, linear: FrozenLinear) -> Tensor:
        """x (…, in) → (…, out): the module with this adapter, bias included."""
        # The branch comes first: it is all that backward needs, so recomputation ends before the base product.
        branch = self.branch(adapter, adapter.dropped(x))
        return linear.with_bias(linear.product(x) + branch)

    def rows(self, adapter: Adapter, index: Tensor, dtype: torch.dtype) -> Tensor:
        """What an adapter on embeddings adds to the rows that `index`, of any shape, names: (*index.shape, dim)."""
        raise NotImplementedError

    def looked_up(self, adapter: Adapter, index: Tensor, rows: Tensor, weight: WeightHandle) -> Tensor:
        """The rows (*index.shape, dim) with this adapter, of embeddings `weight` (vocabulary, dim) that has `rows`."""
        return rows + self.rows(adapter, index, rows.dtype)

    def fused_weights(self, adapter: Adapter, linear: FrozenLinear) -> LoraWeights | None:
        """What LoRA's fused operations take, where they compute what this adapter does."""
        return None

    def scaling(self, settings: Settings) -> float:
        """s, what the update is multiplied by: α/r."""
        return settings.alpha / settings.r

    # How it is trained

    def rates(self, settings: Settings) -> dict[str, float]:
        """The learning rate of a tensor over the configured one, where that is not 1."""
        return {}

    # What is merged

    @abstractmethod
    def delta(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        """What merging adds to `weight` (out, in), fp32, (out, in)."""

    def merge(self, tensors: Mapping[str, Tensor], settings: Settings, weight: Tensor) -> Tensor:
        """The merged weight, fp32, (out, in); `weight` may be overwritten."""
        return self.delta(tensors, settings, weight).add_(weight)

    def factors(
        self, tensors: Mapping[str, Tensor], settings: Settings, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """B (out, k) and A (k, in), fp64, with BA = Δ; of a method that is not additive, the low-rank part of what it
        does to the weight. None where it has no such form, or one that is no smaller than Δ.

        Args:
            shape: (out, in) of the weight.
        """
        form = self.peft_form(tensors, settings)
        return None if form.method is self else form.method.factors(form.tensors, form.settings, shape)

    def bias_delta(self, tensors: Mapping[str, Tensor], settings: Settings) -> Tensor | None:
        """What merging adds to the module's bias, fp32, (out,); None where nothing."""
        return None

    # PEFT's files

    def saved_shared(self, settings: Settings) -> Mapping[str, str]:
        """Those of `shared_names` that are saved with an adapter of these settings."""
        return self.shared_names if getattr(settings.keys, self.shared_saved_by, True) else {}

    def peft_form(self, tensors: Mapping[str, Tensor], settings: Settings) -> PeftForm:
        """The adapter as PEFT has it: by default this one, its trained tensors and settings as they are."""
        return PeftForm(self, {name: tensor for name, tensor in tensors.items() if name not in self.frozen}, settings)

    def peft_settings(self, settings: Settings) -> tuple[Method, Settings]:
        """The method and the settings of `peft_form`, for a module that no pattern names."""
        return self, settings

    def from_peft_form(
        self, tensors: Mapping[str, Tensor], settings: Settings, start: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Settings]:
        """The adapter that `peft_form` made this of.

        Args:
            start: what the provenance says of the adapter's start; see `start_facts`. Empty for nothing.
        """
        return tensors, self.trained_settings(settings, start)

    def trained_settings(self, settings: Settings, start: Mapping[str, Any]) -> Settings:
        """The settings that `peft_settings` made these of."""
        return settings

    def start_facts(self, settings: Settings) -> dict[str, Any] | None:
        """What the provenance has to say of the start for `from_peft_form`; None for nothing."""
        return None

    @abstractmethod
    def to_peft(self, settings: Settings, saved: SavedWith) -> dict[str, Any]:
        """Its keys of adapter_config.json, but for those that all methods have."""

    @abstractmethod
    def from_peft(self, file: Path, config: Mapping[str, Any]) -> Settings | None:
        """The settings that an adapter_config.json gives, the method's own keys among them; None where it is another
        method's.

        Raises:
            UserError: it has what cannot be read here.
        """

    @abstractmethod
    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """(out, in, r) of the tensors of one adapter; 0 for what they do not tell."""

    def missing(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The tensors that an adapter with some in PEFT's file lacks there."""
        return [name for name in self.peft_names if name not in tensors and name not in self.optional]

    def fits(self, tensors: Mapping[str, Tensor], settings: Settings) -> bool:
        """Whether the tensors of one adapter in PEFT's file, none of them missing, fit together."""
        out_features, in_features, r = self.sizes(tensors)
        expected = self.shapes(out_features, in_features, r)
        return all(tuple(tensor.shape) == expected[name] for name, tensor in tensors.items())


def keys_of_file(file: Path, kind: type[_K], values: Mapping[str, Any]) -> _K:
    """A method's keys as a PEFT configuration gives them.

    Raises:
        UserError: a value that is none of the key.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or kind.__name__
        raise UserError(
            f"{file}: {name} {first['input']!r} cannot be read here ({first['msg']}); save the adapter again, or merge "
            "it with PEFT instead"
        ) from error


def number_in(
    file: Path, config: Mapping[str, Any], key: str, *, whole: bool = False, default: float | None = None
) -> Any:
    """A number of a PEFT configuration: any; where `whole`, a rank, above 0; with a default, a share from 0 to below 1,
    which may be null.

    Raises:
        UserError: it is missing, or something else.
    """
    value: Any = config.get(key)
    if value is None and default is not None:
        return default
    if key not in config:
        raise UserError(f"{file}: no key {key!r}; the PEFT configuration is incomplete: save the adapter again")
    kinds = (int,) if whole else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (whole and value < 1) or (default is not None and not 0 <= value < 1):
        expected = "a whole number above 0" if whole else "a number"
        expected += "" if default is None else " from 0 to below 1"
        raise UserError(f"{file}: {key} is {value!r}, expected {expected}; copy or save the adapter again")
    return value


def refuse_keys(file: Path, config: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """Refuse a PEFT configuration in which a key has another value than the one that changes nothing.

    Args:
        keys: names, and that value of each.
    """
    for key, harmless in keys.items():
        value = config.get(key)
        if value != harmless and (value or isinstance(value, dict)):  # a section without keys is set, too
            raise UserError(f"{file}: {key} is set, which cannot be read here; merge this adapter with PEFT instead")
