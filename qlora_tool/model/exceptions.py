"""Which weights stay as they are stored while the rest is quantized: named ones, and a checkpoint's own exceptions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import nn

from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.model.names import plan_load
from qlora_tool.model.stored import StoredAs, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of bitsandbytes' `llm_int8_skip_modules` means a module: as the beginning of its name up to a dot, as
    a regular expression for such a beginning, or as the end of its name
    (transformers' `should_convert_module`, whose version 5.17 forgot the dot)."""
    return any(name.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) for pattern in patterns)


def refuse_unknown_names(key: str, patterns: Iterable[str], model: nn.Module) -> None:
    """Refuse names that mean nothing in the model, all in one report.

    Args:
        key: the key that lists them.
        patterns: see `is_named`.
        model: a skeleton, its modules as transformers made them.

    Raises:
        UserError: a name that fits no module, or only blocks (`mlp`) but no module in them, or that is no regular
            expression.
    """
    names = [name for name, _ in model.named_modules() if name]
    with_weights = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None)
                    is not None]  # fmt: skip
    last_names = sorted({last for name in names if not (last := name.rpartition(".")[2]).isdigit()})
    faults = []
    for pattern in patterns:
        try:
            found = any(is_named(name, [pattern]) for name in names)
        except re.error as error:
            faults.append(f"{key}: {pattern!r} is neither a module's name nor a regular expression ({error})")
            continue
        if not found:
            faults.append(
                f"{key}: {pattern!r} fits no module of this model{did_you_mean(pattern, last_names)}; its modules end "
                f"in {', '.join(last_names)}"
            )
        elif not any(is_named(name, [pattern]) for name in with_weights):
            every = f".*{pattern}"
            cure = f"; write '{every}'" if any(is_named(name, [every]) for name in with_weights) else ""
            faults.append(f"{key}: {pattern!r} ends the names of blocks, and of no module with weights in them: "
                          f"nothing would be left out{cure}")  # fmt: skip
    if faults:
        raise UserError(faults)


def left_by_bitsandbytes(module: nn.Module) -> bool:
    """Whether transformers has no module of bitsandbytes in the place of this one (experts, FalconLinear)."""
    from transformers.pytorch_utils import Conv1D

    return not (type(module) is nn.Linear or isinstance(module, Conv1D))


def default_skips(model: PreTrainedModel) -> list[str]:
    """What transformers leaves unquantized where nobody lists anything: the output layer, what is tied, the last
    module."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return get_keys_to_not_convert(model)


def stored_plain(model: PreTrainedModel, weights: Collection[str]) -> set[str]:
    """Those of the weights that a checkpoint of bitsandbytes itself holds unquantized. Of any other one, none.

    Told by the files where they are at hand, else by what config.json lists and by what bitsandbytes has modules for.
    """
    stored = StoredAs.of(model)
    if stored.method != "bitsandbytes":
        return set()
    checkpoint = stored.checkpoint()
    if checkpoint is None:
        return _by_configuration(model, weights, stored)
    tensors = stored_tensors(checkpoint, stored)
    found = set()
    for group in plan_load(model, list(tensors)).groups:
        if not any(tensors[name].is_bitsandbytes for _, name in group.sources):
            found |= {name for name in group.targets() if name in weights}
    return found


def _by_configuration(model: PreTrainedModel, weights: Collection[str], stored: StoredAs) -> set[str]:
    listed = stored.settings.get("llm_int8_skip_modules")
    skipped = default_skips(model) if listed is None else listed
    modules = dict(model.named_modules())
    return {
        name for name in weights
        if is_named(owner := name.rpartition(".")[0], skipped) or left_by_bitsandbytes(modules[owner])
    }  # fmt: skip
