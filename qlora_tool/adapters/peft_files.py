"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Checked against PEFT 0.21: it loads what is written here, and what it writes is read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_tool.adapters.attach import METHODS, AdapterSet, put_on, tie, train_parameter, transposed_names
from qlora_tool.adapters.method import Adapter, AdapterSettings
from qlora_tool.adapters.targets import from_pattern, matches
from qlora_tool.errors import UserError
from qlora_tool.files.atomic import write_json
from qlora_tool.files.tensors import TensorSpec, read_all, write_tensors
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenLinear

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


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
    tensors = {f"{PREFIX}{name}": tensor.detach() for name, tensor in sorted(adapters.tensors().items())}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_tensors(folder / WEIGHTS_NAME, specs, tensors.items(), {"format": "pt"})
    write_json(folder / CONFIG_NAME, _peft_config(adapters, config, model, base, revision), sort_keys=True)


def _peft_config(
    adapters: AdapterSet, config: AdapterConfig, model: nn.Module, base: str, revision: str | None
) -> dict[str, Any]:
    settings = {name: layer.settings for name, layer in adapters.layers.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.method == "dora",
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
        "bias": config.bias,
        "lora_bias": any("lora_B.bias" in layer.peft_tensors() for layer in adapters.layers.values()),
        "fan_in_fan_out": any(model.get_submodule(name).transposed for name in adapters.layers),
        "target_modules": _target_names(adapters, model),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapters.saved}) or None,
        # Whole names: no two of them match the same layer, whatever order a reader takes them in.
        "rank_pattern": {name: s.r for name, s in settings.items() if s.r != config.r},
        "alpha_pattern": {name: s.alpha for name, s in settings.items() if s.alpha != config.lora_alpha},
    }


