"""The measurement of bandwidths: when it is made, what its figures are of, and that nothing of it stays or stops."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from child_process import child_environment

from qlora_tool.files import direct_reads
from qlora_tool.files.sealed import read_sealed, write_sealed
from qlora_tool.ops import bandwidths
from qlora_tool.ops.bandwidths import Bandwidths, known_bandwidths, measure_anew

MIB = 1 << 20


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bandwidths, "_has_cards", lambda: False)
    return tmp_path / "cache"


@pytest.fixture
def small(cache, monkeypatch) -> Path:
    """A file of four pieces of 1 MiB, and copies of 1 MiB."""
    monkeypatch.setattr(bandwidths, "FILE_BYTES", 4 * MIB)
    monkeypatch.setattr(bandwidths, "READ_BYTES", MIB)
    monkeypatch.setattr(bandwidths, "COPY_BYTES", MIB)
    return cache


class Clock:
    """Seconds that go by only where they are said to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(bandwidths, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def ago(**age: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(**age)).isoformat(timespec="seconds")


@pytest.fixture
def measured(cache, monkeypatch) -> list[Bandwidths]:
    """What measuring finds, one after the other."""
    waiting: list[Bandwidths] = []
    monkeypatch.setattr(bandwidths, "_measure", lambda: waiting.pop(0))
    return waiting


def rewrite(cache: Path, **changes) -> None:
    file = cache / "bandwidths.json"
    [(machine, data)] = read_sealed(file).items()
    write_sealed(file, {machine: data | changes})


# ---------------------------------------------------------------------------------------------------- when


def test_a_measurement_is_made_once_and_none_where_none_is_wanted(measured):
    assert known_bandwidths(measure=False) == Bandwidths()
    first, second = (Bandwidths(ago(), disk, 9e9, {"cuda:0": 2e10}, True, 2) for disk in (1e9, 2e9))
    measured[:] = [first, second]
    assert known_bandwidths() == known_bandwidths() == known_bandwidths(measure=False) == first
    assert measure_anew() == second == known_bandwidths()


@pytest.mark.parametrize(("changes", "again"), [
    ({"date": {"days": 27}}, False), ({"date": {"days": 29}}, True), ({"date": {"days": -1}}, True),
    ({"faults": {"disk": "no space"}}, False), ({"faults": {"disk": "no space"}, "date": {"hours": 2}}, True),
    ({"date": "2026-11-27T17:00:11"}, True), ({"threads": None}, True),
    ({"date": "today"}, True), ({"date": ""}, True), ({"disk": "fast"}, True), ({"disk": -1.0}, True),
    ({"cards": {"cuda:0": None}}, True), ({"cards": 1}, True), ({"faults": {"disk": 1}}, True), ({"more": 1}, True),
], ids=str)  # fmt: skip
def test_what_is_old_incomplete_or_broken_is_measured_again(changes, again, cache, measured):
    measured[:] = [Bandwidths(ago(), 1e9, 9e9, {}, True, 2), Bandwidths(ago(), 2e9, 9e9, {}, True, 2)]
    known_bandwidths()
    if isinstance(changes.get("date"), dict):  # how long ago
        changes = changes | {"date": ago(**changes["date"])}
    rewrite(cache, **changes)
    assert (known_bandwidths(measure=False).date == "") is again
    assert (known_bandwidths().disk == 2e9) is again


@pytest.mark.parametrize("content", ["", "{", "[]", '{"machine": 1}'])
def test_a_broken_file_is_measured_over(content, cache, measured):
    cache.mkdir()
    (cache / "bandwidths.json").write_text(content)
    measured[:] = [Bandwidths(ago(), 1e9)]
    assert known_bandwidths().disk == 1e9 == known_bandwidths().disk


def test_another_machine_card_or_disk_is_measured_apart_and_what_is_old_goes(cache, measured, monkeypatch):
    measured[:] = [Bandwidths(ago(days=40 if index == 1 else 0), 1e9 + index) for index in range(5)]
    known_bandwidths()
    with monkeypatch.context() as patch:
        patch.setattr(bandwidths.os, "cpu_count", lambda: 97)
        known_bandwidths()
    with monkeypatch.context() as patch:
        other = namedtuple("usage", "total used free")(10**15, 0, 0)
        patch.setattr(bandwidths.shutil, "disk_usage", lambda _: other)
        assert known_bandwidths().disk == 1e9 + 2
    with monkeypatch.context() as patch:
        patch.setattr(bandwidths, "_has_cards", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
        assert known_bandwidths().disk == 1e9 + 3
    assert known_bandwidths().disk == 1e9
    kept = read_sealed(cache / "bandwidths.json")
    assert sorted(one["disk"] - 1e9 for one in kept.values()) == [0, 2, 3]  # not that of 40 days ago


# ---------------------------------------------------------------------------------------------- what is measured


def test_figures_are_bytes_by_seconds(small, clock, monkeypatch):
    """A read of a MiB takes 0.01 s, a copy of one 0.001 s; writing, and the copy that prepares, do not count."""
    reads, read_into, copy = [], direct_reads.DirectFile.read_into, torch.Tensor.copy_

    def timed_read(self, memory, first, needed):
        clock.now += 0.01
        reads.append((first, needed))
        return read_into(self, memory, first, needed)

    def timed_copy(self, *given, **options):
        clock.now += 0.001
        return copy(self, *given, **options)

    monkeypatch.setattr(direct_reads.DirectFile, "read_into", timed_read)
    monkeypatch.setattr(torch.Tensor, "copy_", timed_copy)
    found = measure_anew()
    assert found.disk == pytest.approx(MIB / 0.01) and found.host == pytest.approx(MIB / 0.001)
    assert reads == [(first * MIB, MIB) for first in range(4)] * bandwidths.PASSES
    assert (found.cards, found.faults, found.threads) == ({}, {}, torch.get_num_threads())


def test_a_slow_disk_is_not_read_nor_written_to_the_end(small, clock, monkeypatch):
    """A second for each MiB that is written, half a second for each that is read."""
    fsync, written = os.fsync, []

    def slow_fsync(descriptor):
        clock.now += 1.0
        written.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def slow_read(self, memory, first, needed):
        clock.now += 0.5
        return needed

    monkeypatch.setattr(os, "fsync", slow_fsync)
    monkeypatch.setattr(direct_reads.DirectFile, "read_into", slow_read)
    rate, _ = bandwidths.read_rate(small)
    assert rate == pytest.approx(MIB / 0.5) and written == [MIB]
    assert clock.now == 1000.0 + 1.0 + 2 * 0.5


def test_what_is_read_is_what_was_written_and_no_two_pieces_are_alike(small, monkeypatch):
    """Zeros, or the same piece again, a disk need not read at all."""
    seen, read_into = [], direct_reads.DirectFile.read_into

    def noted(self, memory, first, needed):
        done = read_into(self, memory, first, needed)
        seen.append(bytes(memory))
        return done

    monkeypatch.setattr(direct_reads.DirectFile, "read_into", noted)
    bandwidths.read_rate(small)
    assert len(set(seen)) == 4 and seen[:4] == seen[4:8] == seen[8:]
    assert all(len(set(piece[:4096])) > 200 for piece in seen)


@pytest.mark.parametrize("direct", [True, False])
def test_whether_reads_are_direct_is_told(direct, small, monkeypatch):
    plain = os.open

    def without(path, flag, *rest, **more):
        if flag & os.O_DIRECT and not direct:
            raise OSError(errno.EINVAL, "no")
        return plain(path, flag & ~os.O_DIRECT, *rest, **more)

    monkeypatch.setattr(os, "open", without)
    found = measure_anew()
    assert found.direct is direct and found.disk > 0 and not found.faults


def test_cards_are_measured_until_the_copies_are_there(small, clock, monkeypatch):
    """Two of them: copies only begin when they are asked for, and a second card that fails is told."""
    waiting, cards = [], []

    class Copies:
        nbytes = MIB

        def copy_(self, source, non_blocking):
            assert non_blocking and source.nbytes == MIB
            waiting.append(0.25)

    def on_card(card):
        cards.append(str(card))
        if card.index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nAnd more lines.")
        return Copies(), Copies()

    def synchronize(card):
        clock.now += sum(waiting)
        waiting.clear()

    monkeypatch.setattr(bandwidths, "_has_cards", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "made up")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(bandwidths, "_pinned_and_on", on_card)
    monkeypatch.setattr(bandwidths, "host_rate", lambda: 1.0)
    monkeypatch.setattr(bandwidths, "read_rate", lambda _: (2.0, True))
    found = measure_anew()
    assert found.cards == {"cuda:0": MIB / 0.25, "cuda:1": 0.0} and cards == ["cuda:0", "cuda:1"]
    assert found.faults == {"cuda:1": "CUDA out of memory."}


@pytest.mark.cuda
def test_a_card_is_measured(cache):
    """PCIe or NVLink: between 1 and 1000 GB/s."""
    rate = bandwidths.card_rate(torch.device("cuda", 0))
    assert 1e9 < rate < 1e12


# ------------------------------------------------------------------------------------ where it cannot be measured


def test_a_folder_that_cannot_be_written_is_told(tmp_path, small, monkeypatch):
    """Under a file, where nobody can make one, and in one that refuses."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(tmp_path / "file" / "cache"))
    found = known_bandwidths()
    assert found.disk == 0 and found.host > 0
    assert f"{tmp_path / 'file'} is a file, where something else is expected; move it away" in found.faults["disk"]
    monkeypatch.setenv("QLORA_TOOL_CACHE", str(small))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(bandwidths.tempfile, "mkstemp", refuse)
    found = known_bandwidths()
    assert found.disk == 0 and found.host > 0
    assert found.faults == {"disk": f"cannot write {small}: Permission denied; choose a folder you may write to"}


@pytest.mark.parametrize(("free", "pieces"), [(10**12, 4), (45 * MIB, 4), (39 * MIB, 3), (10 * MIB, 1), (9 * MIB, 0)])
def test_no_more_than_a_tenth_of_what_is_free_is_written(free, pieces, small, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 0, free)
    monkeypatch.setattr(bandwidths.shutil, "disk_usage", lambda _: usage)
    written, write = [], bandwidths._write
    monkeypatch.setattr(bandwidths, "_write", lambda file, count: written.append(count) or write(file, count))
    found = measure_anew()
    assert written == ([pieces] if pieces else []) and (found.disk > 0) is (pieces > 0)
    if not pieces:
        assert found.faults["disk"].startswith(f"9 MB are free in {small}, of which a tenth is not enough")


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["fsync", "preadv", "open"])
def test_nothing_of_the_file_stays(where, fault, small, monkeypatch):
    plain = getattr(os, where)

    def fail(*given, **options):
        if where == "open" and "bandwidth" not in str(given[0]):
            return plain(*given, **options)
        if where == "open" and given[1] & os.O_CREAT:
            return plain(*given, **options)
        raise fault

    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    monkeypatch.setattr(os, where, fail)
    if isinstance(fault, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            bandwidths._measure()
    else:
        found = bandwidths._measure()
        assert found.disk == 0 and "disk" in found.faults and found.host > 0
    monkeypatch.undo()
    assert list(small.iterdir()) == []
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_nothing_of_the_file_stays_when_the_process_is_killed(cache, tmp_path):
    code = ("import os, time; from qlora_tool.ops import bandwidths; real = os.fsync\n"
            "def stop(descriptor):\n"
            "    real(descriptor); print(os.fstat(descriptor).st_size, flush=True); time.sleep(60)\n"
            "os.fsync = stop; bandwidths.known_bandwidths()")  # fmt: skip
    environment = child_environment() | {"QLORA_TOOL_CACHE": str(cache)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert int(process.stdout.readline()) == bandwidths.READ_BYTES
        process.send_signal(signal.SIGKILL)
    assert list(cache.iterdir()) == []


def test_it_takes_little_time(cache):
    """Less than two seconds on an idle machine; ten times that where others are at work. Here as it is, unshortened."""
    begin = time.perf_counter()
    found = known_bandwidths()
    assert time.perf_counter() - begin < 20
    assert found.disk > 0 and found.host > 0 and [file.name for file in cache.iterdir()] == ["bandwidths.json"]
    begin = time.perf_counter()
    assert known_bandwidths(measure=False) == found
    assert time.perf_counter() - begin < 0.2
