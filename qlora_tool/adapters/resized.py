"""The base as an adapter needs it that was trained after its vocabulary was resized: with as many rows as the adapter's
own embeddings have."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from qlora_tool.adapters.peft_reading import for_model
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.model.resized import resized_config
from qlora_tool.once import log_once

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


logger = logging.getLogger(__name__)


def fitting_config(model_config: Any, stored: StoredAdapter | None, trust_remote_code: bool = False) -> Any:
    """The base's configuration with the vocabulary of an adapter's embeddings, where it replaces all that depends on
    it: the values of the base's own new rows, which nobody has, are then not needed. Else the configuration itself, and
    the adapter is refused as one that does not fit.

    Args:
        model_config: the base's transformers configuration; it stays as it is.
        stored: the adapter; None for none.
    """
    vocabulary = getattr(model_config.get_text_config(), "vocab_size", None)  # none: refused where it is opened
    if stored is None or vocabulary is None or not any(
        name.endswith(".weight") and tensor.dim() == 2 and tensor.shape[0] != vocabulary
        for name, tensor in stored.replaced_tensors().items()
    ):
        return model_config
    skeleton = build_skeleton(model_config, trust_remote_code)
    replaced = for_model(stored, skeleton).replaced_tensors()
    rows = {replaced[name].shape[0] for name in _embeddings(skeleton) if name in replaced} - {vocabulary}
    if len(rows) != 1:
        return model_config
    resized = resized_config(model_config, rows.pop())
    if not _brings_all(replaced, skeleton, build_skeleton(resized, trust_remote_code)):
        return model_config
    log_once(logger, logging.INFO, f"{stored.folder}: brings embeddings of {resized.get_text_config().vocab_size} "
             f"tokens: the base's vocabulary of {vocabulary} is resized to that")  # fmt: skip
    return resized


def _embeddings(model: nn.Module) -> list[str]:
    """The names of the weights of input embeddings and output projection."""
    both = cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()
    return [f"{name}.weight" for name, module in model.named_modules() if any(module is one for one in both)]


def _brings_all(replaced: Mapping[str, Tensor], before: nn.Module, after: nn.Module) -> bool:
    """Whether every tensor that a resized vocabulary changes is replaced by one of its new shape, or tied to such."""
    old = {name: tuple(tensor.shape) for name, tensor in before.state_dict().items()}
    new = {name: tuple(tensor.shape) for name, tensor in after.state_dict().items()}
    twins = tied_names(after)
    for name in (name for name, shape in new.items() if old.get(name) != shape):
        own = replaced.get(name, replaced.get(twins.get(name, name)))
        if own is None or tuple(own.shape) != new[name]:
            return False
    return True
