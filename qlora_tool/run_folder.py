"""What a run leaves behind: the layout of its folder."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tool.config import Config, config_to_yaml, load_config
from qlora_tool.errors import UserError
from qlora_tool.files.atomic import disk_errors, refuse_no_place, remove_leftovers, write_text
from qlora_tool.files.reading import is_regular, json_value, refuse_other_than_file
from qlora_tool.sizes import noun_of

logger = logging.getLogger(__name__)

STATE, MANIFEST, PROVENANCE = "state.json", "manifest.json", "qlora_tool.json"
ROWS, STEP_MEMORY, EXPORTS = NOTES = "rows.json", "step_memory.json", "exports.json"
"""What the report's folder holds: rows as they are trained, the memory over one step, the exports of the adapter."""
_CHECKPOINT = re.compile(r"step-\d{6,}")
_REPLACED, _SET_ASIDE = "replaced", "set-aside"


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

    def records(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, in order; what is none is left out."""
        found = []
        if is_regular(self.metrics_file):
            for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # half a line, which a power failure leaves
                    found.append(json_value(line))
        return [record for record in found if isinstance(record, dict)]

    def last_record(self) -> dict[str, Any]:
        """The last that is of a step, not of answers: a run logs its last step, and evaluates after it. Empty where
        there is none."""
        return next((record for record in reversed(self.records()) if "samples" not in record), {})

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def notes(self) -> Path:
        """The folder of what that page is made of besides; see `NOTES`."""
        return self.path / "report"

    def holds_run(self) -> bool:
        return self.config_file.exists()

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run's."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def config(self) -> Config:
        return load_config(str(self.config_file))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_folders(self) -> list[Path]:
        """Finished checkpoints, oldest first; whether they are whole is another matter."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if _CHECKPOINT.fullmatch(path.name)]
        return sorted((path for path in found if is_checkpoint(path)), key=_order)

    def is_finished(self) -> bool:
        return (self.adapter / "adapter_config.json").exists()

    def has_ended(self) -> bool:
        """Whether a finished run has done what comes after its adapter, too: the page about it is there, and no run
        that it replaces is left."""
        return self.is_finished() and self.report.exists() and not self.replaced()

    def write_config(self, config: Config) -> None:
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, config_to_yaml(config))

    @property
    def lock(self) -> Path:
        """Held by the process that trains into the folder."""
        return self.path / ".lock"

    def refuse_foreign(self) -> None:
        """Refuse a folder in which a run would replace what no run wrote, or could not write.

        Raises:
            UserError: naming it.
        """
        cure = "give another --output-dir, or move it away"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"training.output_dir: {self.path} is a file; expected a folder")
        if self.path.is_symlink() and not self.path.exists():
            raise UserError(f"training.output_dir: {self.path} is a link to a folder that is not there; {cure}")
        refuse_no_place(self.path, "training.output_dir")
        for path, is_folder in self._own():
            if path.is_symlink():
                raise UserError(f"{path}: a link, which a run would replace; expected a "
                                f"{'folder' if is_folder else 'file'}, or nothing; {cure}")  # fmt: skip
            if path.exists() and path.is_dir() != is_folder:
                found, wanted = ("a file", "a folder") if is_folder else ("a folder", "a file")
                raise UserError(f"{path}: {found}, where a run has {wanted}; {cure}")
            if path.exists() and not is_folder:
                refuse_other_than_file(path, cure)
        there = [path for path, _ in self._own() if path.exists() and path != self.config_file]
        if there and not self.holds_run():
            raise UserError(f"{there[0]}: no run wrote it, as no config.yaml lies beside it, and a run would replace "
                            f"it; {cure}")  # fmt: skip
        if self.holds_run() and not there and not _is_written_here(self.config_file):
            raise UserError(f"{self.config_file}: no run wrote it, and a run would replace it; {cure}")
        if self.adapter.is_dir() and not (self.adapter / PROVENANCE).exists() and any(self.adapter.iterdir()):
            raise UserError(f"{self.adapter}: no run wrote it, as it has no {PROVENANCE}, and a run would replace it; "
                            f"{cure}")  # fmt: skip

    def _own(self) -> list[tuple[Path, bool]]:
        """What a run writes, and whether it is a folder; its configuration last."""
        files = (self.metrics_file, self.path / "memory.json", self.report, self.config_file)
        return [(self.adapter, True), (self.checkpoints, True), (self.notes, True), *((path, False) for path in files)]

    def put_aside(self) -> Path:
        """Move the run that another one is to replace into a folder of its own: its files, and nothing else.

        Returns:
            Where it lies until the run that replaces it is done; see `remove_replaced`.
        """
        aside = self._free_name(_REPLACED)
        with disk_errors(aside):
            aside.mkdir()
            for path, _ in self._own():  # the configuration last: until then it is that run's folder
                if path.exists():
                    os.replace(path, aside / path.name)
        return aside

    def replaced(self) -> list[Path]:
        """Runs that this one replaces and that are still there."""
        if not self.path.is_dir():
            return []
        named = re.compile(rf"{_REPLACED}-\d+")
        found = (path for path in self.path.iterdir() if named.fullmatch(path.name))
        return sorted(path for path in found if path.is_dir() and not path.is_symlink())

    def remove_replaced(self, aside: Path | None = None) -> list[Path]:
        """Remove what the runs wrote that this one replaces, but nothing that a link leads to.

        Args:
            aside: the one that is removed; None: all.

        Returns:
            What is left of all, as no run wrote it.
        """
        for folder in map(RunFolder, self.replaced() if aside is None else [aside]):
            if not folder.checkpoints.is_symlink():
                for checkpoint in folder.checkpoint_folders():
                    remove_own(checkpoint)
                remove_leftovers(folder.checkpoints, _CHECKPOINT)
            if folder.adapter.is_dir():
                remove_listed(folder.adapter, MANIFEST)
            if folder.config_file.is_file() and _is_written_here(folder.config_file):
                folder.config_file.unlink()
            notes = [] if folder.notes.is_symlink() else [folder.notes / name for name in NOTES]
            for path in (folder.metrics_file, folder.path / "memory.json", folder.report, *notes):
                with contextlib.suppress(IsADirectoryError, PermissionError):  # a folder: no run wrote it
                    path.unlink(missing_ok=True)
                remove_leftovers(path.parent, re.compile(re.escape(path.name)))
            for path in (folder.checkpoints, folder.notes, folder.path):
                with contextlib.suppress(OSError):
                    path.rmdir()
        return self.replaced()

    def rewind(self, step: int) -> Path | None:
        """Go back to `step`: move what was saved after it aside, and drop what was logged, which a resumed run logs
        again.

        Returns:
            Where the later checkpoints and the adapter lie; None where there were none.
        """
        later = [path for path in self.checkpoints.glob("step-*")
                 if _CHECKPOINT.fullmatch(path.name) and _order(path) > _order(self.checkpoint(step))]  # fmt: skip
        if self.adapter.exists():
            later.append(self.adapter)
        aside = self._free_name(_SET_ASIDE) if later else None
        if aside is not None:
            with disk_errors(aside):
                aside.mkdir()
                for path in later:
                    os.replace(path, aside / path.name)
        remove_leftovers(self.checkpoints, _CHECKPOINT)
        self._rewind_metrics(step)
        return aside

    def _rewind_metrics(self, step: int) -> None:
        lines = []
        if is_regular(self.metrics_file):
            lines = self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines()
        steps = [_logged_step(line) for line in lines]
        kept = [line for line, logged in zip(lines, steps, strict=True) if logged is not None and logged <= step]
        if broken := steps.count(None) - (bool(steps) and steps[-1] is None):  # half a line is what a power cut leaves
            what = noun_of(broken, "line of it is no record of a step; it is left out",
                           "lines of it are no records of a step; they are left out")  # fmt: skip
            logger.warning("%s: %d %s", self.metrics_file, broken, what)
        if not kept and self.holds_run() and step >= self.config().training.logging_steps:
            done = noun_of(step, "step that was done; it begins after that",
                           f"{step} steps that were done; it begins after them")  # fmt: skip
            logger.warning("%s: has no records of the %s", self.metrics_file, done)  # fmt: skip
        if lines:
            write_text(self.metrics_file, "".join(f"{line}\n" for line in kept))

    def _free_name(self, stem: str) -> Path:
        """The first of `stem-1`, `stem-2`, … that is not taken."""
        numbers = (self.path / f"{stem}-{number}" for number in itertools.count(1))
        return next(path for path in numbers if not path.exists() and not path.is_symlink())


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like a checkpoint, whole or not. What a link leads to lies elsewhere, and is no run's."""
    return not path.is_symlink() and path.is_dir() and any((path / name).exists() for name in (STATE, MANIFEST))


