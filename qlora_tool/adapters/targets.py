"""Which modules and weights take an adapter, and with which rank and alpha."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor, nn

from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.methods import METHODS
from qlora_tool.methods.keys import MethodKeys
from qlora_tool.methods.method import Settings
from qlora_tool.model.experts import is_experts_module
from qlora_tool.model.projection_parts import parts_of
from qlora_tool.model.text_part import is_outside, outside_text
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenEmbedding, FrozenLinear

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that take an adapter, by name, in the model's order: linear ones, and embeddings that are named.

    `target_modules` and `exclude_modules` are read as PEFT reads them: a list holds full names or the ends of them, a
    string is a regular expression that the full name must match; `all-linear` is every linear module but the output
    embeddings. `qkv_proj.q` is the part q of a fused projection; see `find_parts`. `layers_to_transform` and
    `layers_pattern` leave some layers of what a list names. What `modules_to_save` fully trains takes no adapter.
    Modules beside the text part of a multimodal model take one where their own part is named (`vision_tower`), not by a
    last name that both have.

    Raises:
        UserError: a name or expression that matches nothing, or embeddings that cannot take this adapter.
    """
    candidates = {name: module for name, module in model.named_modules()
                  if isinstance(module, FrozenLinear | nn.Embedding)}  # fmt: skip
    output = cast(Any, model).get_output_embeddings()  # transformers leaves it untyped
    outside = outside_text(model)
    wanted, excluded = config.target_modules, config.exclude_modules
    if wanted == ALL_LINEAR:
        linears = [name for name, module in candidates.items() if isinstance(module, FrozenLinear)]
        chosen = [name for name in linears if candidates[name] is not output and not is_outside(name, outside)]
    else:
        parts = find_parts(model, config)
        whole = wanted if isinstance(wanted, str) else [one for one in wanted if one not in _named_parts(model, wanted)]
        _refuse_unmatched("adapter.target_modules", whole, candidates)
        chosen = [name for name in candidates if matches(name, whole) or name in parts]
        chosen = _without_unnamed(chosen, wanted, outside)
    chosen = _in_layers(chosen, config)
    if excluded:
        _refuse_unmatched("adapter.exclude_modules", excluded, candidates)
        chosen = [name for name in chosen if not matches(name, excluded)]
    chosen = [name for name in chosen if not _is_inside(name, config.modules_to_save)]
    if not chosen and wanted:
        keys = [key for key in ("exclude_modules", "modules_to_save") if getattr(config, key)]
        raise UserError(f"adapter.{' and adapter.'.join(keys)}: no module of adapter.target_modules is left to adapt")
    _refuse_embeddings({name: candidates[name] for name in chosen}, config)
    return {name: candidates[name] for name in chosen}


def find_parts(model: nn.Module, config: AdapterConfig) -> dict[str, dict[str, Tensor]]:
    """The linear modules of which `target_modules` names parts (`qkv_proj.q`), by name: the rows of each such part.

    Raises:
        UserError: a part that the module has not, a module named as a whole as well, or a method that cannot be on
            parts.
    """
    wanted = config.target_modules
    named = {} if isinstance(wanted, str) else _named_parts(model, wanted)
    found: dict[str, dict[str, Tensor]] = {}
    for pattern, places in named.items():
        part = pattern.rpartition(".")[2]
        for name, rows in places.items():
            if part not in rows:
                has = f"it has {', '.join(rows)}" if rows else "no parts of it are known; name it as a whole"
                raise UserError(f"adapter.target_modules: {pattern!r}: {name} has no part {part!r}"
                                f"{did_you_mean(part, list(rows))}; {has}")  # fmt: skip
            if matches(name, [one for one in wanted if one not in named]):
                raise UserError(f"adapter.target_modules: {name} is named as a whole and by its part {part!r}; leave "
                                "one of the two out")  # fmt: skip
            found.setdefault(name, {})[part] = rows[part]
    if found and not METHODS[config.method].on_parts:
        able = " or ".join(one.name for one in METHODS.values() if one.on_parts)
        raise UserError(f"adapter.target_modules: adapter.method {config.method} cannot be on a part of a projection "
                        f"({next(iter(named))}); choose {able}, or name it as a whole")  # fmt: skip
    return {name: {part: found[name][part] for part in sorted(found[name], key=list(_rows(model, name)).index)}
            for name in found}  # fmt: skip


def _named_parts(model: nn.Module, wanted: Sequence[str]) -> dict[str, dict[str, Mapping[str, Tensor]]]:
    """The patterns that end in one word more than modules' names: the modules that each means, with all their parts."""
    linears, found = _linears(model), {}
    for pattern in wanted:
        owner = pattern.rpartition(".")[0]
        modules = [name for name in linears if owner and matches(name, [owner])]
        if modules and not any(matches(name, [pattern]) for name in linears):
            found[pattern] = {name: _rows(model, name) for name in modules}
    return found


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]


def _rows(model: nn.Module, name: str) -> Mapping[str, Tensor]:
    return parts_of(model.config, name, cast(FrozenLinear, model.get_submodule(name)).out_features)


def _refuse_embeddings(chosen: Mapping[str, nn.Module], config: AdapterConfig) -> None:
    for name, module in chosen.items():
        if isinstance(module, FrozenLinear):
            continue
        if not METHODS[config.method].peft_embedding_names:
            able = " or ".join(one.name for one in METHODS.values() if one.peft_embedding_names)
            raise UserError(
                f"adapter.target_modules: {name} are embeddings, which adapter.method {config.method} cannot be on; "
                f"choose {able}, or leave them out"
            )
        if not isinstance(module, FrozenEmbedding) and not FrozenEmbedding.can_take_over(module):
            raise UserError(
                f"adapter.target_modules: {name} ({type(module).__name__}) does more than look rows up, and cannot "
                "take an adapter; leave it out, or train it whole with adapter.modules_to_save"
            )


