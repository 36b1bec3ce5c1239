"""The keys of a configuration that belong to one adapter method alone."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class MethodKeys(BaseModel):
    """A method's own keys of the section `adapter`, each with its type, bounds, default and docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
