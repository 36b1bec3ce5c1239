"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Checked against PEFT 0.21: it loads what is written here, and what it writes is read here.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Container, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_tool.adapters.adapter import Adapter, AttentionAdapter, EmbeddingAdapter, ExpertsAdapter, placed
from qlora_tool.adapters.attach import AdapterSet, put_on
from qlora_tool.adapters.attention import all_attention
from qlora_tool.adapters.expert_names import parameter_of
from qlora_tool.adapters.peft_names import PREFIX, check_config, is_target, join_experts, moved, plain_names
from qlora_tool.adapters.places import place_of
from qlora_tool.adapters.starts import Repeated, TakenOut
from qlora_tool.adapters.targets import from_pattern, matches, own_keys
from qlora_tool.adapters.token_rows import SUFFIX, put_rows_on
from qlora_tool.adapters.trained_base import tie, train_parameter, trainable_names, transposed_names
from qlora_tool.errors import UserError
from qlora_tool.files.atomic import write_json
from qlora_tool.files.tensors import read_all, write_all
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Method, SavedWith, Settings, refuse_keys
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.model.slots import Prepare
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenEmbedding, FrozenLinear

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig

logger = logging.getLogger(__name__)
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_WHAT = {Adapter: "a linear module", AttentionAdapter: "attention", EmbeddingAdapter: "an embedding",
         ExpertsAdapter: "a weight of experts"}  # fmt: skip


