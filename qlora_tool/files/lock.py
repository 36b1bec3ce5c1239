"""Locks on folders: one process at a time, whatever becomes of it.

The kernel's lock on the file goes away with its process, however that ends. What the file says of its holder (host,
boot of the kernel, process, its start) is for where that does not reach: the lock of another machine on a shared disk,
and file systems without locks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qlora_tool.errors import UserError
from qlora_tool.files.atomic import disk_errors
from qlora_tool.files.reading import json_value

logger = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows: told by the process and its start alone
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold a lock. Folders that it needs are made, and go again where nothing else came into them.

    Args:
        file: of the lock.
        busy: the line where another process holds it; `{holder}` in it is who.

    Raises:
        UserError: another process holds it.
        MachineError: the folder cannot be written.
    """
    made = _missing_folders(file.parent)
    with disk_errors(file):
        stream = _held(file, busy)
    try:
        with stream:
            try:
                yield
            finally:
                _release(stream, file)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def locked_in_turn(file: Path, waiting: str) -> Iterator[None]:
    """Hold a lock, after whoever holds it now. Where there can be none, nothing is held.

    Args:
        file: of the lock.
        waiting: the line that is logged where another process holds it.
    """
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                while True:
                    stream = held.enter_context(_opened(file))
                    try:
                        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        logger.info(waiting)
                        fcntl.flock(stream, fcntl.LOCK_EX)
                    if _is_still(stream, file):
                        held.callback(_release, stream, file)
                        break
            except OSError as error:
                logger.debug("%s: no lock: %s", file, error)
        yield


def refuse_locked(file: Path, busy: str) -> None:
    """The same refusal, with nothing written.

    Raises:
        UserError: another process holds the lock.
    """
    with contextlib.suppress(OSError), _opened(file, make=False) as stream:
        _refuse_held(stream, file, busy)


def _missing_folders(folder: Path) -> list[Path]:
    """Folders that are not there yet, the innermost first."""
    found = []
    while not folder.exists():
        found.append(folder)
        folder = folder.parent
    return found


def _held(file: Path, busy: str) -> IO[str]:
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = _opened(file)
        except FileNotFoundError:  # another process finished and removed the folder just now
            continue
        try:
            _refuse_held(stream, file, busy)
            if not _is_still(stream, file):  # the lock of one that has finished meanwhile
                stream.close()
                continue
            stream.seek(0)
            stream.truncate()
            stream.write(json.dumps(_this_process()) + "\n")
            stream.flush()
            return stream
        except BaseException:
            stream.close()
            raise


def _opened(file: Path, make: bool = True) -> IO[str]:
    """The file of a lock, made where there is none.

    Raises:
        UserError: a link, a pipe or a device is in its place.
    """
    try:
        number = os.open(file, os.O_RDWR | os.O_CREAT * make | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{file}: a link, where a lock is to be; remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UserError(f"{file}: a pipe or a device, where a lock is to be; remove it")
    return os.fdopen(number, "r+", encoding="utf-8")


def _refuse_held(stream: IO[str], file: Path, busy: str) -> None:
    """Take the kernel's lock, or tell who has it."""
    kernel = True
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(busy.format(holder=_in_words(_holder(stream)))) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        kernel = False
    holder, here = _holder(stream), _this_process()
    if not holder or holder == here:
        return
    if holder.get("boot") == here["boot"] and kernel and fcntl is not None:
        return  # of this machine: its process has ended, as the lock was to be had
    if holder.get("host") == here["host"]:
        if holder.get("boot") == here["boot"] and _runs(holder):
            raise UserError(busy.format(holder=_in_words(holder)))
        return
    raise UserError(f"{busy.format(holder=_in_words(holder))}; if that has ended, remove {file}")


def _release(stream: IO[str], file: Path) -> None:
    with contextlib.suppress(OSError):
        if _is_still(stream, file):
            file.unlink()


def _is_still(stream: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _holder(stream: IO[str]) -> dict[str, Any]:
    try:
        stream.seek(0)
        found = json_value(stream.read(4096))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _in_words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    since = holder.get("since")
    when = f", since {since}" if isinstance(since, str) else ""
    return f"process {holder.get('process')} on {holder.get('host')}{when}"


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "process": os.getpid(), "started": _start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M", time.localtime(_start(os.getpid())))}  # fmt: skip


def _boot() -> str:
    """Which start of which kernel this is: containers of one machine share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import psutil

        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _start(process: int) -> float:
    import psutil

    try:
        return round(float(psutil.Process(process).create_time()), 2)
    except psutil.Error:
        return 0.0


def _runs(holder: dict[str, Any]) -> bool:
    number, started = holder.get("process"), holder.get("started")
    if not isinstance(number, int) or not isinstance(started, (int, float)):
        return False
    return abs(_start(number) - started) < 1.0
