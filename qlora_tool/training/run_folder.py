"""What a run leaves behind, and what may be done to a folder that holds one already."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.config import Config, config_to_yaml, load_config
from qlora_tool.errors import UserError
from qlora_tool.files import disk_errors, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

# What may differ between a run and its resumption without making it another run.
_FREE_KEYS = {"training": {"output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to", "max_memory"}}


@dataclass(frozen=True)
class RunFolder:
    """The layout of a run's folder."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def holds_run(self) -> bool:
        return self.config_file.exists()

    def config(self) -> Config:
        return load_config(str(self.config_file))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_folders(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.checkpoints.glob("step-*") if (path / "state.json").exists())

    def is_finished(self) -> bool:
        return (self.adapter / "adapter_config.json").exists()

    def write_config(self, config: Config) -> None:
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, config_to_yaml(config))

    def clear(self) -> None:
        """Remove an earlier run's files, and nothing else that lies in the folder."""
        shutil.rmtree(self.adapter, ignore_errors=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for name in ("config.yaml", "metrics.jsonl", "memory.json"):
            (self.path / name).unlink(missing_ok=True)

    def keep_metrics_until(self, step: int) -> None:
        """Drop the logged steps after `step`, which a resumed run logs again."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_text(self.metrics_file, "".join(f"{line}\n" for line in kept))


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
    if run.holds_run() and (differences := _differences(run.config(), config, also_free={"max_steps", "num_train_epochs"})):
        raise UserError(
            f"--resume {path}: that run was configured otherwise ({', '.join(differences[:3])}); resume with its "
            f"{run.config_file}"
        )
    return checkpoint


def _differences(left: Config, right: Config, also_free: Sequence[str] | set[str] = ()) -> list[str]:
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
