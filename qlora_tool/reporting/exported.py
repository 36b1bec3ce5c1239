"""What an export leaves in the folder of its run, for the report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.errors import ToolError
from qlora_tool.files.atomic import write_json
from qlora_tool.ops.measured import today
from qlora_tool.reporting.found import adapter_hashes, notes_of_exports
from qlora_tool.run_folder import EXPORTS, RunFolder

if TYPE_CHECKING:
    from qlora_tool.export.write import ExportResult

logger = logging.getLogger(__name__)


def note_export(run: Path, result: ExportResult) -> None:
    """Note an export in the folder of the run whose adapter was exported; nothing where `run` is no run's folder. Where
    it cannot be written the export is no worse for it."""
    folder = RunFolder(run)
    if not folder.holds_run() or not folder.is_finished():
        return
    known = notes_of_exports(folder)
    known[str(result.folder.resolve())] = {
        "date": today(), "adapter": adapter_hashes(folder), "format": result.format, "dtype": result.dtype,
        "gguf_type": result.facts.get("options", {}).get("gguf_type") if result.format == "gguf" else None,
        "base": result.facts.get("base"), "bytes": result.bytes, "verification": result.facts.get("verification"),
    }  # fmt: skip
    try:
        write_json(folder.notes / EXPORTS, known)
    except (ToolError, OSError) as error:
        logger.warning("the run's report will not have this export: %s", error)
