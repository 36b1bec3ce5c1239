"""What a run that goes on is held against, once its data and its model are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_tool.config import Config, Mark, marked
from qlora_tool.errors import UserError
from qlora_tool.run_folder import RunFolder
from qlora_tool.training.belonging import changes, other_machine, other_version
from qlora_tool.training.checkpoints import Checkpoint
from qlora_tool.training.going_on import ALLOW, LENGTH, PASSES, refuse_another_length, refuse_differences, short

logger = logging.getLogger(__name__)

# Compared by what is in them, and by what all processes together make of it.
_PLACES = ("model.name_or_path", "model.revision", "data.train", "data.eval", "data.chat_template", "model.device")


def newest_whole(folder: RunFolder) -> Checkpoint | None:
    """The newest checkpoint of a run that is as it was written; what is wrong with later ones is said in a line each.
    None where there is no checkpoint at all.

    Raises:
        UserError: none of them is whole.
    """
    faults: list[tuple[Path, str]] = []
    for path in reversed(folder.checkpoint_folders()):
        try:
            found = Checkpoint.read(path)
        except UserError as error:
            faults.append((path, str(error)))
            continue
        for broken, line in faults:
            reason = line.removeprefix(f"{broken}: ").removesuffix("; give an earlier one with --resume")
            logger.warning("%s: %s; going on from %s", broken, reason, path)
        return found
    if faults:
        cure = "give --overwrite to start anew"
        raise UserError([f"{line.removesuffix('; give an earlier one with --resume')}; {cure}" for _, line in faults])
    return None


def refuse_another_run(
    folder: RunFolder, checkpoint: Path, config: Config, resume: str, extend: bool, allow_changes: bool = False
) -> None:
    """Refuse a checkpoint of a run that was configured differently than `config`, which is decided to its last key.

    Args:
        resume, extend, allow_changes: as they were given to `checkpoint_to_resume`.

    Raises:
        UserError: naming the keys.
    """
    if not allow_changes:
        refuse_differences(checkpoint, config, LENGTH)
    if resume == "auto":
        refuse_another_length(folder, config, extend)


def refuse_changes(checkpoint: Checkpoint, here: Mapping[str, Any], makes: Mapping[str, Any], allowed: bool) -> None:
    """Refuse what changes the numbers of a run that goes on, and warn where they may not be the same to the bit.

    Args:
        here: what the run belongs to now; see `belongs_to`.
        makes: what computes it now; see `made_by`.
        allowed: `--allow-changes` was given: changes are said, and the run goes on.

    Raises:
        UserError: naming what differs.
    """
    if not checkpoint.manifest:
        logger.warning("%s: of version 0.1, without a list of its files: that it is whole, and of this base and these "
                       "data, cannot be checked", checkpoint.path)  # fmt: skip
        return
    try:
        belonged, made = checkpoint.manifest["belongs_to"], checkpoint.manifest["made_by"]
        found = [*_configured(belonged["config"], here["config"]), *other_version(made, makes),
                 *changes(belonged, here)]  # fmt: skip
        elsewhere = other_machine(made, makes)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint.path}: its manifest.json does not say what it belongs to ({error!r}); give "
                        "another one with --resume") from error  # fmt: skip
    named = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
    if found and not allowed:
        raise UserError(f"{checkpoint.path}: what it belongs to has changed ({named}); bring that back, give "
                        f"--overwrite to start anew, or {ALLOW}")  # fmt: skip
    if found:
        logger.warning("--allow-changes: %s: goes on, though what it belongs to has changed (%s)", checkpoint.path,
                       named)  # fmt: skip
    if elsewhere:
        logger.warning("%s: was made elsewhere (%s): the run goes on, and not to the bit", checkpoint.path,
                       "; ".join(elsewhere))  # fmt: skip


def _configured(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Keys of a configuration as JSON whose values change a run's numbers. Where files lie is not among them: what is
    in them is compared."""
    free = marked(Mark.FREE_ON_RESUME) | {*LENGTH, *_PLACES, PASSES}
    return [
        f"{section}.{key}: {short(value)} there, {short(here.get(section, {}).get(key))} here"
        for section, values in there.items() for key, value in values.items()
        if f"{section}.{key}" not in free and value != here.get(section, {}).get(key)
    ]  # fmt: skip
