"""Limits to how long a piece of Python may run, and to what it may take meanwhile."""

from __future__ import annotations

import time

import pytest

from qlora_tool.data.time_limit import TimeIsUp, TooMuch, time_limit

MIB = 1 << 20


def test_what_was_there_before_does_not_count():
    """Between two limits the process grew by more than the second one allows."""
    with time_limit(30, 64 * MIB):
        time.sleep(0.3)
    before = bytearray(b"x") * (200 * MIB)
    time.sleep(0.1)
    with time_limit(30, 64 * MIB):
        time.sleep(0.5)
    assert len(before) == 200 * MIB


def test_growth_is_stopped_while_it_goes_on():
    taken = []
    with pytest.raises(TooMuch), time_limit(60, 64 * MIB):
        while len(taken) < 1000:
            taken.append(bytearray(b"x") * MIB)
            time.sleep(0.01)
    assert 64 <= len(taken) < 1000


def test_growth_without_a_limit_is_free():
    with time_limit(60):
        taken = bytearray(b"x") * (100 * MIB)
        time.sleep(0.5)
    assert len(taken) == 100 * MIB


def test_time_is_stopped_and_nothing_comes_after_it():
    with pytest.raises(TimeIsUp), time_limit(0.3):
        while True:
            pass
    with time_limit(30):  # the one before does not strike here
        time.sleep(0.5)
