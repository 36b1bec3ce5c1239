"""What `inspect` does: look at an adapter, and cut it where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tool.artifacts import Artifact
from qlora_tool.inspection.truncate import Truncation, refuse_truncation, truncate
from qlora_tool.inspection.updates import Inspection, Row, inspect_adapter


@dataclass(frozen=True)
class InspectResult:
    """What was found, and what was written.

    Attributes:
        inspection: the modules' updates; `.modules` has their singular values.
        truncation: the cut adapter, where one was asked for.

    Example:
        >>> from qlora_tool import inspect
        >>> found = inspect("my-run", all=True)
        >>> len(found.rows) == len(found.inspection.modules), found.truncation
        (True, None)
    """

    inspection: Inspection
    truncation: Truncation | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of the table."""
        return self.inspection.rows

    def as_json(self) -> dict[str, Any]:
        cut = None if self.truncation is None else self.truncation.as_json()
        return self.inspection.as_json() | {"truncated": cut}


def inspect(
    artifact: Artifact, *, every_module: bool = False, r: int | None = None, output: Path | None = None,
    data: str | None = None, overwrite: bool = False,
) -> InspectResult:
    """Look at an adapter.

    Args:
        every_module: a row of the table for each module, not for each kind.
        r: the rank to cut it to, into `output`; None: nothing is cut.
        data: rows on which both are compared; None: the run's evaluation rows.
        overwrite: an existing folder may be replaced.

    Raises:
        UserError: see `inspect_adapter` and `truncate`.
    """
    if r is not None and output is not None:
        refuse_truncation(artifact, r, output, overwrite)
    found = inspect_adapter(artifact, every_module)
    if r is None or output is None:
        return InspectResult(found)
    return InspectResult(found, truncate(artifact, found, r, output, data))
