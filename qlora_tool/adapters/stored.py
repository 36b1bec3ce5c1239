"""An adapter as it lies on the disk, ours or PEFT's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_tool.adapters.adapter import Adapter, AttentionAdapter, EmbeddingAdapter, ExpertsAdapter, placed
from qlora_tool.adapters.expert_names import parameter_of
from qlora_tool.adapters.peft_names import (
    WEIGHTS_NAME,
)
from qlora_tool.adapters.starts import Repeated, TakenOut
from qlora_tool.adapters.targets import from_pattern, matches
from qlora_tool.adapters.token_rows import SUFFIX
from qlora_tool.errors import UserError
from qlora_tool.methods.method import Method, Settings
from qlora_tool.model.slots import Prepare


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on the disk.

    Attributes:
        folder: where.
        peft: its `adapter_config.json`.
        tensors: by PEFT's names without the prefix.
        provenance: its `qlora_tool.json`, or None where something else made it.
        method: how its tensors are used.
        usual: the settings of modules that no pattern names.
    """

    folder: Path
    peft: dict[str, Any]
    tensors: dict[str, Tensor]
    provenance: dict[str, Any] | None
    method: Method
    usual: Settings

    @property
    def base(self) -> str | None:
        return self.peft.get("base_model_name_or_path")

    @property
    def dtype(self) -> torch.dtype:
        """What the adapter's tensors are stored in, but for those that its method keeps in fp32."""
        adapted = (tensor.dtype for tensors in self.by_module.values() for name, tensor in tensors.items()
                   if name not in self.method.fp32)  # fmt: skip
        return next(adapted, None) or next(iter(self.tensors.values())).dtype

    @cached_property
    def by_module(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each adapter by the method's names, by the name of its module, or of its parameter where that
        is a weight of experts. Which those are is told by the tensors that are there; `target_modules` is not needed
        for it."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            if (owner := self.owner(key)) is not None:
                found.setdefault(owner[0], {})[owner[1]] = tensor
        return {name: self._of_experts(name, tensors) for name, tensors in found.items()}

    def owner(self, key: str) -> tuple[str, str] | None:
        """The place that a tensor is an adapter's for, and the method's name for it; None for one that replaces a
        tensor."""
        for names in (self.method.peft_names, self.method.peft_embedding_names):
            for name, suffix in names.items():
                if key.endswith(f".{suffix}"):
                    module = key.removesuffix(f".{suffix}")
                    return parameter_of(module, self._target_parameters) or module, name
        return None

    @property
    def _target_parameters(self) -> list[str]:
        return [name for name in self.peft.get("target_parameters") or () if not name.endswith(".weight")]

    def _of_experts(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.adapter_class(name) is not ExpertsAdapter or not {"lora_A", "lora_B"} <= tensors.keys():
            return tensors
        r = from_pattern(name, self.peft.get("rank_pattern") or {}, self.usual.r)
        experts, rest = divmod(tensors["lora_A"].shape[0], r)
        if rest or tensors["lora_B"].dim() != 2 or tensors["lora_B"].shape[1] != experts * r:
            raise UserError(
                f"{self.folder / WEIGHTS_NAME}: the tensors of {name} do not fit together at rank {r}: lora_A "
                f"{tuple(tensors['lora_A'].shape)}, lora_B {tuple(tensors['lora_B'].shape)}; copy the adapter again"
            )
        return ExpertsAdapter.from_peft(tensors, experts)

    def adapter_class(self, name: str) -> type[Adapter]:
        """What computes the adapter at a place."""
        if any(matches(name, [parameter]) for parameter in self._target_parameters):
            return ExpertsAdapter
        if self.method.on_attention:
            return AttentionAdapter
        embeddings = {*self.method.peft_embedding_names.values()} - {*self.method.peft_names.values()}
        return EmbeddingAdapter if any(f"{name}.{suffix}" in self.tensors for suffix in embeddings) else Adapter

    def layers(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", dropout: float | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None, left: Sequence[str] = (),
    ) -> dict[str, Adapter]:
        """The adapters by the name of their place.

        Args:
            dropout: while training; None: as it was trained before.
            shapes: of the model's weights, as `refuse_misfit` takes them: what all adapters share is made, or checked,
                by them; without, only what is stored of it is there.
            left: the places that its configuration names and its file lacks; what is shared is made for them too.

        Raises:
            UserError: what they have in common was made for another model.
        """
        shared = placed(self.method, self._shared(shapes or {}, left), device, dtype)
        found = {}
        for name in self.by_module:
            tensors, settings = self.trained(name, dropout)
            tensors = placed(self.method, tensors, device, dtype) | shared
            found[name] = self.adapter_class(name)(self.method, tensors, settings)
        return found

    def trained(self, name: str, dropout: float | None = None) -> tuple[Mapping[str, Tensor], Settings]:
        """The tensors and settings of the adapter on the module `name` as they are trained, where the file has them in
        another form for PEFT."""
        return self.method.from_peft_form(self.by_module[name], self.settings(name, dropout), self.start)

    @property
    def start(self) -> Mapping[str, Any]:
        """What its provenance says of its start; empty for nothing."""
        return (self.provenance or {}).get("start") or {}

    @property
    def usual_trained(self) -> Settings:
        """`usual` as it is trained."""
        return self.method.trained_settings(self.usual, self.start)

    @property
    def quantized_without(self) -> str | None:
        """The folder of the adapter without whose start its base was quantized: this one's, where there is such."""
        return str(self.folder.resolve()) if self.start.get("taken_out_of_base") or self.repeats_start else None

    @property
    def repeats_start(self) -> bool:
        """Whether PEFT made it and took its start (PiSSA) out of the base, which was not quantized, and whether that is
        therefore to be repeated."""
        return not self.start and self.method.reads_weights(self.usual)

    @property
    def brings_base(self) -> bool:
        """Whether its base is another than the model's own: it was changed before it was quantized."""
        return self.repeats_start or self.quantized_without is not None

    def prepare(self, dtype: torch.dtype | None = None) -> Prepare | None:
        """The step before quantizing that it was trained with; see `slots.quantize_parameter`.

        Args:
            dtype: that the adapter is kept in from now on, by default the one that it is stored in.
        """
        if self.repeats_start:
            return Repeated(self.method, {name: self.settings(name) for name in self.by_module})
        if self.quantized_without is None:
            return None
        kept = {}
        for name in self.by_module:
            tensors, settings = self.trained(name)
            kept[name] = placed(self.method, tensors, "cpu", dtype or self.dtype), settings
        return TakenOut(self.method, kept)

    def _shared(self, shapes: Mapping[str, tuple[int, ...]], left: Sequence[str]) -> dict[str, Tensor]:
        """What the adapters have in common: as stored, or made again in the dtype that it was trained in."""
        adapted = {(shapes[name][-2], shapes[name][-1]) for name in [*self.by_module, *left] if name in shapes}
        stored = {name: self.tensors[full] for name, full in self.method.saved_shared(self.usual).items()}
        if not adapted:
            return stored
        expected = self.method.shared_shapes(adapted, self.usual)
        for name, tensor in stored.items():
            if tuple(tensor.shape) != expected[name]:
                raise UserError(
                    f"{self.folder}: {name}, which all modules share, has shape {tuple(tensor.shape)}, but the adapted "
                    f"modules of this model need {expected[name]}; it was trained on {self.base}: name that as its base"
                )
        return stored or {name: tensor.to(self.dtype) for name, tensor in
                          self.method.shared(adapted, self.usual).items()}  # fmt: skip

    def sizes(self, name: str) -> tuple[tuple[int, ...], int]:
        """The shape of the weight that the adapter at a place is for, as it is there: (out, in), (vocabulary, dim),
        (experts, out, in); and its rank."""
        tensors = self.by_module[name]
        if self.adapter_class(name) is ExpertsAdapter:
            out_features, in_features, r = self.method.sizes({key: tensor[0] for key, tensor in tensors.items()})
            return (tensors["lora_A"].shape[0], out_features, in_features), r
        out_features, in_features, r = self.method.sizes(tensors)
        turned = self.adapter_class(name) is EmbeddingAdapter
        return ((in_features, out_features) if turned else (out_features, in_features)), r

    def settings(self, name: str, dropout: float | None = None) -> Settings:
        """The settings of the adapter at a place."""
        return replace(
            self.usual,
            r=self.sizes(name)[1] or from_pattern(name, self.peft.get("rank_pattern") or {}, self.usual.r),
            alpha=from_pattern(name, self.peft.get("alpha_pattern") or {}, self.usual.alpha),
            dropout=self.usual.dropout if dropout is None else dropout,
        )

    def token_rows(self) -> dict[str, tuple[list[int], Tensor]]:
        """The ids of tokens whose rows it replaces, and the rows, by the name of the module.

        Raises:
            UserError: ids and rows that do not fit together.
        """
        rows = {key.removesuffix(f".{SUFFIX}"): tensor for key, tensor in self.tensors.items() if key.endswith(SUFFIX)}
        asked = self.peft.get("trainable_token_indices") or {}
        found = {}
        for name, tensor in rows.items():
            patterns = asked if isinstance(asked, dict) else {name: asked}
            tokens: list[int] = next((ids for pattern, ids in patterns.items() if matches(name, [pattern])), [])
            if tensor.dim() != 2 or len(tokens) != tensor.shape[0]:
                raise UserError(f"{self.folder}: {len(tokens)} trainable_token_indices for {name}, but its tensor is "
                                f"{tuple(tensor.shape)}; copy or save the adapter again")  # fmt: skip
            found[name] = list(tokens), tensor
        return found

    def replaced_tensors(self) -> dict[str, Tensor]:
        """What it replaces, by parameter name: `modules_to_save`, biases, and an adapted output layer's weight, which
        PEFT writes along. As the model keeps them: a Conv1D's (in, out)."""
        shared = set(self.method.saved_shared(self.usual).values())
        return {
            name.replace(".base_layer.", "."): tensor for name, tensor in self.tensors.items()
            if self.owner(name) is None and name not in shared and not name.endswith(f".{SUFFIX}")
        }  # fmt: skip
