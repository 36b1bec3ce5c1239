"""Whether a run starts anew or goes on, and from which checkpoint; what may not be overwritten. Nothing heavy is
imported for it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_tool.config import Config, Mark, differences, marked
from qlora_tool.errors import AlreadyFinished, UserError
from qlora_tool.files.lock import refuse_locked
from qlora_tool.run_folder import RunFolder, is_checkpoint
from qlora_tool.world import World

ALLOW = "--allow-changes to go on all the same"
# The keys that say how long a run is: a longer one may go on where a shorter one stopped, if that is asked for.
LENGTH = ("training.max_steps", "training.num_train_epochs")
PASSES = "training.gradient_accumulation_steps"
# What a run may decide by its model, its data or its processes; of the first ones only where they are `auto`.
_IF_AUTO = ("model.compute_dtype", "training.gradient_checkpointing", "training.num_train_epochs")
_DECIDED = ("data.packing", "data.train_on", PASSES)


def busy_folder(path: Path) -> str:
    """The line on a folder that another process trains into; `{holder}` in it is who."""
    return f"{path}: {{holder}} trains into it; wait for that run, or give another --output-dir"


def refuse_to_start(
    config: Config, resume: str, overwrite: bool, extend: bool = False, allow_changes: bool = False
) -> None:
    """What `checkpoint_to_resume` refuses, as far as it is known before the model is opened. Of several processes the
    first one tells it for all, later; what an adapter to start from decides is known later, too.

    Raises:
        UserError: see `checkpoint_to_resume`; or another process trains into the folder.
    """
    if World.launched().size > 1:
        return
    folder = RunFolder(Path(config.training.output_dir))
    folder.refuse_foreign()
    refuse_locked(folder.lock, busy_folder(folder.path))
    if config.adapter.init_from:  # which decides what the adapter is like
        return
    named = resume not in ("auto", "never")
    there = RunFolder(checkpoint_at(Path(resume)).absolute().parent.parent) if named else folder
    if there.holds_run():
        config = _as_decided(config, there.config())
    checkpoint_to_resume(folder, config, resume, overwrite, extend, allow_changes)


def _as_decided(config: Config, there: Config) -> Config:
    """A configuration with what the run there decided in the place of what this one will decide."""
    for key in (*_IF_AUTO, *_DECIDED):
        section, _, name = key.partition(".")
        ours, theirs = getattr(config, section), getattr(there, section)
        if key in _DECIDED or getattr(ours, name) == "auto":
            config = config.model_copy(update={section: ours.model_copy(update={name: getattr(theirs, name)})})
    return config


def checkpoint_to_resume(
    folder: RunFolder, config: Config, resume: str, overwrite: bool, extend: bool = False, allow_changes: bool = False
) -> Path | None:
    """The checkpoint to go on from, or None for a run from the start.

    Args:
        folder: the run's.
        config: of the run that is asked for, before data and model are read.
        resume: `auto` goes on with an unfinished run of the same configuration; `never` starts anew; a path is a
            checkpoint, or a run whose newest checkpoint is taken.
        overwrite: an earlier run in the folder may be replaced.
        extend: the folder's run, finished or not, goes on for longer than it was to.
        allow_changes: keys that change its numbers may have other values.

    Raises:
        UserError: the folder holds another run, or a finished one, or what no run wrote; or there is no such
            checkpoint.
    """
    folder.refuse_foreign()
    if resume not in ("auto", "never"):
        checkpoint = checkpoint_at(Path(resume))
        if folder.holds_run() and not folder.holds(checkpoint) and not overwrite:
            raise UserError(
                f"{folder.path}: holds a run, and not the one of --resume {resume}; give another --output-dir, or "
                "--overwrite to replace it"
            )
        if not allow_changes:
            refuse_differences(checkpoint, config, {*LENGTH, *_decided_later(config)})
        return checkpoint
    if extend and not folder.holds_run():
        raise UserError(f"--extend: {folder.path} holds no run to go on with; leave it out, or give its --output-dir")
    if not folder.holds_run() or overwrite:
        return None
    if resume == "never":
        raise UserError(f"{folder.path}: holds a run; give --overwrite to replace it, or another --output-dir")
    refuse_another_length(folder, config, extend, _decided_later(config))
    found = _differences(folder.config(), config, {*LENGTH, *_decided_later(config)})
    if found and not allow_changes:
        raise UserError(
            f"{folder.path}: holds another run ({', '.join(found[:3])}); give another --output-dir, --overwrite to "
            f"replace it, or {ALLOW}"
        )
    checkpoints = folder.checkpoint_folders()
    if not folder.is_finished():
        return checkpoints[-1] if checkpoints else None
    if not extend:
        raise AlreadyFinished(
            f"{folder.path}: holds this run, finished; give --overwrite to run it again, another --output-dir, or "
            "--extend with more training.max_steps or training.num_train_epochs to train it for longer"
        )
    if not checkpoints:
        raise UserError(
            f"--extend: {folder.path} holds no checkpoint to go on from; set adapter.init_from: {folder.adapter} to "
            "start from its adapter with a new optimizer, and give another --output-dir"
        )
    return checkpoints[-1]


def refuse_another_length(folder: RunFolder, config: Config, extend: bool, also_free: Collection[str] = ()) -> None:
    """Refuse a run that is to be shorter than the one in the folder, or longer without being asked for."""
    there = folder.config()
    free = {key for key in differences(there, config) if key not in LENGTH} | {*also_free}
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
    if is_checkpoint(path):
        return path
    found = RunFolder(path).checkpoint_folders()
    if not found:
        raise UserError(f"--resume {path}: no checkpoint; expected a folder such as runs/NAME/checkpoints/step-000100")
    return found[-1]


def refuse_differences(checkpoint: Path, config: Config, also_free: Collection[str] = ()) -> None:
    """Refuse a checkpoint whose run was configured differently.

    Raises:
        UserError: naming the keys.
    """
    run = RunFolder(checkpoint.absolute().parent.parent)
    if not run.holds_run():  # a checkpoint by itself: what does not fit is found when it is loaded
        return
    if found := _differences(run.config(), config, also_free):
        raise UserError(
            f"{checkpoint}: its run was configured differently ({', '.join(found[:3])}); resume with "
            f"{run.config_file}, or {ALLOW}"
        )


def _differences(left: Config, right: Config, also_free: Collection[str] = ()) -> list[str]:
    """Keys whose values tell two runs apart, each as `key: theirs, not ours`."""
    return [
        f"{key}: {short(there)} there, {short(here)} here"
        for key, (there, here) in differences(left, right).items()
        if key not in marked(Mark.FREE_ON_RESUME) and key not in also_free and key != "model.device"
    ]


def short(value: Any) -> str:
    """A value as JSON, for a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}..."