def save_adapter(
    folder: Path, adapters: AdapterSet, config: AdapterConfig, model: nn.Module, base: str, revision: str | None
) -> None:
    """Write the two files of an adapter into `folder`; the same adapter gives the same bytes.

    Args:
        adapters: what was trained.
        config: the adapter's section.
        model: the model it is on.
        base: the base's hub id or folder.
        revision: of the hub id.
    """
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in adapters.peft_tensors().items()} | adapters.peft_shared()
    write_all(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    write_json(folder / CONFIG_NAME, _peft_config(adapters, config, model, base, revision), sort_keys=True)


def _peft_config(
    adapters: AdapterSet, config: AdapterConfig, model: nn.Module, base: str, revision: str | None
) -> dict[str, Any]:
    method, usual = METHODS[config.method].peft_settings(
        Settings(config.r, config.lora_alpha, config.lora_dropout, own_keys(config))
    )
    forms = {name: layer.peft_form() for name, layer in adapters.layers.items()}
    settings = {name: form.settings for name, form in forms.items()}
    saved = SavedWith(
        config.bias,
        any(getattr(model.get_submodule(name), "transposed", False) for name in adapters.layers),
        frozenset(name for form in forms.values() for name in form.tensors),
        len(forms),
    )
    # Whole names: no two of them match the same layer, whatever order a reader takes them in.
    patterns = {
        "rank_pattern": {name: s.r for name, s in settings.items() if s.r != usual.r},
        "alpha_pattern": {name: s.alpha for name, s in settings.items() if s.alpha != usual.alpha},
    }
    experts = sorted(name for name, layer in adapters.layers.items() if isinstance(layer, ExpertsAdapter))
    places = {
        "r": usual.r,
        "target_modules": _target_names(adapters.layers.keys() - set(experts), model),
        "modules_to_save": sorted({name.rpartition(".")[0] for name, tensor in adapters.saved.items()
                                   if tensor.requires_grad}) or None,
        **patterns,
    }
    return {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        **{key: value for key, value in places.items() if method.keys.reads(key)},
    } | _further(adapters, experts) | method.to_peft(usual, saved)


def _further(adapters: AdapterSet, experts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"target_parameters": experts} if experts else {}
    if adapters.token_rows:
        found["trainable_token_indices"] = {name: rows.tokens for name, rows in sorted(adapters.token_rows.items())}
    return found


def _target_names(adapted: Set[str], model: nn.Module) -> list[str]:
    """The adapted modules' last names where those mean exactly them, else full names; sorted."""
    last_parts = sorted({name.rpartition(".")[2] for name in adapted})
    meant = {name for name, _ in model.named_modules() if matches(name, last_parts)}
    return last_parts if meant == adapted else sorted(adapted)


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
        embeddings = self.method.peft_embedding_names.values()
        return EmbeddingAdapter if any(f"{name}.{suffix}" in self.tensors for suffix in embeddings) else Adapter

    def layers(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", dropout: float | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> dict[str, Adapter]:
        """The adapters by the name of their place.

        Args:
            dropout: while training; None: as it was trained before.
            shapes: of the model's weights, as `refuse_misfit` takes them: what all adapters share is made, or checked,
                by them; without, only what is stored of it is there.

        Raises:
            UserError: what they have in common was made for another model.
        """
        shared = placed(self.method, self._shared(shapes or {}), device, dtype)
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

    def _shared(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """What the adapters have in common: as stored, or made again in the dtype that it was trained in."""
        adapted = {(shapes[name][-2], shapes[name][-1]) for name in self.by_module if name in shapes}
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


def is_adapter(folder: Path) -> bool:
    """Whether there is a PEFT configuration in `folder`."""
    return (folder / CONFIG_NAME).exists()


def adapters_inside(folder: Path) -> list[Path]:
    """The folders in `folder` that are adapters: PEFT saves those that have a name so."""
    return sorted(file.parent for file in folder.glob(f"*/{CONFIG_NAME}"))


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter's folder, ours or PEFT's.

    Raises:
        UserError: files missing, a kind of adapter that cannot be read, pickled weights.
    """
    config_file, weights_file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_file.exists():
        inside = adapters_inside(folder)
        what = "a run's adapter is" if (folder / "adapter") in inside else "the adapter lies in"
        cure = f"; {what} {folder / 'adapter' if what.startswith('a run') else inside[0]}" if inside else ""
        raise UserError(f"{folder}: no {CONFIG_NAME} in it, so it is not an adapter's folder{cure}")
    peft = _read_json(config_file)
    check_config(config_file, peft)
    if not weights_file.exists():
        hint = "; its weights are a pickle: load and save it once with PEFT (safe_serialization is its default)" if (
            folder / "adapter_model.bin"
        ).exists() else ""  # fmt: skip
        raise UserError(f"{folder}: no {WEIGHTS_NAME} in it{hint}")
    method, usual = _method_of(config_file, peft)
    tensors = plain_names(read_all(weights_file))
    provenance_file = folder / "qlora_tool.json"
    provenance = _read_json(provenance_file) if provenance_file.exists() else None
    stored = StoredAdapter(folder, peft, tensors, provenance, method, usual)
    _refuse_no_numbers(weights_file, tensors)
    stored = _of_targets(weights_file, stored)
    _refuse_incomplete(weights_file, stored)
    return stored


def _of_targets(file: Path, stored: StoredAdapter) -> StoredAdapter:
    """The adapter without tensors that PEFT would not read, as no target names their modules; a warning counts them."""
    left: dict[str, list[str]] = {}
    for key in stored.tensors:
        owner = stored.owner(key)
        if owner is not None and stored.adapter_class(owner[0]) is not ExpertsAdapter:
            module = owner[0].replace(".base_layer", "")
            if not is_target(module, stored.peft):
                left.setdefault(owner[0], []).append(key)
    if not left or len(left) == len(stored.by_module):
        return stored
    _warn_once(
        f"{file}: {sum(map(len, left.values()))} tensors of {len(left)} modules ({next(iter(left))} …) are not read: "
        f"{CONFIG_NAME} does not name them in target_modules, or excludes them, and PEFT leaves them out as well"
    )
    names = {key for keys in left.values() for key in keys}
    return replace(stored, tensors={key: tensor for key, tensor in stored.tensors.items() if key not in names})


@cache
def _warn_once(line: str) -> None:
    logger.warning(line)


def for_model(stored: StoredAdapter, model: nn.Module) -> StoredAdapter:
    """The adapter by the names that a model has: those of earlier versions of transformers, and LoRA on single experts
    that are one weight today, are brought to it as PEFT does.

    Raises:
        UserError: see `join_experts`.
    """
    modules = {name for name, _ in model.named_modules()}
    shared = set(stored.method.shared_names.values())
    tensors = {key if key in shared else moved(key, modules.__contains__): tensor
               for key, tensor in stored.tensors.items()}  # fmt: skip
    if stored.method.on_experts:
        joined = join_experts(tensors, stored.usual.r, modules.__contains__, stored.folder / WEIGHTS_NAME)
    else:
        joined = tensors
    if joined.keys() == stored.tensors.keys():
        return stored
    peft = dict(stored.peft)
    if joined.keys() != tensors.keys():
        fused = {r".*\.experts\.gate_up_proj": 2}
        peft["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"] if any(
            ".experts.base_layer." in key for key in joined) else ["experts.down_proj"]  # fmt: skip
        peft["rank_pattern"] = {key: times * stored.usual.r for key, times in fused.items()}
        peft["alpha_pattern"] = {key: times * stored.usual.alpha for key, times in fused.items()}
    return replace(stored, tensors=joined, peft=peft)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy or save the adapter again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}; copy or save the adapter again")
    return value


def _method_of(file: Path, peft: dict[str, Any]) -> tuple[Method, Settings]:
    """The method of an adapter_config.json, and the settings in it."""
    for method in METHODS.values():
        if (settings := method.from_peft(file, peft)) is not None:
            if peft.get("target_parameters") and not method.on_experts:
                refuse_keys(file, peft, {"target_parameters": None})
            return method, settings
    known = ", ".join(dict.fromkeys(method.peft_type for method in METHODS.values()))
    raise UserError(f"{file}: peft_type {peft.get('peft_type')!r} cannot be read here; expected one of {known}")


def _refuse_no_numbers(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with values that are no finite numbers."""
    faults = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if faults:
        raise UserError(
            f"{file}: {len(faults)} of its {len(tensors)} tensors hold values that are not finite numbers, the first "
            f"{faults[0]}: the training that made it diverged; take an earlier checkpoint, or train again"
        )


def _refuse_incomplete(file: Path, stored: StoredAdapter) -> None:
    """Refuse tensors that do not make up complete adapters, all faults in one report."""
    method, adapted = stored.method, stored.by_module
    if method.keys.trains_base:
        if not stored.tensors:
            raise UserError(f"{file}: no tensors in it; copy it again")
        return
    family = next(iter(method.peft_names.values())).partition("_")[0]  # what all of its tensors begin with
    for infix, what in method.peft_unread.items():
        if any(infix in name for name in stored.tensors):
            raise UserError(f"{file}: {what} cannot be read here; merge this adapter with PEFT instead")
    if not adapted and not stored.token_rows():
        example = f"{PREFIX}model.layers.0.….{next(iter(method.peft_names.values()))}"
        raise UserError(f"{file}: no {method.peft_type} tensors in it; expected names such as {example}")
    faults = [
        f"{file}: tensor {name} cannot be read here" for name in stored.replaced_tensors() if f".{family}_" in name
    ]
    faults += _shared_faults(file, stored)
    for name, tensors in adapted.items():
        kind = stored.adapter_class(name)
        names = kind.names(method)
        faults += [f"{file}: tensor {name}.{names[key]} is missing" for key in method.missing(tensors)]
        if not faults and not _fit_together(stored, name):
            shapes = ", ".join(f"{names[key]} {tuple(tensor.shape)}" for key, tensor in tensors.items())
            faults.append(f"{file}: the tensors of {name} do not fit together: {shapes}")
        says = from_pattern(name, stored.peft.get("rank_pattern") or {}, stored.usual.r)
        if not faults and (r := stored.sizes(name)[1]) not in (0, says) and "r" not in method.keys.not_read:
            faults.append(f"{file}: the tensors of {name} are of rank {r}, but {CONFIG_NAME} says {says}; correct r or "
                          "rank_pattern there, or copy the adapter again")  # fmt: skip
    if faults:
        more = [f"{file}: and {len(faults) - 5} more such tensors"] if len(faults) > 5 else []
        raise UserError([*faults[:5], *more])


def _shared_faults(file: Path, stored: StoredAdapter) -> list[str]:
    """What the file has of the tensors that all adapters share, against what its configuration says that it has."""
    method, faults = stored.method, []
    says = bool(method.saved_shared(stored.usual))
    for full in method.shared_names.values():
        if (full in stored.tensors) is not says:
            found = "is missing" if says else "is there, which PEFT would not read"
            cure = f"{method.shared_saved_by} of {CONFIG_NAME} is {says}: save the adapter again, or change that"
            faults.append(f"{file}: tensor {full} {found}, as {cure}")
    return faults[:1]


def _fit_together(stored: StoredAdapter, name: str) -> bool:
    tensors = stored.by_module[name]
    if stored.adapter_class(name) is ExpertsAdapter:
        return True  # seen when they were taken apart
    return all(tensor.dim() for tensor in tensors.values()) and stored.method.fits(tensors, stored.settings(name))


def attach_stored(
    model: nn.Module, stored: StoredAdapter, dtype: torch.dtype | None = None, dropout: float | None = None
) -> AdapterSet:
    """Put a stored adapter on a model.

    Args:
        dtype: of the adapter's tensors; by default the one that they are stored in.
        dropout: while training; what it was trained with by default.

    Raises:
        UserError: it does not fit this model.
    """
    found, wanted = getattr(model, "quantized_without", None), stored.quantized_without
    if found != wanted:
        has = f"without what {found} took out of it" if found else "whole"
        needs = "without what it took out of it" if wanted else "whole"
        raise UserError(
            f"{stored.folder}: this base was quantized {has}, but the adapter was trained on one that was quantized "
            f"{needs} (adapter.init_lora_weights); open the two apart, or export each merged"
        )
    stored = for_model(stored, model)
    dtype = dtype or stored.dtype
    on_attention = stored.method.on_attention
    if on_attention:
        refuse_other_layers(model, stored)
    shapes = shapes_of(model, stored.by_module, on_attention)
    layers = stored.layers(dtype, next(model.parameters()).device, dropout, shapes)
    refuse_misfit(stored, layers, shapes)
    put_on(model, layers)
    replaced = stored.replaced_tensors()
    refuse_misfit_replaced(model, stored, replaced)
    if stored.method.keys.trains_base:
        _refuse([f"{stored.folder}: has no {name}, which the model has" for name in trainable_names(model)
                 if name not in replaced], stored)  # fmt: skip
    trained = {name: train_parameter(model, name, dtype) for name in replaced}
    for target, source in tied_names(model).items():  # tied ones stay so, unless they were trained apart
        if target in replaced and source in replaced and torch.equal(replaced[target], replaced[source]):
            trained |= tie(model, target, trained[source])
    transposed = transposed_names(model, replaced)
    with torch.no_grad():
        for name, tensor in replaced.items():
            trained[name].copy_(tensor.T if name in transposed else tensor)
    for name in [name for name in trained if name.removesuffix(".weight") in layers]:
        trained.pop(name).requires_grad_(False)  # under an adapter: the base's
    for name, tensor in trained.items():
        if not _is_bias(name, stored) and not _is_saved(name, stored.peft):
            tensor.requires_grad_(False)  # embeddings that PEFT saved along: resized ones, say
    biases = {name: tensor for name, tensor in trained.items() if _is_bias(name, stored)}
    saved = {name: tensor for name, tensor in trained.items() if name not in biases}
    rows = stored.token_rows()
    _refuse_misfit_rows(model, stored, rows)
    token_rows = put_rows_on(model, {name: tokens for name, (tokens, _) in rows.items()}, dtype,
                             {name: values for name, (_, values) in rows.items()})  # fmt: skip
    return AdapterSet(layers, saved, biases, transposed, token_rows)


def refuse_not_repeated(stored: StoredAdapter, weights: Container[str]) -> None:
    """Refuse an adapter whose start is to be repeated (see `StoredAdapter.repeats_start`) where it cannot be.

    Args:
        weights: the names of those that come by before they are quantized.
    """
    left = [name for name in stored.by_module if f"{name}.weight" not in weights] if stored.repeats_start else []
    if left:
        raise UserError(
            f"{stored.folder}: PEFT took its start ({stored.peft.get('init_lora_weights')}) out of {left[0]}, where "
            "it cannot be repeated here; save the adapter with PEFT's path_initial_model_for_weight_conversion"
        )


def shapes_of(model: nn.Module, names: Iterable[str], on_attention: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights at these places, of those that there are.

    Args:
        on_attention: whether it is attention that is meant, and nothing else.
    """
    found = {}
    for name in names:
        try:
            place = place_of(model, name)
        except KeyError:
            continue
        if (place.adapter_class is AttentionAdapter) is on_attention:
            found[name] = tuple(place.weight.shape)
    return found


def _refuse_misfit_rows(
    model: nn.Module, stored: StoredAdapter, rows: Mapping[str, tuple[list[int], Tensor]]
) -> None:
    shapes, faults = shapes_of(model, rows), []
    for name, (tokens, values) in rows.items():
        if name not in shapes:
            faults.append(f"{stored.folder}: has rows of {name}, which this model has not")
        elif values.shape[1] != shapes[name][1] or not all(0 <= token < shapes[name][0] for token in tokens):
            faults.append(f"{stored.folder}: has rows of {values.shape[1]} values, for tokens up to {max(tokens)}, but "
                          f"{name} is {shapes[name]} in this model")  # fmt: skip
    _refuse(faults, stored)


def refuse_other_layers(model: nn.Module, stored: StoredAdapter) -> None:
    """Refuse prompts that are not on the layers that the configuration means: the top ones.

    Raises:
        UserError: another family, or other layers.
    """
    count = getattr(stored.usual.keys, "adapter_layers", None) or 0
    expected = list(all_attention(model))
    if count > len(expected) or set(expected[len(expected) - count :]) != stored.by_module.keys():
        raise UserError(
            f"{stored.folder}: has prompts for {', '.join(sorted(stored.by_module))}, but adapter_layers {count} means "
            f"the top {count} of the {len(expected)} layers of this model; it was trained on {stored.base}: name that "
            "as its base"
        )


def _is_saved(name: str, peft: Mapping[str, Any]) -> bool:
    """Whether a tensor is trained for `modules_to_save`, as PEFT reads that."""
    modules = peft.get("modules_to_save") or []
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name)
               for module in ([modules] if isinstance(modules, str) else modules))  # fmt: skip


def _is_bias(name: str, stored: StoredAdapter) -> bool:
    """Whether a tensor is there for `bias`, not for `modules_to_save`."""
    owner = name.removesuffix(".bias")
    return owner != name and (f"{owner}.base_layer.bias" in stored.tensors or f"{owner}.weight" not in stored.tensors)


def refuse_misfit_replaced(model: nn.Module, stored: StoredAdapter, replaced: Mapping[str, Tensor]) -> None:
    """Refuse tensors that replace none of the model's, or one of another shape; see `refuse_misfit`."""
    faults = []
    transposed = transposed_names(model, replaced)
    for name, tensor in replaced.items():
        owner, _, attribute = name.rpartition(".")
        module = _submodule(model, owner)
        parameter = getattr(module, attribute, None)
        behind_handle = isinstance(parameter, WeightHandle) and isinstance(module, FrozenLinear | FrozenEmbedding)
        if parameter is None or not (isinstance(parameter, nn.Parameter) or behind_handle):
            faults.append(f"{stored.folder}: replaces {name}, which is not a parameter of this model")
            continue
        shape = tuple(parameter.shape)
        shape = shape[::-1] if name in transposed else shape
        if tuple(tensor.shape) != shape:
            faults.append(f"{stored.folder}: replaces {name} as {tuple(tensor.shape)}, but it is {shape} in this model"
                          f"{resized(tuple(tensor.shape), shape)}")  # fmt: skip
    _refuse(faults, stored)


def resized(found: tuple[int, ...], there: tuple[int, ...]) -> str:
    """What to say of embeddings with another number of rows; empty where that is not it."""
    if len(found) != 2 or len(there) != 2 or found[1:] != there[1:]:
        return ""
    return (f"; the vocabulary was resized to {found[0]} tokens before training: call resize_token_embeddings("
            f"{found[0]}) on the base with transformers, save that, and name it with --model")  # fmt: skip


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def refuse_misfit(stored: StoredAdapter, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an adapter that was made for another model, all its faults in one report.

    Args:
        names: of the places that it adapts.
        shapes: of the model's weights that can be adapted, by the name of their place: (out, in), (vocabulary, dim), or
            (experts, out, in).
    """
    faults = []
    for name in names:
        found = stored.sizes(name)[0]
        if name not in shapes:
            what = _WHAT[stored.adapter_class(name)]
            faults.append(f"{stored.folder}: adapts {name}, which is not {what} of this model")
        elif (found := tuple(one or other for one, other in zip(found, shapes[name], strict=False))) != shapes[name]:
            faults.append(f"{stored.folder}: adapts {name} as {found}, but it is {shapes[name]} in this model")
    _refuse(faults, stored)


def _refuse(faults: list[str], stored: StoredAdapter) -> None:
    if faults:
        more = [f"{stored.folder}: and {len(faults) - 3} more like these"] if len(faults) > 3 else []
        raise UserError(
            [*faults[:3], *more, f"{stored.folder}: it was trained on {stored.base}; name that as its base"]
        )
