"""Which linear modules take an adapter, and with which rank and alpha."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.methods import METHODS
from qlora_tool.methods.keys import MethodKeys
from qlora_tool.methods.method import Settings
from qlora_tool.model.text_part import is_outside, outside_text
from qlora_tool.weights.modules import FrozenLinear

if TYPE_CHECKING:
    from torch import nn

    from qlora_tool.config import AdapterConfig

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, FrozenLinear]:
    """The modules that take an adapter, by name, in the model's order.

    `target_modules` and `exclude_modules` are read as PEFT reads them: a list holds full names or the ends of them, a
    string is a regular expression that the full name must match; `all-linear` is every linear module but the output
    embeddings. What `modules_to_save` fully trains takes no adapter. Modules beside the text part of a multimodal model
    take one where their own part is named (`vision_tower`), not by a last name that both have.

    Raises:
        UserError: a name or expression that matches no linear module.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    output = cast(Any, model).get_output_embeddings()  # transformers leaves it untyped
    outside = outside_text(model)
    wanted, excluded = config.target_modules, config.exclude_modules
    if wanted == ALL_LINEAR:
        chosen = [name for name, module in linears.items() if module is not output and not is_outside(name, outside)]
    else:
        _refuse_unmatched("adapter.target_modules", wanted, linears)
        chosen = [name for name in linears if matches(name, wanted)]
        chosen = _without_unnamed(chosen, wanted, outside)
    if excluded:
        _refuse_unmatched("adapter.exclude_modules", excluded, linears)
        chosen = [name for name in chosen if not matches(name, excluded)]
    chosen = [name for name in chosen if not _is_inside(name, config.modules_to_save)]
    if not chosen:
        keys = [key for key in ("exclude_modules", "modules_to_save") if getattr(config, key)]
        raise UserError(f"adapter.{' and adapter.'.join(keys)}: no module of adapter.target_modules is left to adapt")
    return {name: linears[name] for name in chosen}


def _without_unnamed(chosen: Sequence[str], wanted: str | Sequence[str], outside: Sequence[str]) -> list[str]:
    """The chosen modules without those of parts beside the text that no pattern names by itself, as long as others are
    left."""
    patterns = [wanted] if isinstance(wanted, str) else wanted
    parts = [part for part in outside if not any(part.rpartition(".")[2] in pattern for pattern in patterns)]
    return [name for name in chosen if not is_outside(name, parts)] or list(chosen)


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """Whether a module's name is meant by a list of names (or the ends of them) or by a regular expression."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module, or one that it is part of, is named in `modules`."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), modules) for end in range(1, len(parts) + 1))


def _refuse_unmatched(key: str, wanted: str | Sequence[str], linears: Mapping[str, object]) -> None:
    last_names = sorted({name.rpartition(".")[2] for name in linears})
    faults = []
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        if not any(matches(name, wanted if isinstance(wanted, str) else [pattern]) for name in linears):
            faults.append(
                f"{key}: {pattern!r} matches no linear module of this model{did_you_mean(pattern, last_names)}; it has "
                f"{', '.join(last_names)}"
            )
    if faults:
        raise UserError(faults)


def settings_for(name: str, config: AdapterConfig) -> Settings:
    """A layer's settings, `rank_pattern` and `alpha_pattern` applied as PEFT applies them: the first key that the name
    ends with (as a regular expression) wins."""
    return Settings(
        r=from_pattern(name, config.rank_pattern, config.r),
        alpha=from_pattern(name, config.alpha_pattern, config.lora_alpha),
        dropout=config.lora_dropout,
        keys=own_keys(config),
    )


def own_keys(config: AdapterConfig) -> MethodKeys:
    """The keys of the section that belong to the configured method alone."""
    keys = METHODS[config.method].keys
    return keys(**{name: getattr(config, name) for name in keys.model_fields if hasattr(config, name)})


Number = TypeVar("Number", int, float)


def from_pattern(name: str, pattern: Mapping[str, Number], default: Number) -> Number:
    """The value that a pattern gives the module `name`; see `settings_for`."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
