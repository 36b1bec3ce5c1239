"""Whether an adapter's files are as the run wrote them that made it."""

from __future__ import annotations

import logging
from pathlib import Path

from qlora_tool.adapters.peft_names import WEIGHTS_NAME
from qlora_tool.errors import UserError
from qlora_tool.files.sealed import first_change, listing, read_sealed, write_sealed
from qlora_tool.once import log_once

logger = logging.getLogger(__name__)

LIST_NAME = "manifest.json"


def list_files(folder: Path) -> None:
    """Write down what files an adapter's folder has, with their hashes.

    Raises:
        MachineError: the disk refuses.
    """
    write_sealed(folder / LIST_NAME, {"files": listing(folder)})


def refuse_damaged(folder: Path) -> None:
    """Hold an adapter's files against the hashes that its run wrote down; one without them is read as ever.

    Raises:
        UserError: its weights are others. Of another file a warning tells, as people edit those.
    """
    if not (folder / LIST_NAME).exists():
        return
    cure = f"copy the adapter again; if it is meant to be so, remove {LIST_NAME}"
    try:
        files = dict(read_sealed(folder / LIST_NAME)["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        log_once(logger, logging.WARNING, f"{folder / LIST_NAME}: broken ({reason}), so that it cannot be told whether "
                 f"the adapter is whole; {cure}")  # fmt: skip
        return
    if changed := first_change(folder, {WEIGHTS_NAME: files.pop(WEIGHTS_NAME, None)}):
        raise UserError(f"{folder}: {changed}: damaged, or written by another program; {cure}")
    if changed := first_change(folder, files):
        log_once(logger, logging.WARNING, f"{folder}: {changed}: edited, or damaged; {cure}")
