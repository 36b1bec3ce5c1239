"""Work in several processes: the same results in order, faults told, whoever does it."""

from __future__ import annotations

import os
import sys
import time
import types

import pytest

from qlora_tool.errors import MachineError, UserError
from qlora_tool.workers import Workers, count_for


def where(told: str, number: int) -> tuple[str, int, int]:
    if number < 0:
        raise UserError(f"{number} is too small")
    if number == 13:
        os._exit(7)
    return told, number * number, os.getpid()


def shown(number: int) -> tuple[int, int]:
    print("this is not a result")  # stdout has results alone
    return number * number, os.getpid()


@pytest.fixture
def found_here(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


def test_results_come_in_order_whoever_makes_them(found_here):
    works = [(number,) for number in range(40)]
    with Workers("test_workers:shown", 2, "counts") as workers:
        made = list(workers.map(works))
    assert [square for square, _ in made] == [number * number for number in range(40)]
    assert os.getpid() in {process for _, process in made}  # a share of them is made here
    with Workers("test_workers:shown", 0, "counts") as alone:
        assert {process for _, process in alone.map(works)} == {os.getpid()}


def test_what_is_told_comes_before_the_work(found_here):
    with Workers("test_workers:where", 1, "counts") as workers:
        workers.tell(("once",))
        told, square, process = workers.submit(7).result()
    assert (told, square) == ("once", 49) and process != os.getpid()


def test_faults_are_told_as_what_they_are(found_here):
    with Workers("test_workers:where", 1, "counts") as workers:
        workers.tell(("once",))
        with pytest.raises(UserError, match="-1 is too small"):
            workers.submit(-1).result()
        assert workers.submit(2).result()[1] == 4  # it goes on
        with pytest.raises(MachineError, match=r"a process that counts ended early \(exit code .*if memory ran out"):
            workers.submit(13).result()


def test_what_cannot_be_sent_is_made_here(found_here):
    with Workers("test_workers:is_callable", 1, "looks") as workers:
        assert list(workers.map([(lambda: 1,), (2,)])) == [True, False]


def test_what_a_process_dies_of_is_made_here(found_here):
    works = [(os.getpid(), number) for number in range(6)]
    with Workers("test_workers:only_in", 1, "counts") as workers:
        assert list(workers.map(works)) == list(range(6))


def only_in(process: int, number: int) -> int:
    if os.getpid() != process:
        os._exit(7)
    time.sleep(0.5)  # so that the other one takes some, too
    return number


class Unreadable:
    """Of a module that the other process does not have."""


def test_what_another_process_cannot_read_is_made_here(found_here, capfd, monkeypatch):
    monkeypatch.setattr(Unreadable, "__module__", "module_of_this_process")
    module = types.ModuleType("module_of_this_process")
    module.Unreadable = Unreadable
    monkeypatch.setitem(sys.modules, "module_of_this_process", module)
    with Workers("test_workers:is_callable", 1, "looks") as workers:
        assert list(workers.map([(Unreadable,), (Unreadable(),)])) == [True, False]
    assert "Traceback" not in capfd.readouterr().err


def is_callable(value: object) -> bool:
    return callable(value)


def test_processes_are_as_many_as_memory_and_cores_allow():
    assert count_for(1 << 60) == 1
    assert 1 <= count_for(1) <= 8
