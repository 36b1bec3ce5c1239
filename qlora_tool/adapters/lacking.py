"""Places that an adapter's configuration names and its file lacks. PEFT lets them start fresh: they add nothing until
they are trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from qlora_tool.adapters.adapter import Adapter, generator_for
from qlora_tool.adapters.peft_names import is_target
from qlora_tool.adapters.places import find_places
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.adapters.targets import handles_of, matches, settings_for
from qlora_tool.model.experts import expert_weight_names, is_experts_module
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import is_linear
from qlora_tool.model.text_part import is_outside, outside_text
from qlora_tool.once import log_once
from qlora_tool.sizes import counted
from qlora_tool.weights.modules import FrozenLinear

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig

logger = logging.getLogger(__name__)


def target_names(model: nn.Module, peft: Mapping[str, Any], *, embeddings: bool = False) -> list[str]:
    """The places of a model's text part that PEFT would adapt by a configuration, in the model's order: linear modules,
    embeddings, and weights of experts.

    Args:
        model: read, or a skeleton.
        peft: an adapter_config.json.
        embeddings: whether its method can be on them.
    """
    wanted, outside = peft.get("target_modules"), outside_text(model)
    output = cast(Any, model).get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        if is_experts_module(module):
            weights = {*handles_of(module), *expert_weight_names(module)}
            parameters = (f"{name}.{attribute}" for attribute in sorted(weights))
            names += [one for one in parameters if matches(one, list(peft.get("target_parameters") or ()))]
        linear = isinstance(module, FrozenLinear) or is_linear(module)
        possible = linear or (embeddings and isinstance(module, nn.Embedding))
        if not wanted or not possible or is_outside(name, outside) or not is_target(name, peft):
            continue
        if wanted != "all-linear" or (linear and module is not output):
            names.append(name)
    return names


def further_targets(stored: StoredAdapter, model_config: Any, trust_remote_code: bool = False) -> list[str]:
    """The modules of a model that an adapter's configuration names, where those that its file has do not tell: it says
    in which layers, or has names that none of them ends in."""
    peft, wanted = stored.peft, stored.peft.get("target_modules")
    by_name = isinstance(wanted, list) and all(any(matches(name, [one]) for name in stored.by_module) for one in wanted)
    if not isinstance(wanted, list) or (by_name and peft.get("layers_to_transform") is None):
        return []
    skeleton = build_skeleton(model_config, trust_remote_code)
    modules = {**peft, "target_parameters": None}
    return target_names(skeleton, modules, embeddings=bool(stored.method.peft_embedding_names))


def lacking(model: nn.Module, stored: StoredAdapter) -> list[str]:
    """The places that an adapter's configuration names, and for which its file has nothing.

    Args:
        model: read, or a skeleton.
        stored: by the model's names; see `for_model`.
    """
    if stored.method.on_attention or stored.method.keys.trains_base:
        return []
    found = target_names(model, stored.peft, embeddings=bool(stored.method.peft_embedding_names))
    return [name for name in found if name not in stored.by_module]


def say_lacking(stored: StoredAdapter, names: Sequence[str]) -> None:
    """Warn, once, that places stay as the base has them."""
    if names:
        log_once(logger, logging.WARNING, f"{stored.folder}: has no tensors for {_of_all(stored, names)}: the base "
                 "stays as it is there, as under PEFT")  # fmt: skip


def started_fresh(stored: StoredAdapter, names: Sequence[str]) -> str:
    """What a run says of places that start fresh beside an adapter that it starts from."""
    return (f"adapter.init_from: {stored.folder} has no tensors for {_of_all(stored, names)}: they start fresh, as "
            "under PEFT")  # fmt: skip


def _of_all(stored: StoredAdapter, names: Sequence[str]) -> str:
    count = len(names) + len(stored.by_module)
    return f"{len(names)} of the {counted(count, 'place')} that its configuration names, such as {names[0]}"


def fresh_layers(
    model: nn.Module, names: Sequence[str], stored: StoredAdapter, layers: Mapping[str, Adapter],
    config: AdapterConfig, dtype: torch.dtype, seed: int,
) -> dict[str, Adapter]:  # fmt: skip
    """Fresh adapters for those of the places that a run's configuration names as well.

    Args:
        names: what the file lacks.
        stored: the adapter that the run starts from. Where its start was taken out of the base, nothing is made: such
            files are whole.
        layers: its own adapters, whose shared tensors the fresh ones have too.
        config: the run's section.
        dtype: of the tensors.
        seed: of their starts.
    """
    if not names or stored.start:
        return {}
    places, method = find_places(model, config), stored.method
    first = next(iter(layers.values()), None)
    shared = {} if first is None else {name: first.tensors[name] for name in method.shared_names}
    return {
        name: places[name].adapter_class.start(method, places[name], settings_for(name, config), dtype,
                                               generator_for(seed, name), shared)
        for name in names if name in places
    }  # fmt: skip
