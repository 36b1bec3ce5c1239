"""Whether a run starts anew or goes on, and from which checkpoint; what may not be overwritten."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_tool.config import Config, Mark, differences, marked
from qlora_tool.errors import UserError
from qlora_tool.run_folder import RunFolder

# What a run may decide differently from what it was asked, once data and model are read; checked when it has.
_DECIDED_LATER = {"data.train_on"}
# What may differ where a checkpoint is named: the run may go on for longer.
_LENGTH = {"training.max_steps", "training.num_train_epochs"}


def checkpoint_to_resume(folder: RunFolder, config: Config, resume: str, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, or None for a run from the start.

    Args:
        folder: the run's.
        config: of the run that is asked for, before data and model are read.
        resume: `auto` goes on with an unfinished run of the same configuration; `never` starts anew; a path is a
            checkpoint, or a run whose newest checkpoint is taken.
        overwrite: an earlier run in the folder may be replaced.

    Raises:
        UserError: the folder holds another run, or a finished one; or there is no such checkpoint.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"training.output_dir: {folder.path} is a file; expected a folder")
    if resume not in ("auto", "never"):
        checkpoint = checkpoint_at(Path(resume))
        if folder.holds_run() and not folder.holds(checkpoint) and not overwrite:
            raise UserError(
                f"{folder.path}: holds a run, and not the one of --resume {resume}; give another --output-dir, or "
                "--overwrite to replace it"
            )
        _refuse_differences(checkpoint, config, _DECIDED_LATER)
        return checkpoint
    if not folder.holds_run() or overwrite:
        return None
    if resume == "never":
        raise UserError(f"{folder.path}: holds a run; give --overwrite to replace it, or another --output-dir")
    if found := _differences(folder.config(), config, _DECIDED_LATER):
        raise UserError(
            f"{folder.path}: holds another run ({', '.join(found[:3])}); give another --output-dir, or "
            "--overwrite to replace it"
        )
    if folder.is_finished():
        raise UserError(
            f"{folder.path}: holds this run, finished; give --overwrite to run it again, or another --output-dir"
        )
    checkpoints = folder.checkpoint_folders()
    return checkpoints[-1] if checkpoints else None


def refuse_another_run(checkpoint: Path, config: Config) -> None:
    """Refuse a checkpoint of a run that was configured differently than `config`, which is decided to its last key.

    Raises:
        UserError: naming the keys.
    """
    _refuse_differences(checkpoint, config)


def checkpoint_at(path: Path) -> Path:
    """The checkpoint at `path`, or the newest one of the run there.

    Raises:
        UserError: there is none.
    """
    if (path / "state.json").exists():
        return path
    found = RunFolder(path).checkpoint_folders()
    if not found:
        raise UserError(f"--resume {path}: no checkpoint; expected a folder such as runs/NAME/checkpoints/step-000100")
    return found[-1]


def _refuse_differences(checkpoint: Path, config: Config, also_free: Collection[str] = ()) -> None:
    run = RunFolder(checkpoint.absolute().parent.parent)
    if not run.holds_run():  # a checkpoint by itself: what does not fit is found when it is loaded
        return
    if found := _differences(run.config(), config, {*_LENGTH, *also_free}):
        raise UserError(
            f"{checkpoint}: its run was configured differently ({', '.join(found[:3])}); resume with "
            f"{run.config_file}"
        )


def _differences(left: Config, right: Config, also_free: Collection[str] = ()) -> list[str]:
    """Keys whose values tell two runs apart, each as `key: theirs, not ours`."""
    return [
        f"{key}: {_short(there)} there, {_short(here)} here"
        for key, (there, here) in differences(left, right).items()
        if key not in marked(Mark.FREE_ON_RESUME) and key not in also_free
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}..."
