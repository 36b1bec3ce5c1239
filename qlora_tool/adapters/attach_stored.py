"""Put a stored adapter on a model, which it has to fit."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qlora_tool.adapters.adapter import Adapter, AttentionAdapter, EmbeddingAdapter, ExpertsAdapter
from qlora_tool.adapters.attach import AdapterSet, put_on
from qlora_tool.adapters.attention import all_attention
from qlora_tool.adapters.lacking import fresh_layers, lacking, say_lacking
from qlora_tool.adapters.peft_names import is_saved
from qlora_tool.adapters.peft_reading import for_model
from qlora_tool.adapters.places import place_of
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.adapters.token_rows import put_rows_on, refuse_rows
from qlora_tool.adapters.trained_base import tie, train_parameter, trainable_names, transposed_names
from qlora_tool.errors import UserError
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.sizes import counted
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenEmbedding, FrozenLinear

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig

_WHAT = {Adapter: "a linear module", AttentionAdapter: "attention", EmbeddingAdapter: "an embedding",
         ExpertsAdapter: "a weight of experts"}  # fmt: skip


def attach_stored(
    model: nn.Module, stored: StoredAdapter, dtype: torch.dtype | None = None, dropout: float | None = None,
    config: AdapterConfig | None = None, seed: int = 0,
) -> AdapterSet:  # fmt: skip
    """Put a stored adapter on a model.

    Args:
        dtype: of the adapter's tensors, and of those that it replaces; by default the one that they are stored in,
            and that of the model's own.
        dropout: while training; what it was trained with by default.
        config: of the run that starts from it: what its file lacks starts fresh. None: that stays as the base has it,
            which a warning says.
        seed: of what starts fresh.

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
    of_replaced, dtype = dtype, dtype or stored.dtype
    on_attention = stored.method.on_attention
    if on_attention:
        refuse_other_layers(model, stored)
    shapes = shapes_of(model, stored.by_module, on_attention)
    left = lacking(model, stored)
    layers = stored.layers(dtype, next(model.parameters()).device, dropout, shapes | shapes_of(model, left), left)
    refuse_misfit(stored, layers, shapes, model)
    fresh = {} if config is None else fresh_layers(model, left, stored, layers, config, dtype, seed)
    if config is None:
        say_lacking(stored, left)
    layers |= fresh
    put_on(model, layers)
    replaced = stored.replaced_tensors()
    refuse_misfit_replaced(model, stored, replaced)
    if stored.method.keys.trains_base:
        _refuse([f"{stored.folder}: has no {name}, which the model has" for name in trainable_names(model)
                 if name not in replaced], stored, model)  # fmt: skip
    trained = {name: train_parameter(model, name, of_replaced) for name in replaced}
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
        kept = stored.method.keys.trains_base or _is_bias(name, stored) or is_saved(name, stored.peft)
        if not kept:
            tensor.requires_grad_(False)  # embeddings that PEFT saved along: resized ones, say
    biases = {name: tensor for name, tensor in trained.items() if _is_bias(name, stored)}
    saved = {name: tensor for name, tensor in trained.items() if name not in biases}
    rows = stored.token_rows()
    refuse_misfit_rows(model, stored, rows)
    refuse_rows(model, rows, layers, f"{stored.folder}: trainable_token_indices",
                "merge this adapter with PEFT instead")  # fmt: skip
    token_rows = put_rows_on(model, {name: tokens for name, (tokens, _) in rows.items()}, dtype,
                             {name: values for name, (_, values) in rows.items()})  # fmt: skip
    return AdapterSet(layers, saved, biases, transposed, token_rows, tuple(fresh))


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


def refuse_misfit_rows(
    model: nn.Module, stored: StoredAdapter, rows: Mapping[str, tuple[list[int], Tensor]]
) -> None:
    """Refuse rows of what is not there, or is smaller; see `refuse_misfit`."""
    shapes, faults = shapes_of(model, rows), []
    for name, (tokens, values) in rows.items():
        if name not in shapes:
            faults.append(f"{stored.folder}: has rows of {name}, which this model has not")
        elif values.shape[1] != shapes[name][1] or not all(0 <= token < shapes[name][0] for token in tokens):
            faults.append(f"{stored.folder}: has rows of {values.shape[1]} values, for tokens up to {max(tokens)}, but "
                          f"{name} is {shapes[name]} in this model")  # fmt: skip
    _refuse(faults, stored, model)


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
            f"the top {count} of the {counted(len(expected), 'layer')} of this model; {cure_of_misfit(stored, model)}"
        )


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
    _refuse(faults, stored, model)


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


def refuse_misfit(
    stored: StoredAdapter, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]], model: nn.Module
) -> None:
    """Refuse an adapter that was made for another model, all its faults in one report.

    Args:
        names: of the places that it adapts.
        shapes: of the model's weights that can be adapted, by the name of their place: (out, in), (vocabulary, dim), or
            (experts, out, in).
        model: which it is to be on.
    """
    faults = []
    for name in names:
        found = stored.sizes(name)[0]
        if name not in shapes:
            what = _WHAT[stored.adapter_class(name)]
            faults.append(f"{stored.folder}: adapts {name}, which is not {what} of this model")
        elif (found := tuple(one or other for one, other in zip(found, shapes[name], strict=False))) != shapes[name]:
            faults.append(f"{stored.folder}: adapts {name} as {found}, but it is {shapes[name]} in this model")
    _refuse(faults, stored, model)


def cure_of_misfit(stored: StoredAdapter, model: nn.Module, option: str = "") -> str:
    """What to do about an adapter that does not fit a model.

    Args:
        option: how another base is named, such as ", with --model".
    """
    named, there = stored.base or "", str(cast(Any, model).config.name_or_path)
    in_cache = f"models--{named.replace('/', '--')}/" in there  # a snapshot of the hub's
    if named and (named == there or in_cache or Path(named).resolve() == Path(there).resolve()):
        return (f"its adapter_config.json names this base, {named}: so it was made for another version of it, or on "
                "something that takes no adapter here; merge it with what made it")  # fmt: skip
    return f"name the base that it was trained on{f', {named}' if named else ''}{option}"


def _refuse(faults: list[str], stored: StoredAdapter, model: nn.Module) -> None:
    if faults:
        more = [f"{stored.folder}: and {len(faults) - 3} more like these"] if len(faults) > 3 else []
        raise UserError([*faults[:3], *more, f"{stored.folder}: {cure_of_misfit(stored, model)}"])
