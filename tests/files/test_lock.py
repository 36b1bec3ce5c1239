"""Locks: one process at a time, and none that is left behind is in the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from qlora_tool.errors import UserError
from qlora_tool.files import lock
from qlora_tool.files.lock import locked, locked_in_turn, refuse_locked

BUSY = "run: {holder} trains into it"


def held_by(file: Path, **changes) -> None:
    """A lock's file as a process left it that is gone."""
    file.write_text(json.dumps(lock._this_process() | changes))


def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path: Path):
    file = tmp_path / "deep" / "run" / ".lock"
    with locked(file, BUSY):
        for again in (lambda: locked(file, BUSY).__enter__(), lambda: refuse_locked(file, BUSY)):
            with pytest.raises(UserError, match=rf"run: process {os.getpid()} on .*, since .* trains into it$"):
                again()
    assert list(tmp_path.iterdir()) == []  # what was made for it alone is gone again
    refuse_locked(file, BUSY)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path):
    file = tmp_path / ".lock"
    process = os.fork()
    if process == 0:
        with locked(file, BUSY):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert json.loads(file.read_text())["process"] == process
    with locked(file, BUSY):
        assert json.loads(file.read_text())["process"] == os.getpid()


def test_locks_that_are_left_behind(tmp_path: Path, monkeypatch):
    file = tmp_path / ".lock"
    held_by(file, boot="another start of this machine", process=os.getpid())
    with locked(file, BUSY):
        pass
    file.write_text("{ half a l")
    with locked(file, BUSY):
        pass
    held_by(file, host="elsewhere", boot="of another machine", process=7)
    with pytest.raises(UserError, match=rf"process 7 on elsewhere.*; if that has ended, remove {file}"):
        locked(file, BUSY).__enter__()
    file.unlink()
    monkeypatch.setattr(lock, "fcntl", None)  # a system without locks: told by the process and its start
    held_by(file, started=0.0)  # the number of a process that is gone, which another one has now
    with locked(file, BUSY):
        pass
    held_by(file, process=1, started=lock._start(1))
    with pytest.raises(UserError, match="process 1 on"), locked(file, BUSY):
        pass


def test_a_link_or_a_pipe_is_no_lock(tmp_path: Path):
    """What a link leads to is neither written over nor made."""
    precious, file = tmp_path / "precious", tmp_path / "lock"
    precious.write_text("mine")
    for target in (precious, tmp_path / "not there"):
        file.symlink_to(target)
        for hold in (locked, locked_in_turn):
            with pytest.raises(UserError, match=f"{file}: a link, where a lock is to be; remove it"), hold(file, BUSY):
                pass
        file.unlink()
    assert precious.read_text() == "mine" and not (tmp_path / "not there").exists()
    os.mkfifo(file)
    with pytest.raises(UserError, match="a pipe or a device"), locked(file, BUSY):
        pass
