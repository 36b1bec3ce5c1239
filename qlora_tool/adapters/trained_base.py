"""Tensors of the base that are trained themselves: `modules_to_save`, and biases."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import nn

from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.model.text_part import is_outside, outside_text, text_modules
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.modules import FrozenEmbedding, FrozenLinear


def train_modules(model: nn.Module, names: list[str], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Make the tensors of the named modules trained, by parameter name; tied ones stay tied.

    Args:
        names: of modules, in full or the ends of them; all that is inside of them is trained.

    Raises:
        UserError: a name that is not a module of the model, or a module that cannot be fully trained.
    """
    trained: dict[str, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for wanted in names:
        chosen = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not chosen:
            last_names = sorted({name.rpartition(".")[2] for name in modules if name})
            raise UserError(f"adapter.modules_to_save: no module {wanted!r}{did_you_mean(wanted, last_names)}")
        found = [parameter for name in chosen for parameter in parameter_names(modules[name], name)]
        if not found:
            raise UserError(f"adapter.modules_to_save: {wanted!r} has no weights; leave it out")
        trained |= {name: train_parameter(model, name, dtype) for name in found if name not in trained}
    return _tied_too(model, trained)


def train_all(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Make every tensor of the text part trained, by parameter name; tied ones stay tied.

    Raises:
        UserError: some are quantized, as the base's own files have them, or cannot be trained.
    """
    names = trainable_names(model)
    quantized = [name for name in names if (handle := _handle(model, name)) is not None and handle.kind != "none"]
    if quantized:
        raise UserError(
            f"adapter.method: full trains the base's own weights, but {len(quantized)} of them are quantized in its "
            f"files, such as {quantized[0]}; name a base in 16 bits, or choose another method"
        )
    return _tied_too(model, {name: train_parameter(model, name, dtype) for name in names})


def trainable_names(model: nn.Module) -> list[str]:
    """The parameters of the text part, tied ones under one name."""
    outside, tied = outside_text(model), tied_names(model)
    names = [name.removeprefix(".") for name in parameter_names(model, "", whole=True)]
    return [name for name in names if not is_outside(name, outside) and tied.get(name) not in names]


def _handle(model: nn.Module, name: str) -> WeightHandle | None:
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute)
    return found if isinstance(found, WeightHandle) else None


def _tied_too(model: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Trained tensors, and what is tied to them."""
    for target, source in tied_names(model).items():
        if source in trained:
            trained |= tie(model, target, trained[source])
        elif target in trained:
            trained |= tie(model, source, trained[target])
    return trained


def tie(model: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, nn.Parameter]:
    """Let the parameter `name` be `parameter`, another's; {name: parameter}."""
    _set_parameter(model, name, parameter)
    return {name: parameter}


def parameter_names(module: nn.Module, prefix: str, *, whole: bool = False) -> list[str]:
    """The parameters of a module and of all inside it, by their names in the checkpoint.

    Args:
        whole: whether they are wanted for full fine-tuning, not for `modules_to_save`.

    Raises:
        UserError: there are frozen weights among them that are not a linear module's.
    """
    found = []
    for name, inner in module.named_modules(prefix=prefix):
        if isinstance(inner, FrozenLinear | FrozenEmbedding):
            found += [f"{name}.weight"] + ([] if getattr(inner, "bias", None) is None else [f"{name}.bias"])
        elif not isinstance(inner, WeightHandle):
            found += [f"{name}.{attribute}" for attribute, _ in inner.named_parameters(recurse=False)]
            if any(isinstance(child, WeightHandle) for child in inner.children()):
                key, cure = ("method: full", "choose another") if whole else ("modules_to_save", "leave it out")
                raise UserError(f"adapter.{key}: {name} holds experts, which cannot be fully trained; {cure}")
    return found


def train_parameter(model: nn.Module, name: str, dtype: torch.dtype | None) -> nn.Parameter:
    """Put a trained copy of one parameter, in `dtype` (None: that of products with it), in its place."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    frozen = getattr(module, attribute)
    dtype = dtype or frozen.dtype
    value = frozen.dense(dtype) if isinstance(frozen, WeightHandle) else frozen.detach()
    parameter = nn.Parameter(value.to(dtype, copy=True))
    _set_parameter(model, name, parameter)
    return parameter


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    behind_handle = isinstance(module, FrozenLinear | FrozenEmbedding) and attribute == "weight"
    if isinstance(module, FrozenEmbedding) and module.weight.kind != "none":
        raise UserError(
            f"adapter.modules_to_save: {name} cannot be fully trained while model.embeddings: int8 "
            "quantizes it; leave one of the two out"
        )
    frozen = getattr(module, attribute)
    setattr(module, attribute, WeightHandle(parameter, frozen.dtype) if behind_handle else parameter)


def transposed_names(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of the parameters that the model's own modules keep as (in, out)."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    return frozenset(
        name for name in names
        if name.endswith(".weight") and (owner := linears.get(name.removesuffix(".weight"))) and owner.transposed
    )  # fmt: skip


def train_biases(
    model: nn.Module, which: str, adapted: Container[str], dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    """Make biases trained that are not yet: none, those of adapted modules (`lora_only`), or all of the text part."""
    trained: dict[str, nn.Parameter] = {}
    if which == "none":
        return trained
    for name, module in text_modules(model).items():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and not bias.requires_grad and (which == "all" or name in adapted):
            trained[f"{name}.bias"] = train_parameter(model, f"{name}.bias", dtype)
    return trained
