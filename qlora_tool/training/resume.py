"""Whether a run starts anew or goes on, and from which checkpoint; what may not be overwritten."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_tool.config import Config
from qlora_tool.errors import UserError
from qlora_tool.run_folder import RunFolder

# What may differ between a run and its resumption without making it another run.
_FREE_KEYS = {"training": {"output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to", "max_memory"}}


def checkpoint_to_resume(folder: RunFolder, config: Config, resume: str, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, or None for a run from the start.

    Args:
        folder: the run's.
        config: of the run that is asked for, resolved.
        resume: `auto` goes on with an unfinished run of the same configuration; `never` starts anew; a path is a
            checkpoint, or a run whose newest checkpoint is taken.
        overwrite: an earlier run in the folder may be replaced.

    Raises:
        UserError: the folder holds another run, or a finished one; or there is no such checkpoint.
    """
    if resume not in ("auto", "never"):
        return _checkpoint_at(Path(resume), config)
    if not folder.holds_run() or overwrite:
        return None
    if resume == "never":
        raise UserError(
            f"{folder.path}: holds a run; give --overwrite to replace it, or another --output-dir"
        )
    if differences := _differences(folder.config(), config):
        raise UserError(
            f"{folder.path}: holds another run ({', '.join(differences[:3])}); give another --output-dir, or --overwrite "
            "to replace it"
        )
    if folder.is_finished():
        raise UserError(
            f"{folder.path}: holds this run, finished; give --overwrite to run it again, or another --output-dir"
        )
    found = folder.checkpoint_folders()
    return found[-1] if found else None


def _checkpoint_at(path: Path, config: Config) -> Path:
    if (path / "state.json").exists():
        checkpoint = path
    else:
        found = RunFolder(path).checkpoint_folders()
        if not found:
            raise UserError(
                f"--resume {path}: no checkpoint; expected a folder such as runs/NAME/checkpoints/step-000100"
            )
        checkpoint = found[-1]
    run = RunFolder(checkpoint.parent.parent)
    differences = _differences(run.config(), config, {"max_steps", "num_train_epochs"}) if run.holds_run() else []
    if differences:
        raise UserError(
            f"--resume {path}: that run was configured otherwise ({', '.join(differences[:3])}); resume with its "
            f"{run.config_file}"
        )
    return checkpoint


def _differences(left: Config, right: Config, also_free: Collection[str] = ()) -> list[str]:
    """Keys whose values tell two runs apart, each as `key: theirs, not ours`."""
    one, other = left.model_dump(), right.model_dump()
    return [
        f"{section}.{key}: {_short(value)} there, {_short(other[section][key])} here"
        for section, values in one.items()
        for key, value in values.items()
        if other[section][key] != value and key not in _FREE_KEYS.get(section, ()) and key not in also_free
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}..."
