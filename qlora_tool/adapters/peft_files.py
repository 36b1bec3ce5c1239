"""Adapters written in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`; PEFT 0.21 loads them."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qlora_tool.adapters.adapter import ExpertsAdapter
from qlora_tool.adapters.attach import AdapterSet
from qlora_tool.adapters.peft_names import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
)
from qlora_tool.adapters.targets import matches, own_keys
from qlora_tool.files.atomic import write_json
from qlora_tool.files.tensors import write_all
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import SavedWith, Settings

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig


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
        frozenset(name.rpartition(".")[2] for name in forms),
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
