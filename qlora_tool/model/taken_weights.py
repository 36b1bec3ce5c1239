"""Linear modules whose weight a family multiplies with itself, so that what sits on the module computes nothing."""

from __future__ import annotations

import inspect
import re

from torch import nn


def takes_weight(model: nn.Module, name: str) -> bool:
    """Whether the module that the linear module `name` is part of multiplies with its weight and does not call it, as
    mamba's mixer does with dt_proj. It is told by the source of its class."""
    owner, _, attribute = name.rpartition(".")
    try:
        source = inspect.getsource(type(model.get_submodule(owner)))
    except (AttributeError, OSError, TypeError):
        return False
    return re.search(rf"self\.{re.escape(attribute)}\.weight\s*@", source) is not None