def _in_layers(chosen: Sequence[str], config: AdapterConfig) -> list[str]:
    """Those of the chosen modules that lie in `layers_to_transform`, as PEFT counts layers: by the first number in a
    name, or the one after a name of `layers_pattern`. Names in full stay, whatever their layer.

    Raises:
        UserError: none is left, or a layer that there is not.
    """
    layers = config.layers_to_transform
    if layers is None:
        return list(chosen)
    numbers = {name: layer_of(name, config.layers_pattern) for name in chosen}
    wanted = [layers] if isinstance(layers, int) else layers
    there = sorted({number for number in numbers.values() if number is not None})
    if missing := [number for number in wanted if number not in there]:
        has = f"{there[0]} to {there[-1]}" if there else "none"
        raise UserError(f"adapter.layers_to_transform: there is no layer {missing[0]} among the targets; they are in "
                        f"layers {has}, counted from 0")  # fmt: skip
    in_full = () if isinstance(config.target_modules, str) else config.target_modules
    return [name for name in chosen if numbers[name] in wanted or name in in_full]


def tells_layers_apart(config: AdapterConfig) -> bool:
    """Whether an adapter may be on other modules of one layer than of the next, or of another rank there: a key counts
    layers, or a name or a pattern has a number that stands by itself (`layers.6.mlp`, `layers.[5-7]`, not `fc1`)."""
    if config.layers_to_transform is not None or getattr(config, "adapter_layers", None) is not None:
        return True
    keys = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "rank_pattern")
    named = (getattr(config, key, ()) or () for key in keys)
    patterns = [pattern for value in named for pattern in ([value] if isinstance(value, str) else value)]
    return any(re.search(r"(?<![A-Za-z_0-9])\d", pattern) for pattern in patterns)


def layer_of(name: str, patterns: str | Sequence[str] = ()) -> int | None:
    """The number of the layer that a module lies in; None where it lies in none.

    Args:
        patterns: names of lists of layers; by default the first number in the name counts.
    """
    for pattern in [patterns] if isinstance(patterns, str) and patterns else patterns or [r"[^.]*"]:
        start = r"(?:^|.*?\.)" if patterns else r".*?\."
        if found := re.match(rf"{start}{pattern}\.(?P<number>\d+)\.", name):
            return int(found["number"])
    return None


def find_target_parameters(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The weights of experts that take an adapter (`target_parameters`), by the name of the parameter, in the model's
    order; and the module that each is of. A name means every parameter that ends in it, as in PEFT.

    Raises:
        UserError: a name that matches no weight of experts, or a method that cannot be on them.
    """
    wanted = getattr(config, "target_parameters", [])
    experts = {f"{name}.{attribute}": module for name, module in model.named_modules()
               if is_experts_module(module) for attribute in handles_of(module)}  # fmt: skip
    faults = []
    for pattern in wanted:
        if not any(matches(name, [pattern]) for name in experts):
            last = sorted({".".join(name.split(".")[-2:]) for name in experts})
            has = f"it has {', '.join(last)}" if last else "this model has none"
            module = pattern.removesuffix(".weight")
            if any(matches(name, [module]) for name in _linears(model)):
                has = f"it is that of a linear module: name {module} in adapter.target_modules"
            faults.append(f"adapter.target_parameters: {pattern!r} matches no weight of experts"
                          f"{did_you_mean(pattern, last)}; {has}")  # fmt: skip
    if faults:
        raise UserError(faults)
    chosen = {name: module for name, module in experts.items() if matches(name, wanted)}
    if chosen and not METHODS[config.method].on_experts:
        able = " or ".join(one.name for one in METHODS.values() if one.on_experts)
        raise UserError(f"adapter.target_parameters: adapter.method {config.method} cannot be on experts; choose "
                        f"{able}, or leave them out")  # fmt: skip
    if chosen and config.lora_dropout:
        raise UserError("adapter.lora_dropout: PEFT has no dropout on experts, and cannot read such an adapter; set it "
                        "to 0, or leave adapter.target_parameters out")  # fmt: skip
    return chosen


def handles_of(module: nn.Module) -> list[str]:
    """The names of an experts module's weights, in the order in which transformers registers them."""
    names = [name for name, child in module.named_children() if isinstance(child, WeightHandle)]
    return sorted(names, key=lambda name: name == "down_proj")


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


def _refuse_unmatched(key: str, wanted: str | Sequence[str], candidates: Mapping[str, object]) -> None:
    linears = [name for name, module in candidates.items() if isinstance(module, FrozenLinear)]
    last_names = sorted({name.rpartition(".")[2] for name in linears})
    faults = []
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        if not any(matches(name, wanted if isinstance(wanted, str) else [pattern]) for name in candidates):
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


def unmatched_patterns(names: Iterable[str], config: AdapterConfig) -> list[str]:
    """A line for each entry of `rank_pattern` and `alpha_pattern` that none of the adapted modules has."""
    names, lines = list(names), []
    last_names = sorted({name.rpartition(".")[2] for name in names})
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                lines.append(f"adapter.{key}: {pattern!r} matches no adapted module and changes nothing"
                             f"{did_you_mean(pattern, last_names)}; there are {', '.join(last_names)}")  # fmt: skip
    return lines


Number = TypeVar("Number", int, float)


def from_pattern(name: str, pattern: Mapping[str, Number], default: Number) -> Number:
    """The value that a pattern gives the module `name`; see `settings_for`."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
