"""Whether a run starts anew or goes on, and from which checkpoint; what may not be overwritten."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qlora_tool.config import Config, Mark, differences, marked
from qlora_tool.errors import AlreadyFinished, UserError
from qlora_tool.run_folder import RunFolder, is_checkpoint
from qlora_tool.training.belonging import changes, other_machine, other_version
from qlora_tool.training.checkpoints import Checkpoint

logger = logging.getLogger(__name__)

ALLOW = "--allow-changes to go on all the same"
# The keys that say how long a run is: a longer one may go on where a shorter one stopped, if that is asked for.
_LENGTH = ("training.max_steps", "training.num_train_epochs")
# Compared by what is in them, and by what all processes together make of it.
_PLACES = ("model.name_or_path", "model.revision", "data.train", "data.eval", "data.chat_template", "model.device")
_PASSES = "training.gradient_accumulation_steps"


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
            _refuse_differences(checkpoint, config, {*_LENGTH, *_decided_later(config)})
        return checkpoint
    if extend and not folder.holds_run():
        raise UserError(f"--extend: {folder.path} holds no run to go on with; leave it out, or give its --output-dir")
    if not folder.holds_run() or overwrite:
        return None
    if resume == "never":
        raise UserError(f"{folder.path}: holds a run; give --overwrite to replace it, or another --output-dir")
    _refuse_another_length(folder, config, extend, _decided_later(config))
    found = _differences(folder.config(), config, {*_LENGTH, *_decided_later(config)})
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
        _refuse_differences(checkpoint, config, _LENGTH)
    if resume == "auto":
        _refuse_another_length(folder, config, extend)


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
    free = marked(Mark.FREE_ON_RESUME) | {*_LENGTH, *_PLACES, _PASSES}
    return [
        f"{section}.{key}: {_short(value)} there, {_short(here.get(section, {}).get(key))} here"
        for section, values in there.items() for key, value in values.items()
        if f"{section}.{key}" not in free and value != here.get(section, {}).get(key)
    ]  # fmt: skip


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
    if is_checkpoint(path):
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
            f"{run.config_file}, or {ALLOW}"
        )


def _differences(left: Config, right: Config, also_free: Collection[str] = ()) -> list[str]:
    """Keys whose values tell two runs apart, each as `key: theirs, not ours`."""
    return [
        f"{key}: {_short(there)} there, {_short(here)} here"
        for key, (there, here) in differences(left, right).items()
        if key not in marked(Mark.FREE_ON_RESUME) and key not in also_free and key != "model.device"
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}..."
