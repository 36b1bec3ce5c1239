"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Checked against PEFT 0.21: it loads what is written here, and what it writes is read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_tool.adapters.attach import METHODS, AdapterSet, put_on, train_biases, train_whole
from qlora_tool.adapters.method import Adapter, AdapterSettings
from qlora_tool.adapters.targets import from_pattern, matches
from qlora_tool.errors import UserError
from qlora_tool.files import write_json
from qlora_tool.model.layers import FrozenLinear
from qlora_tool.model.tensor_files import TensorSpec, read_all, write_tensors

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
        "fan_in_fan_out": any(model.get_submodule(name).transposed for name in adapters.layers),
        "target_modules": _target_names(adapters, model),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapters.saved}) or None,
        # Whole names: no two of them match the same layer, whatever order a reader takes them in.
        "rank_pattern": {name: s.r for name, s in settings.items() if s.r != config.r},
        "alpha_pattern": {name: s.alpha for name, s in settings.items() if s.alpha != config.lora_alpha},
    }


def _target_names(adapters: AdapterSet, model: nn.Module) -> list[str]:
    """The adapted modules' last parts where those mean exactly them, else whole names; sorted."""
    linears = [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    last_parts = sorted({name.rpartition(".")[2] for name in adapters.layers})
    meant = {name for name in linears if matches(name, last_parts)}
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

    def layers(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Adapter]:
        """The adapters by the name of their linear module. Which modules those are is told by the tensors that are
        there; `target_modules` is not needed for it."""
        names = [name.removesuffix(".lora_A.weight") for name in self.tensors if name.endswith(".lora_A.weight")]
        return {
            name: METHODS[self.method].from_peft(
                {suffix: self.tensors[f"{name}.{suffix}"].to(device, dtype) for suffix in self._suffixes(name)},
                self._settings(name),
            )
            for name in names
        }

    def _suffixes(self, name: str) -> list[str]:
        return [key[len(name) + 1 :] for key in self.tensors if key.startswith(f"{name}.lora_")]

    def _settings(self, name: str) -> AdapterSettings:
        return AdapterSettings(
            r=self.tensors[f"{name}.lora_A.weight"].shape[0],
            alpha=from_pattern(name, self.peft.get("alpha_pattern") or {}, self.peft["lora_alpha"]),
            dropout=self.peft.get("lora_dropout", 0.0),
            use_rslora=bool(self.peft.get("use_rslora")),
        )

    def whole_tensors(self) -> dict[str, Tensor]:
        """What it replaces whole, by parameter name: `modules_to_save` and biases."""
        return {
            name.replace(".base_layer.bias", ".bias"): tensor
            for name, tensor in self.tensors.items()
            if ".lora_" not in name
        }


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
    try:
        peft = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_file}: not JSON ({error})") from error
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_all(weights_file).items()}
    _refuse_unknown_kind(config_file, peft, tensors)
    provenance_file = folder / "qlora_tool.json"
    provenance = json.loads(provenance_file.read_text(encoding="utf-8")) if provenance_file.exists() else None
    return StoredAdapter(folder, peft, tensors, provenance)


def _refuse_unknown_kind(file: Path, peft: dict[str, Any], tensor_names: Iterable[str]) -> None:
    if peft.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {peft.get('peft_type')!r}; only LORA adapters (with DoRA, rsLoRA) can be read")
    for key in ("target_parameters", "alora_invocation_tokens", "layer_replication", "corda_config", "arrow_config"):
        if peft.get(key):
            raise UserError(f"{file}: {key} is set, which cannot be read here; merge this adapter with PEFT instead")
    if any(".lora_embedding_" in name for name in tensor_names):
        raise UserError(f"{file.parent}: LoRA on embeddings cannot be read here; merge this adapter with PEFT instead")
    for key in ("r", "lora_alpha"):
        if key not in peft:
            raise UserError(f"{file}: no key {key!r}; it is no complete PEFT configuration")


def attach_stored(model: nn.Module, stored: StoredAdapter, dtype: torch.dtype | None = None) -> AdapterSet:
    """Put a stored adapter on a model.

    Args:
        dtype: what the adapter is kept in; what it was stored in by default.

    Raises:
        UserError: it does not fit this model.
    """
    dtype = dtype or next(iter(stored.tensors.values())).dtype
    layers = stored.layers(dtype, next(model.parameters()).device)
    shapes = {name: (module.out_features, module.in_features) for name, module in model.named_modules()
              if isinstance(module, FrozenLinear)}  # fmt: skip
    refuse_misfit(stored, layers, shapes)
    put_on(model, layers)
    adapters = AdapterSet(layers, train_whole(model, stored.peft.get("modules_to_save") or [], dtype),
                          train_biases(model, stored.peft.get("bias") or "none", layers, dtype))  # fmt: skip
    whole = stored.whole_tensors()
    own = adapters.saved | adapters.biases
    for name in own:  # of two tensors that are tied a file may hold one
        if name not in whole:
            twin = next((other for other in own if own[other] is own[name] and other in whole), None)
            if twin is None:
                raise UserError(f"{stored.folder}: tensor {name} is missing from {WEIGHTS_NAME}")
            whole[name] = whole[twin]
    with torch.no_grad():
        for name, tensor in whole.items():
            own[name].copy_(tensor)
    return adapters


def refuse_misfit(
    stored: StoredAdapter, layers: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, int]]
) -> None:
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
    if faults:
        more = [f"{stored.folder}: and {len(faults) - 3} more such modules"] if len(faults) > 3 else []
        raise UserError([*faults[:3], *more, f"{stored.folder}: it was trained on {stored.base}; name that as the base"])
