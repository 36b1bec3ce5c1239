"""The folder in which an export grows beside its output: hidden until it is whole, and found again after a kill.

.NAME.partial/of-qlora-tool   says whose folder it is: one without it is not touched
.NAME.partial/plan.json   what is exported from what, and how far it has come
.NAME.partial/lock        held by the process at work
.NAME.partial/model/      finished files; it becomes NAME
.NAME.partial/*           the file that is growing
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qlora_tool.errors import UserError
from qlora_tool.files.atomic import disk_errors, sync
from qlora_tool.files.digest import sha256
from qlora_tool.files.lock import locked
from qlora_tool.files.reading import is_inside, is_regular, json_value
from qlora_tool.files.sealed import first_change, read_sealed, write_sealed
from qlora_tool.once import log_once

logger = logging.getLogger(__name__)

SAVE_EVERY = 256 << 20  # bytes of a growing file between two flushes: what a kill costs at most
REPORT = "export.json"  # in a finished export
_PLAN, _LOCK, _FOLDER, _MARK = "plan.json", "lock", "model", "of-qlora-tool"
_MARKED = "An export that is under way, or was interrupted: the same command goes on from here.\n"


def staging_root(output: Path) -> Path:
    """Where the export to `output` grows."""
    return output.with_name(f".{output.name}.partial")


def written_so_far(output: Path, inputs: Mapping[str, Any]) -> int:
    """The bytes that an earlier export to `output`, with the same inputs, left to go on from."""
    plan = _read_plan(staging_root(output) / _PLAN)
    if plan is None or plan["inputs"] != _as_json(inputs):
        return 0
    return sum(file["bytes"] for file in (*plan["done"].values(), plan["growing"] or {"bytes": 0}))


@contextlib.contextmanager
def staged_folder(output: Path, inputs: Mapping[str, Any]) -> Iterator[Staging]:
    """Yield the staging of the export to `output`, taken up where an earlier one with the same inputs stopped. On
    success it becomes `output`. On failure it stays for the next run, unless the input is at fault.

    Args:
        output: resolved.
        inputs: all that the finished files depend on, as JSON; other inputs start anew, and a line says so.

    Raises:
        UserError: another process exports to the same place, or a link, or what no export wrote, is where it is to
            grow.
        MachineError: the disk refuses.
    """
    root = staging_root(output)
    for path in (root, root / _FOLDER, _previous(output)):
        if path.is_symlink():  # what it leads to would be emptied
            raise UserError(f"{path}: a link, where an export is to grow; remove it")
    _refuse_others(root, _previous(output))
    busy = f"{output}: {{holder}} is exporting to it; wait for that export, or give another --output-dir"
    with disk_errors(output), locked(root / _LOCK, busy):
        (root / _MARK).write_text(_MARKED, encoding="utf-8")
        staging = Staging(root, inputs)
        try:
            yield staging
            staging.publish(output)
        except BaseException as error:
            if isinstance(error, UserError) and not staging.keep:
                _remove(root)
            else:
                logger.warning("%s keeps what was written; the same command goes on from there", root)
            raise


class Staging:
    """An export under way.

    Attributes:
        folder: for the finished files. What lies in it at the start are those files alone that `done` named.
        keep: whether a fault of the input leaves it all for the next run, as when only the proof is missing.
    """

    def __init__(self, root: Path, inputs: Mapping[str, Any]):
        self.root, self.folder, self.keep = root, root / _FOLDER, False
        inputs = _as_json(inputs)
        found = _read_plan(root / _PLAN)
        if found is not None and found["inputs"] != inputs:
            changed = ", ".join(key for key in inputs if found["inputs"].get(key) != inputs[key])
            logger.warning("%s: holds the start of another export (%s differs); starting anew", root, changed)
            found = None
        self._plan = found or {"inputs": inputs, "notes": {}, "done": {}, "growing": None}
        self._restore()

    @property
    def notes(self) -> dict[str, Any]:
        """What was decided on the way and has to stay decided when the export goes on."""
        return dict(self._plan["notes"])

    def note(self, **values: Any) -> None:
        self._plan["notes"] |= values
        self._save()

    def start_anew(self) -> None:
        """Drop all that was written, and keep the notes."""
        self._plan |= {"done": {}, "growing": None}
        self._save()
        self._restore()

    def done(self, name: str) -> bool:
        """Whether the finished file `name` is there."""
        return name in self._plan["done"]

    @contextlib.contextmanager
    def grow(self, name: str) -> Iterator[GrowingFile]:
        """Yield the file `name` to write, at the place where an earlier run left it; finished when the block ends."""
        growing = self._plan["growing"]
        start = growing["bytes"] if growing and growing["name"] == name else 0
        path = self.root / name
        digest = self._digest if start else hashlib.sha256()
        with path.open("r+b" if start else "wb") as stream:
            stream.truncate(start)
            stream.seek(start)
            file = GrowingFile(stream, start, digest, lambda size: self._grown(name, size, digest))
            yield file
            file.save()
        self._finish(name, digest.hexdigest())

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """Yield a path for a file that is written in one go: finished when the block ends, begun anew after a kill."""
        path = self.root / name
        path.unlink(missing_ok=True)
        yield path
        sync(path)
        self._finish(name, sha256(path))

    def _grown(self, name: str, size: int, digest: Any) -> None:
        self._plan["growing"] = {"name": name, "bytes": size, "sha256": digest.hexdigest()}
        self._save()

    def _finish(self, name: str, digest: str) -> None:
        # First in the plan, then in the folder: a kill in between loses nothing, as `_restore` moves it then.
        path = self.root / name
        self._plan["done"][name] = {"bytes": path.stat().st_size, "sha256": digest}
        self._plan["growing"] = None
        self._save()
        os.replace(path, self.folder / name)

    def _save(self) -> None:
        write_sealed(self.root / _PLAN, self._plan)

    def _restore(self) -> None:
        """Bring the files in line with the plan, whatever moment the last run was killed at."""
        self.folder.mkdir(exist_ok=True)
        done, growing = self._plan["done"], self._plan["growing"]
        for name in list(done):
            if (self.root / name).exists():
                os.replace(self.root / name, self.folder / name)
            if changed := first_change(self.folder, {name: done[name]}):
                logger.warning("%s: %s; it is made again", self.folder, changed)
                del done[name]
        known = {_PLAN, _LOCK, _FOLDER, _MARK}
        if growing:
            path = self.root / growing["name"]
            self._digest = _digest_of_first(path, growing["bytes"])
            if not path.is_symlink() and self._digest.hexdigest() == growing["sha256"]:
                known.add(growing["name"])
            else:
                logger.warning("%s: %s is not as it was written so far; it is begun again", self.root, growing["name"])
                self._plan["growing"] = None
        _remove_others(self.root, known)
        _remove_others(self.folder, done)
        self._save()

    def publish(self, output: Path) -> None:
        """Flush the folder and give it its name; an earlier `output` is replaced only now."""
        for file in self.folder.rglob("*"):
            if file.is_file():
                sync(file)
        sync(self.folder)
        previous = _previous(output)
        if output.exists():
            _clear_away(previous, output)  # of an export that was killed right here
            os.replace(output, previous)
        try:
            os.replace(self.folder, output)
        except OSError:
            if previous.exists():
                os.replace(previous, output)
            raise
        sync(output.parent)
        _clear_away(previous, output)
        _remove(self.root)


class GrowingFile:
    """A file that is written piece by piece; every `SAVE_EVERY` bytes it is flushed and its size noted, which also
    keeps the system from gathering gigabytes that are not on the disk yet.

    Attributes:
        size: bytes written so far, those of earlier runs included.
    """

    def __init__(self, stream: IO[bytes], size: int, digest: Any, note: Any):
        self._stream, self.size, self._saved, self._digest, self._note = stream, size, size, digest, note

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)
        if self.size - self._saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._saved = self.size
        self._note(self.size)


def written_by_export(folder: Path) -> list[str] | None:
    """The files that the export wrote that made a folder, by their paths in it; None where none says so."""
    if not is_regular(folder / REPORT):
        return None
    try:
        names = json_value((folder / REPORT).read_text(encoding="utf-8"))["written"]
        return [str(name) for name in names]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _refuse_others(root: Path, previous: Path) -> None:
    """Refuse to export where a folder that is going to be emptied, or removed, is one that no export wrote.

    Raises:
        UserError: naming it.
    """
    if _holds_something(root, {_LOCK}) and not is_regular(root / _MARK) and not _is_plan(root / _PLAN):
        raise UserError(f"{root}: no export wrote it, and one is to grow there; move it away, or give another "
                        "--output-dir")  # fmt: skip
    if _holds_something(previous) and written_by_export(previous) is None:
        raise UserError(f"{previous}: no export wrote it, and what is replaced is to go there; move it away, or give "
                        "another --output-dir")  # fmt: skip


def _holds_something(folder: Path, beside: Collection[str] = ()) -> bool:
    """Whether a folder holds more than some names, or is something else."""
    if folder.is_dir():
        return any(path.name not in beside for path in folder.iterdir())
    return os.path.lexists(folder)


def _remove(root: Path) -> None:
    """Remove a folder in which an export grew, last what tells whose it is."""
    with contextlib.suppress(OSError):
        _remove_others(root, {_MARK, _LOCK})
    shutil.rmtree(root, ignore_errors=True)


def _is_plan(file: Path) -> bool:
    """Whether an export wrote it: those of early versions wrote no mark."""
    try:
        return {"inputs", "done"} <= read_sealed(file).keys()
    except (OSError, ValueError):
        return False


def _previous(output: Path) -> Path:
    """Where what lies in `output` is until the new one is there."""
    return output.with_name(f".{output.name}.previous")


def _clear_away(previous: Path, output: Path) -> None:
    """Remove the export that another one has replaced, but nothing that a link in it leads to, and bring what else lay
    in its folder into the new one."""
    names = written_by_export(previous)
    if names is None:  # of an earlier version, which did not say what it wrote
        shutil.rmtree(previous, ignore_errors=True)
        return
    for name in (*(name for name in names if name != REPORT), REPORT):  # last what tells whose folder it is
        path = previous / name
        if is_inside(name) and path.parent.resolve().is_relative_to(previous.resolve()):
            with contextlib.suppress(IsADirectoryError, PermissionError, NotADirectoryError):  # no export wrote that
                path.unlink(missing_ok=True)
    for folder in sorted((path for path in previous.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()
    for path in previous.iterdir():
        if not (output / path.name).exists():
            os.replace(path, output / path.name)
    try:
        previous.rmdir()
    except OSError:
        logger.warning("%s keeps what no export wrote and has a namesake in the new one; move it where you want it",
                       previous)  # fmt: skip


def _as_json(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file: tuples are lists."""
    return json_value(json.dumps(inputs))


def _read_plan(file: Path) -> dict[str, Any] | None:
    """What an export wrote down; None where it wrote nothing, or where that has changed since."""
    if not file.exists():
        return None
    try:
        plan = read_sealed(file)
        known = (*plan["done"].values(), *([plan["growing"]] if plan["growing"] else []))
        if {"inputs", "notes"} <= plan.keys() and all({"bytes", "sha256"} <= one.keys() for one in known):
            return plan
        reason = "it is of another version"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
    log_once(logger, logging.WARNING, f"{file}: cannot be gone on from ({reason}); starting anew")
    return None


def _digest_of_first(file: Path, size: int) -> Any:
    """Of the first bytes of a file; of fewer, where it has no more."""
    digest = hashlib.sha256()
    if file.is_file():
        with file.open("rb") as stream:
            while size and (block := stream.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
    return digest


def _remove_others(folder: Path, known: Any) -> None:
    for path in folder.iterdir():
        if path.name not in known:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
