"""What another process makes meanwhile, or this one where it cannot."""

from __future__ import annotations

import os
import threading
import time

import pytest

from qlora_tool.errors import UserError
from qlora_tool.memory.plan.meanwhile import Meanwhile, helped_by
from qlora_tool.workers import Workers

CALL = "qlora_tool.memory.plan.meanwhile:call"


@pytest.fixture
def found_here(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


def process_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def refused(process: int) -> None:
    raise UserError("too small" if os.getpid() == process else "said by another process")


def ends(process: int) -> int:
    if os.getpid() != process:
        os._exit(7)
    return process


def test_it_is_begun_at_once_by_another_process(found_here):
    with Workers(CALL, 1, "predicts") as workers, helped_by(workers):
        begun, later = Meanwhile(process_after, 0.2), Meanwhile(process_after, 0.0)
        deadline = time.monotonic() + 60
        while not begun._future.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert later.result() == os.getpid()  # which nobody had begun
        assert begun.result() != os.getpid()


def test_without_others_it_is_made_once_it_is_asked_for():
    made = []
    begun = Meanwhile(made.append, 1)
    assert made == []
    begun.result()
    assert made == [1]
    with helped_by(None), Workers(CALL, 0, "predicts") as none, helped_by(none):
        assert Meanwhile(process_after, 0.0).result() == os.getpid()


@pytest.mark.parametrize("work", [lambda: 7, threading.Lock], ids=["cannot be sent", "cannot be sent back"])
def test_what_cannot_be_sent_is_made_here(work):
    with Workers(CALL, 1, "predicts") as workers, helped_by(workers):
        made = Meanwhile(work).result()
        assert made == 7 or made.acquire()


def test_errors_are_those_of_this_process(found_here):
    with Workers(CALL, 1, "predicts") as workers, helped_by(workers):
        begun = Meanwhile(refused, os.getpid())
        time.sleep(0.5)
        with pytest.raises(UserError, match="too small"):
            begun.result()
        dies = Meanwhile(ends, os.getpid())
        time.sleep(0.5)
        assert dies.result() == os.getpid()


def test_what_was_let_go_gives_way_to_others(found_here):
    with Workers(CALL, 1, "predicts") as workers, helped_by(workers):
        first, second, third = (Meanwhile(process_after, 0.5) for _ in range(3))
        deadline = time.monotonic() + 60
        while not first._future.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        second.let_go()
        assert first.result() != os.getpid()
        while not third._future.running() and not third._future.done() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert third.result() != os.getpid() and second.result() == os.getpid()
