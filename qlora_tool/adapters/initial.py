"""The adapter that a run starts from (`adapter.init_from`), and what it leaves to the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qlora_tool.adapters.adapter import ExpertsAdapter
from qlora_tool.adapters.attach import AdapterSet
from qlora_tool.adapters.peft_reading import for_model, read_adapter
from qlora_tool.adapters.places import find_places
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.adapters.targets import matches, settings_for
from qlora_tool.adapters.token_rows import wanted_tokens
from qlora_tool.adapters.trained_base import parameter_names
from qlora_tool.errors import UserError

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig


def started_from(config: AdapterConfig) -> StoredAdapter | None:
    """The adapter that a run starts from; None where it starts from none.

    Raises:
        UserError: see `read_adapter`.
    """
    return read_adapter(Path(config.init_from)) if config.init_from else None


def initial_settings(
    stored: StoredAdapter, config: AdapterConfig, targets: Sequence[str] = ()
) -> dict[str, Any]:
    """The keys of the configuration that an adapter to start from decides.

    Args:
        stored: the adapter.
        config: what was asked for; keys that nobody set are free to follow.
        targets: further modules of the model that the adapter's configuration names; see `further_targets`.

    Raises:
        UserError: keys that somebody set and that contradict the adapter.
    """
    peft, usual = stored.peft, stored.usual_trained
    if stored.repeats_start:
        raise UserError(
            f"{stored.folder}: PEFT took its start ({peft.get('init_lora_weights')}) out of the base, so no run can go "
            "on from that; save the adapter with PEFT's path_initial_model_for_weight_conversion, which makes a plain "
            "one of it"
        )
    bias = str(peft.get("bias") or "none")
    decided: dict[str, Any] = {
        "method": stored.method.name, "r": usual.r, "lora_alpha": usual.alpha,
        "bias": "lora_only" if bias.endswith("_only") else bias,  # PEFT's vera_only
        **{key: getattr(usual.keys, key) for key in usual.keys.model_fields_set},
    }  # fmt: skip
    decided = {key: value for key, value in decided.items() if usual.keys.reads(key)}
    faults = [
        f"adapter.{key}: {getattr(config, key)}, but {stored.folder}, which adapter.init_from names, has {value}; "
        f"leave adapter.{key} out"
        for key, value in decided.items() if key in config.model_fields_set and getattr(config, key) != value
    ]  # fmt: skip
    start = getattr(config, "init_lora_weights", "default")
    if start != "default" and "init_lora_weights" in config.model_fields_set - decided.keys():
        faults.append(
            f"adapter.init_lora_weights: {start}, but A and B start as adapter.init_from ({stored.folder}) has them; "
            "leave one of the two out"
        )
    if faults:
        raise UserError(faults)
    free = usual.keys.reads("lora_dropout") and "lora_dropout" not in config.model_fields_set
    if free and usual.dropout:
        decided["lora_dropout"] = usual.dropout
    if isinstance(peft.get("target_modules"), list) and "target_modules" not in config.model_fields_set:
        modules = [name for name in stored.by_module if stored.adapter_class(name) is not ExpertsAdapter]
        decided["target_modules"] = _targets(peft, modules, targets)
    if "target_parameters" not in config.model_fields_set and (parameters := peft.get("target_parameters")):
        # The weight of a linear module is that module's adapter, which target_modules names here.
        decided["target_parameters"] = [one for one in parameters if not one.endswith(".weight")]
        if "target_modules" in decided:
            modules = [one.removesuffix(".weight") for one in parameters if one.endswith(".weight")]
            decided["target_modules"] += [one for one in modules if one not in decided["target_modules"]]
    for key in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern",
                "trainable_token_indices"):  # fmt: skip
        if peft.get(key) and key not in config.model_fields_set and key not in decided:
            decided[key] = peft[key]
    if stored.start.get("frozen_half"):  # the file has twice the rank and alpha
        for key, own in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
            if key in decided:
                decided[key] = {name: value for name in stored.by_module
                                if (value := getattr(stored.trained(name)[1], own)) != getattr(usual, own)}  # fmt: skip
    return {f"adapter.{key}": value for key, value in decided.items()}


def _targets(peft: Mapping[str, Any], modules: Sequence[str], targets: Sequence[str]) -> list[str]:
    """PEFT's `target_modules` without what is not adapted all the same: names of modules that the model has not, and
    of those in `modules_to_save`; names in full where a list of layers says which."""
    if peft.get("layers_to_transform") or peft.get("layers_pattern"):
        return sorted({*modules, *targets})
    return [one for one in peft["target_modules"] if any(matches(name, [one]) for name in [*modules, *targets])]


def refuse_other_places(
    module: nn.Module, adapters: AdapterSet, config: AdapterConfig, stored: StoredAdapter
) -> None:
    """Refuse a configuration that names other modules than the adapter to start from is on, or other ranks.

    Raises:
        UserError: naming at most three of them.
    """
    if stored.method.keys.trains_base:
        return
    _refuse_untrained(module, adapters, config, stored)
    wanted = {name: settings_for(name, config) for name in find_places(module, config)}
    faults = [
        f"adapter.target_modules: {name} is {'' if name in wanted else 'not '}among them, but {stored.folder}, which "
        f"adapter.init_from names, is {'' if name in adapters.layers else 'not '}on it; leave target_modules out"
        for name in sorted(wanted.keys() ^ adapters.layers.keys())
    ]
    has_rank, has_scale = (stored.method.keys.reads(key) for key in ("r", "lora_alpha"))
    for name in wanted.keys() & adapters.layers.keys():
        found = adapters.layers[name].settings
        if (has_rank and found.r != wanted[name].r) or (has_scale and found.alpha != wanted[name].alpha):
            faults.append(
                f"adapter.rank_pattern, adapter.alpha_pattern: {name} would have r {wanted[name].r} and lora_alpha "
                f"{wanted[name].alpha}, but has {found.r} and {found.alpha} in {stored.folder}; leave the patterns out"
            )
    if faults:
        raise UserError(faults[:3])


def _refuse_untrained(module: nn.Module, adapters: AdapterSet, config: AdapterConfig, stored: StoredAdapter) -> None:
    """Refuse `modules_to_save` and `trainable_token_indices` of which the adapter has nothing, or other tokens: PEFT
    cannot load such a file either."""
    has, faults = f"{stored.folder}, which adapter.init_from names,", []
    trained = [name for name, tensor in adapters.saved.items() if tensor.requires_grad]
    for name, one in module.named_modules():
        missing = matches(name, config.modules_to_save) and not any(key.startswith(f"{name}.") for key in trained)
        if missing and parameter_names(one, name):
            faults.append(f"adapter.modules_to_save: {name} is among them, but {has} has no tensor of it; leave it "
                          "out, or take a whole adapter")  # fmt: skip
    rows = for_model(stored, module).token_rows()
    for name, tokens in wanted_tokens(module, config).items():
        found = rows[name][0] if name in rows else []
        if found != tokens:
            faults.append(f"adapter.trainable_token_indices: {tokens} of {name}, but {has} has rows of "
                          f"{found or 'none'}; leave the key out, or take a whole adapter")  # fmt: skip
    if faults:
        raise UserError(faults[:3])
