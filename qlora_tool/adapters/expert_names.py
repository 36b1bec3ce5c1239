"""The names that PEFT's files give adapters on the weights of experts (`target_parameters`).

PEFT wraps a module once for each of its parameters that it adapts, in the order in which they are registered. The files
tell the wrappers apart by `.base_layer` alone: the last one is `….experts`, the one inside it `….experts.base_layer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

EXPERTS = "experts"  # what transformers calls the modules that hold them
LAST = "down_proj"  # of an experts module's weights, as transformers registers them
_INSIDE = ".base_layer"


def file_names(parameters: Iterable[str]) -> dict[str, str]:
    """What files call each of the adapted weights of experts.

    Args:
        parameters: the adapted ones of a model, by their full names.
    """
    of_module: dict[str, list[str]] = {}
    for name in parameters:
        of_module.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: f"{module}{_INSIDE * depth}"
        for module, names in of_module.items()
        for depth, name in enumerate(reversed(_in_order(names)))
    }


def parameter_of(file_name: str, target_parameters: Iterable[str]) -> str | None:
    """The weight that a file's name means; None where it is no name of one.

    Args:
        target_parameters: as adapter_config.json has them.
    """
    module = file_name
    while module.endswith(_INSIDE):
        module = module.removesuffix(_INSIDE)
    depth = (len(file_name) - len(module)) // len(_INSIDE)
    adapted = _in_order({
        parameter for owner, _, parameter in (name.rpartition(".") for name in target_parameters)
        if module == owner or module.endswith(f".{owner or EXPERTS}")
    })  # fmt: skip
    return f"{module}.{adapted[-1 - depth]}" if depth < len(adapted) else None


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name.rpartition(".")[2] == LAST, name))


def names_in_file(layers: Mapping[str, bool]) -> dict[str, str]:
    """What files call every adapted place.

    Args:
        layers: the places by name, and whether each is a weight of experts.
    """
    return {name: name for name in layers} | file_names(name for name, experts in layers.items() if experts)