def remove_own(checkpoint: Path) -> None:
    """Remove a checkpoint: the files that its manifest lists, or that version 0.1 wrote; what else lies there stays."""
    if checkpoint.is_symlink():
        return
    if (checkpoint / MANIFEST).exists():
        remove_listed(checkpoint, MANIFEST)
        return
    for name in (STATE, "optimizer.pt", "adapter.safetensors"):
        (checkpoint / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        checkpoint.rmdir()


def remove_listed(folder: Path, listing: str) -> None:
    """Remove the files that a file of the folder lists under `files`, and that file; then the folder, where nothing
    else is in it. Of a list that is broken or not there nothing is removed, nor of what a link leads to."""
    if folder.is_symlink() or not is_regular(folder / listing):
        return
    try:
        names = [*json_value((folder / listing).read_text(encoding="utf-8"))["files"], listing]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in names:
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_written_here(config_file: Path) -> bool:
    """Whether a configuration is as a run writes it, to the byte: nobody writes one like that by hand."""
    try:
        text = config_file.read_text(encoding="utf-8")
        return text == config_to_yaml(load_config(str(config_file)))
    except (OSError, ValueError, UserError):
        return False


def _order(checkpoint: Path) -> tuple[int, str]:
    """By step: names grow a digit at a million."""
    return len(checkpoint.name), checkpoint.name


def _logged_step(line: str) -> int | None:
    """The step of a line of `metrics.jsonl`; None where it is no record."""
    try:
        step = json_value(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
