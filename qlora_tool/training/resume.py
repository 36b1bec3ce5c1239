"""Whether a run starts anew or goes on, and from which checkpoint; what may not be overwritten."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_tool.config import Config, Mark, differences, marked
from qlora_tool.errors import UserError
from qlora_tool.run_folder import RunFolder

# The keys that say how long a run is: a longer one may go on where a shorter one stopped, if that is asked for.
_LENGTH = ("training.max_steps", "training.num_train_epochs")


def checkpoint_to_resume(
    folder: RunFolder, config: Config, resume: str, overwrite: bool, extend: bool = False
) -> Path | None:
    """The checkpoint to go on from, or None for a run from the start.

    Args:
        folder: the run's.
        config: of the run that is asked for, before data and model are read.
        resume: `auto` goes on with an unfinished run of the same configuration; `never` starts anew; a path is a
            checkpoint, or a run whose newest checkpoint is taken.
        overwrite: an earlier run in the folder may be replaced.
        extend: the folder's run, finished or not, goes on for longer than it was to.

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
        _refuse_differences(checkpoint, config, {*_LENGTH, *_decided_later(config)})
        return checkpoint
    if extend and not folder.holds_run():
        raise UserError(f"--extend: {folder.path} holds no run to go on with; leave it out, or give its --output-dir")
    if not folder.holds_run() or overwrite:
        return None
    if resume == "never":
        raise UserError(f"{folder.path}: holds a run; give --overwrite to replace it, or another --output-dir")
    _refuse_another_length(folder, config, extend, _decided_later(config))
    if found := _differences(folder.config(), config, {*_LENGTH, *_decided_later(config)}):
        raise UserError(
            f"{folder.path}: holds another run ({', '.join(found[:3])}); give another --output-dir, or "
            "--overwrite to replace it"
        )
    checkpoints = folder.checkpoint_folders()
    if not folder.is_finished():
        return checkpoints[-1] if checkpoints else None
    if not extend:
        raise UserError(
            f"{folder.path}: holds this run, finished; give --overwrite to run it again, another --output-dir, or "
            "--extend with more training.max_steps or training.num_train_epochs to train it for longer"
        )
    if not checkpoints:
        raise UserError(
            f"--extend: {folder.path} holds no checkpoint to go on from; set adapter.init_from: {folder.adapter} to "
            "start from its adapter with a new optimizer, and give another --output-dir"
        )
    return checkpoints[-1]


def refuse_another_run(folder: RunFolder, checkpoint: Path, config: Config, resume: str, extend: bool) -> None:
    """Refuse a checkpoint of a run that was configured differently than `config`, which is decided to its last key.

    Args:
        resume, extend: as they were given to `checkpoint_to_resume`.

    Raises:
        UserError: naming the keys.
    """
    _refuse_differences(checkpoint, config, _LENGTH)
    if resume == "auto":
        _refuse_another_length(folder, config, extend)


def _refuse_another_length(folder: RunFolder, config: Config, extend: bool, also_free: Collection[str] = ()) -> None:
    """Refuse a run that is to be shorter than the one in the folder, or longer without being asked for."""
    there = folder.config()
    free = {key for key in differences(there, config) if key not in _LENGTH} | {*also_free}
    found = _differences(there, config, free)
    if found and _is_shorter(config, there):
        raise UserError(
            f"{folder.path}: holds another run ({', '.join(found)}); give another --output-dir, or "
            "--overwrite to replace it"
        )
    if found and not extend:
        raise UserError(
            f"{folder.path}: holds another run ({', '.join(found)}), a shorter one; give --extend to go on from its "
            "last checkpoint, another --output-dir, or --overwrite to replace it"
        )


def _is_shorter(config: Config, there: Config) -> bool:
    """Whether a run is to be shorter than the one there, as far as their keys tell before the data are read."""
    ours, theirs = config.training, there.training
    if -1 not in (ours.max_steps, theirs.max_steps):
        return ours.max_steps < theirs.max_steps
    if ours.max_steps != theirs.max_steps or "auto" in (ours.num_train_epochs, theirs.num_train_epochs):
        return False
    return float(ours.num_train_epochs) < float(theirs.num_train_epochs)


def _decided_later(config: Config) -> set[str]:
    """What a run may decide differently from what it was asked, once data and model are read; checked when it has."""
    epochs = {"training.num_train_epochs"} if config.training.num_train_epochs == "auto" else set()
    return {"data.train_on"} | epochs


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
    if found := _differences(run.config(), config, also_free):
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