def _target_names(adapters: AdapterSet, model: nn.Module) -> list[str]:
    """The adapted modules' last parts where those mean exactly them, else whole names; sorted."""
    last_parts = sorted({name.rpartition(".")[2] for name in adapters.layers})
    meant = {name for name, _ in model.named_modules() if matches(name, last_parts)}
    return last_parts if meant == set(adapters.layers) else sorted(adapters.layers)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on the disk.

    Attributes:
        folder: where.
        peft: its `adapter_config.json`.
        tensors: by PEFT's names without the prefix.
        provenance: its `qlora_tool.json`, or None where something else made it.
    """

    folder: Path
    peft: dict[str, Any]
    tensors: dict[str, Tensor]
    provenance: dict[str, Any] | None

    @property
    def base(self) -> str | None:
        return self.peft.get("base_model_name_or_path")

    @property
    def method(self) -> str:
        return "dora" if self.peft.get("use_dora") else "lora"

    def layers(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", dropout: float | None = None
    ) -> dict[str, Adapter]:
        """The adapters by the name of their linear module. Which modules those are is told by the tensors that are
        there; `target_modules` is not needed for it.

        Args:
            dropout: while training; None: as it was trained before.
        """
        return {
            name: METHODS[self.method].from_peft(
                {suffix: tensor.to(device, dtype) for suffix, tensor in parts.items()}, self.settings(name, dropout)
            )
            for name, parts in _parts(self.tensors).items()
        }

    def settings(self, name: str, dropout: float | None = None) -> AdapterSettings:
        """The settings of the layer on the linear module `name`."""
        return AdapterSettings(
            r=self.tensors[f"{name}.lora_A.weight"].shape[0],
            alpha=from_pattern(name, self.peft.get("alpha_pattern") or {}, self.peft["lora_alpha"]),
            dropout=self.peft.get("lora_dropout", 0.0) if dropout is None else dropout,
            use_rslora=bool(self.peft.get("use_rslora")),
        )

    def whole_tensors(self) -> dict[str, Tensor]:
        """What it replaces whole, by parameter name: `modules_to_save`, biases, and an adapted output layer's weight,
        which PEFT writes along. As the model keeps them: a Conv1D's (in, out)."""
        return {
            name.replace(".base_layer.", "."): tensor for name, tensor in self.tensors.items() if ".lora_" not in name
        }


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Each adapted module's tensors by what follows its name: `lora_A.weight` and so on."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, lora, suffix = key.partition(".lora_")
        if lora:
            found.setdefault(name, {})[f"lora_{suffix}"] = tensor
    return found


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).exists()


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter's folder, ours or PEFT's.

    Raises:
        UserError: files missing, a kind of adapter that cannot be read, pickled weights.
    """
    config_file, weights_file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_file.exists():
        raise UserError(f"{folder}: no {CONFIG_NAME} in it, so it is no adapter")
    if not weights_file.exists():
        hint = "; its weights are a pickle: load and save it once with PEFT (safe_serialization is its default)" if (
            folder / "adapter_model.bin"
        ).exists() else ""  # fmt: skip
        raise UserError(f"{folder}: no {WEIGHTS_NAME} in it{hint}")
    peft = _read_json(config_file)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_all(weights_file).items()}
    _refuse_unknown_kind(config_file, peft)
    provenance_file = folder / "qlora_tool.json"
    provenance = _read_json(provenance_file) if provenance_file.exists() else None
    stored = StoredAdapter(folder, peft, tensors, provenance)
    _refuse_incomplete(weights_file, stored)
    return stored


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


# What changes a LoRA layer's forward pass, its places or the base beside A and B, and is not done here.
_UNKNOWN_KEYS = (
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "layer_replication", "arrow_config",
    "use_qalora", "use_bdlora", "monteclora_config", "kasa_config",
)  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others take something out of the base


def _refuse_unknown_kind(file: Path, peft: dict[str, Any]) -> None:
    if peft.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {peft.get('peft_type')!r}; only LORA (with DoRA, rsLoRA) can be read")
    for key in _UNKNOWN_KEYS:
        if peft.get(key):
            raise UserError(f"{file}: {key} is set, which cannot be read here; merge this adapter with PEFT instead")
    if (start := peft.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise UserError(
            f"{file}: init_lora_weights {start!r} changed the base too, which cannot be repeated here; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
    for key in ("r", "lora_alpha"):
        if key not in peft:
            raise UserError(f"{file}: no key {key!r}; it is no complete PEFT configuration")


def _refuse_incomplete(file: Path, stored: StoredAdapter) -> None:
    """Refuse tensors that do not make up whole LoRA layers, all faults in one report."""
    needed = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if stored.method == "dora" else [])]
    known = {*needed, *(["lora_B.bias"] if stored.method == "lora" else [])}
    layers = _parts(stored.tensors)
    if not layers:
        raise UserError(f"{file}: no LoRA tensors in it; expected names such as {PREFIX}model.layers.0.….lora_A.weight")
    if any(suffix.startswith("lora_embedding_") for parts in layers.values() for suffix in parts):
        raise UserError(f"{file}: LoRA on embeddings cannot be read here; merge this adapter with PEFT instead")
    faults = []
    for name, parts in layers.items():
        faults += [f"{file}: tensor {name}.{suffix} is missing" for suffix in needed if suffix not in parts]
        faults += [f"{file}: tensor {name}.{suffix} cannot be read here" for suffix in parts if suffix not in known]
        if not faults and not _fit_together(parts):
            shapes = ", ".join(f"{suffix} {tuple(tensor.shape)}" for suffix, tensor in parts.items())
            faults.append(f"{file}: the tensors of {name} do not fit together: {shapes}")
    if faults:
        more = [f"{file}: and {len(faults) - 5} more such tensors"] if len(faults) > 5 else []
        raise UserError([*faults[:5], *more])


def _fit_together(parts: Mapping[str, Tensor]) -> bool:
    """A (r, in), B (out, r), and what there is one of per output, (out,)."""
    lora_A, lora_B = parts["lora_A.weight"], parts["lora_B.weight"]
    per_output = [tensor for suffix, tensor in parts.items() if suffix not in ("lora_A.weight", "lora_B.weight")]
    return (
        lora_A.dim() == lora_B.dim() == 2
        and lora_A.shape[0] == lora_B.shape[1]
        and all(tensor.shape == lora_B.shape[:1] for tensor in per_output)
    )


def attach_stored(
    model: nn.Module, stored: StoredAdapter, dtype: torch.dtype | None = None, dropout: float | None = None
) -> AdapterSet:
    """Put a stored adapter on a model.

    Args:
        dtype: what the adapter is kept in; what it was stored in by default.
        dropout: while training; what it was trained with by default.

    Raises:
        UserError: it does not fit this model.
    """
    dtype = dtype or next(iter(stored.tensors.values())).dtype
    layers = stored.layers(dtype, next(model.parameters()).device, dropout)
    shapes = {name: (module.out_features, module.in_features) for name, module in model.named_modules()
              if isinstance(module, FrozenLinear)}  # fmt: skip
    refuse_misfit(stored, layers, shapes)
    put_on(model, layers)
    whole = stored.whole_tensors()
    _refuse_misfit_whole(model, stored, whole)
    trained = {name: train_parameter(model, name, dtype) for name in whole}
    for target, source in tied_names(model).items():  # tied ones stay so, unless they were trained apart
        if target in whole and source in whole and torch.equal(whole[target], whole[source]):
            trained |= tie(model, target, trained[source])
    transposed = transposed_names(model, whole)
    with torch.no_grad():
        for name, tensor in whole.items():
            trained[name].copy_(tensor.T if name in transposed else tensor)
    for name in [name for name in trained if name.removesuffix(".weight") in layers]:
        trained.pop(name).requires_grad_(False)  # under an adapter: the base's
    biases = {name: tensor for name, tensor in trained.items() if _is_bias(name, stored)}
    saved = {name: tensor for name, tensor in trained.items() if name not in biases}
    return AdapterSet(layers, saved, biases, transposed)


def _is_bias(name: str, stored: StoredAdapter) -> bool:
    """Whether a tensor is there for `bias`, not for `modules_to_save`."""
    owner = name.removesuffix(".bias")
    return owner != name and (f"{owner}.base_layer.bias" in stored.tensors or f"{owner}.weight" not in stored.tensors)


def _refuse_misfit_whole(model: nn.Module, stored: StoredAdapter, whole: Mapping[str, Tensor]) -> None:
    faults = []
    transposed = transposed_names(model, whole)
    for name, tensor in whole.items():
        owner, _, attribute = name.rpartition(".")
        module = _submodule(model, owner)
        parameter = getattr(module, attribute, None)
        is_linear_weight = isinstance(parameter, WeightHandle) and isinstance(module, FrozenLinear)
        if not isinstance(parameter, torch.nn.Parameter) and not is_linear_weight:
            faults.append(f"{stored.folder}: replaces {name}, which is no parameter of this model")
            continue
        shape = tuple(parameter.shape)
        shape = shape[::-1] if name in transposed else shape
        if tuple(tensor.shape) != shape:
            faults.append(f"{stored.folder}: replaces {name} as {tuple(tensor.shape)}, but it is {shape} in this model")
    _refuse(faults, stored)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def refuse_misfit(stored: StoredAdapter, layers: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an adapter that was made for another model, all its faults in one report.

    Args:
        layers: the adapter's.
        shapes: (out, in) of the model's linear modules by name.
    """
    faults = []
    for name in layers:
        lora_A, lora_B = stored.tensors[f"{name}.lora_A.weight"], stored.tensors[f"{name}.lora_B.weight"]
        found = (lora_B.shape[0], lora_A.shape[1])
        if name not in shapes:
            faults.append(f"{stored.folder}: adapts {name}, which is no linear module of this model")
        elif found != shapes[name]:
            faults.append(f"{stored.folder}: adapts {name} as {found}, but it is {shapes[name]} in this model")
    _refuse(faults, stored)


def _refuse(faults: list[str], stored: StoredAdapter) -> None:
    if faults:
        more = [f"{stored.folder}: and {len(faults) - 3} more like these"] if len(faults) > 3 else []
        raise UserError(
            [*faults[:3], *more, f"{stored.folder}: it was trained on {stored.base}; name that as its base"]
        )
