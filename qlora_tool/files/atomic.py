"""Files that a reader never sees half of: written under a temporary name, flushed, renamed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_tool.errors import MachineError, UserError
from qlora_tool.sizes import file_size

_FULL, _FORBIDDEN = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS, errno.EACCES, errno.EPERM)
REFUSALS = (*_FULL, *_FORBIDDEN)
"""What `disk_errors` makes a `MachineError` of."""

_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)

_calls = itertools.count()
_OF_SYSTEM = ("/proc", "/sys")  # where nobody can make a folder
_FAILING = {getattr(errno, name) for name in ("EIO", "ENXIO", "ENODEV", "ESTALE", "ENOTCONN", "EREMOTEIO", "EFBIG",
                                              "ELOOP", "ENAMETOOLONG") if hasattr(errno, name)}  # fmt: skip


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written (full, read-only, no permission) into a `MachineError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            try:
                free = shutil.disk_usage(existing_parent(path)).free
            except OSError:
                free = 0
            raise MachineError(
                f"no space left for {path}: {file_size(free)} are free there; free some, or choose another folder"
            ) from error
        if error.errno in _FORBIDDEN:
            raise MachineError(f"cannot write {path}: {error.strerror}; choose a folder you may write to") from error
        if error.errno in _IN_THE_WAY:
            raise MachineError(f"cannot write {path}: {_in_the_way(Path(error.filename2 or error.filename or path))}, "
                               "where something else is expected; move it away, and run the same command "
                               "again") from error  # fmt: skip
        if error.errno in _FAILING:
            raise MachineError(f"cannot write {path}: {error.strerror}; the disk fails, or is no longer there; choose "
                               "another folder") from error  # fmt: skip
        raise


def _in_the_way(path: Path) -> str:
    """What lies in a place, or closest above it, in words."""
    path = path if os.path.lexists(path) else existing_parent(path)
    mode = path.lstat().st_mode
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISREG, "a file"), (stat.S_ISLNK, "a link"))
    return f"{path} is {next((name for is_it, name in kinds if is_it(mode)), 'no file')}"


def refuse_no_folder(file: Path) -> None:
    """Refuse a file that a user names to be written in a folder that is not there: a slip would make one.

    Raises:
        UserError: there is no such folder.
    """
    if not file.expanduser().absolute().parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}; make it first, or name another file")


def refuse_no_place(folder: Path, named: str) -> None:
    """Refuse a folder that cannot be made: below a file, or in a tree that the system itself makes.

    Args:
        named: what a line calls it.

    Raises:
        UserError: naming what is above it.
    """
    above = existing_parent(folder)
    if not above.is_dir():
        raise UserError(f"{named}: {folder} cannot be made: {above} is no folder; give another")
    if not folder.exists():
        for root in map(Path, _OF_SYSTEM):
            if root.is_mount() and above.stat().st_dev == root.stat().st_dev:
                raise UserError(f"{named}: {folder} cannot be made: {root} is the system's own; give another")


def existing_parent(path: Path) -> Path:
    """The closest folder above `path` that is there, or `path` itself."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some systems refuse to flush a folder; the file itself was flushed
        if not path.is_dir():
            raise error
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on failure nothing of it stays.

    Several processes may write the same file at once: the last to finish stays.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = _beside(path, "tmp")
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it becomes `path` (an earlier one is replaced only
    then), on failure nothing of it stays and an earlier `path` is as it was.

    Several processes may write the same folder at once: the last to finish stays.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary, previous = _beside(path, "tmp"), _beside(path, "previous")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that had this id before
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            sync(temporary)
            _refuse_other(path)
            _move_folder(temporary, path, previous)
            shutil.rmtree(previous, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if previous.exists() and not path.exists():
                os.replace(previous, path)
            raise


def _refuse_other(path: Path) -> None:
    """Refuse a place where something lies that is no folder. It is looked at once: another process may be moving a
    folder away."""
    try:
        other = not stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        other = path.is_symlink()  # to nothing
    if other:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _move_folder(source: Path, path: Path, previous: Path) -> None:
    """Rename `source` to `path`, and what is there to `previous`; again where another process came in between."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(path, previous)
        try:
            os.replace(source, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _beside(path: Path, ending: str) -> Path:
    """A hidden path beside `path` that is this call's alone, whatever machine others write from."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{next(_calls)}.{ending}")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:32]


def _remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine left beside `path` when they were killed."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_host()}-(\d+)-\d+\.(tmp|previous)")
    for entry in list(os.scandir(path.parent)):
        if (found := pattern.fullmatch(entry.name)) and not _is_running(int(found[1])):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: re.Pattern[str]) -> None:
    """The same for all names in a folder that a pattern matches."""
    if folder.is_dir():
        beside = re.compile(rf"\.({name.pattern})\.{_host()}-\d+-\d+\.(tmp|previous)")
        found = {match[1] for entry in list(os.scandir(folder)) if (match := beside.fullmatch(entry.name))}
        for one in sorted(found):
            _remove_leftovers(folder / one)


def _is_running(process: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(process))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 so that a reader sees the old file or the new one, never a part."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """`write_text` of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")
