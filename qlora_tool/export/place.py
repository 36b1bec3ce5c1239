"""Where an export may go, told before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from qlora_tool.errors import UserError
from qlora_tool.export.staging import REPORT
from qlora_tool.files.atomic import refuse_no_place
from qlora_tool.files.reading import refuse_no_path
from qlora_tool.run_folder import MANIFEST, PROVENANCE


def refuse_taken(output: Path, overwrite: bool) -> None:
    """Refuse to write over anything, or with `overwrite` over anything that is neither a model nor an adapter."""
    refuse_no_path(output, "--output-dir")
    if not output.exists():
        if output.is_symlink():
            raise UserError(f"{output}: a link to a folder that is not there; remove it, or give another --output-dir")
        refuse_no_place(output, "--output-dir")
        return
    if not output.is_dir():
        raise UserError(f"{output}: a file, where --output-dir expects a folder that does not exist yet")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: exists; give --overwrite to replace it, or another --output-dir")
    ours = (output / REPORT).exists() or ((output / PROVENANCE).exists() and (output / "adapter_config.json").exists())
    if not ours or (output / MANIFEST).exists():
        raise UserError(f"{output}: holds something other than an export, which --overwrite would delete; give another "
                        "--output-dir")  # fmt: skip
