"""How fast this machine reads its disk, copies memory and brings memory to its cards, measured once in a while and
cached: what weights that are streamed (`model.weights`) can come at.

The disk is read as `weights/streamed.py` reads it, past the page cache, in a file of random bytes that is written for
it into the cache folder, where bases lie. A disk that keeps in a memory of its own what was written last looks faster
than it is: what a run itself waited for is the last word.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from qlora_tool.errors import MachineError, ToolError
from qlora_tool.files.atomic import disk_errors, existing_parent
from qlora_tool.files.cache import cache_folder
from qlora_tool.files.direct_reads import PAGE, DirectFile
from qlora_tool.ops.free_memory import free_bytes
from qlora_tool.ops.measured import check_date, expired, read_measured, today, write_measured
from qlora_tool.ops.speeds import processor_kind

FILE_BYTES, FILE_SHARE = 256 << 20, 10  # at most one part in so many of what is free
READ_BYTES = 16 << 20  # at once: between a layer of a small model (2 MB) and of a 7B (105 MB)
PASSES = 3  # over the file
WRITING, READING = 0.6, 0.6  # seconds after which no further piece is written, or read
COPY_BYTES, COPIES = 256 << 20, 4


@dataclass(frozen=True)
class Bandwidths:
    """What was measured, in bytes a second; 0 is what was not.

    Attributes:
        date: when, ISO 8601 in UTC; empty where nothing was measured.
        disk: of reads from a file in the cache folder.
        host: of copies in memory.
        cards: of copies from pinned memory to each, by `cuda:0` and so on.
        direct: whether the disk was read past the page cache, as its file system lets it be.
        threads: that copied in memory.
        faults: why something was not measured, by `disk`, `host` and the cards' names.
    """

    date: str = ""
    disk: float = 0.0
    host: float = 0.0
    cards: dict[str, float] = field(default_factory=dict)
    direct: bool = False
    threads: int = 0
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def expired(self) -> bool:
        return expired(self.date, doubtful=bool(self.faults))

    @classmethod
    def from_json(cls, data: Any) -> Bandwidths:
        """
        Raises:
            ValueError, TypeError, AttributeError: it is none.
        """
        found = cls(**data)
        check_date(found.date)
        figures = [found.disk, found.host, *found.cards.values()]
        known = all(isinstance(figure, (int, float)) and figure >= 0 for figure in figures)
        if not known or not isinstance(found.threads, int):
            raise ValueError("no measurement of bandwidths")
        if not all(isinstance(reason, str) for reason in found.faults.values()):
            raise ValueError("no reasons why something was not measured")
        return found


def known_bandwidths(measure: bool = True) -> Bandwidths:
    """What was measured on this machine with this cache folder; measured now where that is too old or not there.

    Args:
        measure: False: where there is nothing that holds, all of it is 0, and nothing is measured.
    """
    found = read_measured(_file(), Bandwidths.from_json).get(_machine())
    if found is not None and not found.expired:
        return found
    return measure_anew() if measure else Bandwidths()


def measure_anew() -> Bandwidths:
    """Measure now, and cache it in the place of what was measured earlier."""
    found, machine = _measure(), _machine()
    others = {name: one for name, one in read_measured(_file(), Bandwidths.from_json).items() if not one.expired}
    write_measured(_file(), others | {machine: found})
    return found


def _file() -> Path:
    return cache_folder() / "bandwidths.json"


def _machine() -> str:
    """What a measurement holds for. No host's name, which a container has another of every time; a home folder may be
    shared by several machines, and a folder may come to lie on another disk."""
    import psutil

    folder = cache_folder().absolute()
    try:
        disk = shutil.disk_usage(existing_parent(folder)).total
    except OSError:
        disk = 0
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if _has_cards() else []
    memory = psutil.virtual_memory().total
    machine = [processor_kind(), f"{os.cpu_count()} processors", f"{memory / 2**30:.0f} GiB", *cards]
    return f"{', '.join(machine)}; {folder} on a disk of {disk / 1e9:.0f} GB"


def _has_cards() -> bool:
    return torch.cuda.is_available()


# ------------------------------------------------------------------------------------------------------ measuring


def _measure() -> Bandwidths:
    """One or two seconds for all; what cannot be measured is told, and stops nothing."""
    faults: dict[str, str] = {}
    direct: list[bool] = []

    def disk() -> float:
        with disk_errors(cache_folder()):
            figure, past_the_cache = read_rate(cache_folder())
        direct.append(past_the_cache)
        return figure

    def figure_of(name: str, measured: Callable[[], float]) -> float:
        try:
            return measured()
        except (OSError, RuntimeError, MemoryError, ToolError) as error:  # CUDA's are RuntimeErrors
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            faults[name] = said.splitlines()[0]
            return 0.0

    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if _has_cards() else []
    return Bandwidths(
        today(), figure_of("disk", disk), figure_of("host", host_rate),
        {str(card): figure_of(str(card), partial(card_rate, card)) for card in cards},
        any(direct), torch.get_num_threads(), faults,
    )  # fmt: skip


def read_rate(folder: Path) -> tuple[float, bool]:
    """Bytes a second that are read from a file in a folder, and whether past the page cache.

    The file has lost its name before it is written, so that nothing is left of it however this ends.

    Raises:
        OSError, MachineError: it cannot be written or read.
    """
    if not hasattr(os, "preadv"):
        raise MachineError("Python cannot read into memory at a place of a file on this system")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    pieces = min(FILE_BYTES, free // FILE_SHARE) // READ_BYTES
    if not pieces:
        raise MachineError(f"{free / 1e6:.0f} MB are free in {folder}, of which a tenth is not enough for a file")
    descriptor, name = tempfile.mkstemp(prefix=".bandwidth-", dir=folder)
    with os.fdopen(descriptor, "wb") as written:
        try:
            file = DirectFile(Path(name))
        finally:
            os.unlink(name)
        try:
            return _read(file, _write(written, pieces)), file.direct
        finally:
            file.close()


def _write(written: Any, pieces: int) -> int:
    """Up to so many pieces of random bytes, onto the disk itself; how many they became."""
    random, begin, done = numpy.random.default_rng(), time.perf_counter(), 0
    while done < pieces and (not done or time.perf_counter() - begin < WRITING):
        written.write(random.bytes(READ_BYTES))
        written.flush()
        os.fsync(written.fileno())
        done += 1
    return done


def _read(file: DirectFile, pieces: int) -> float:
    """Bytes a second over some passes, or as much of them as there is time for."""
    seconds, done = 0.0, 0
    memory = memoryview(mmap.mmap(-1, READ_BYTES))  # begins on a page; gone once nothing refers to it
    memory[::PAGE] = bytes(READ_BYTES // PAGE)  # its pages are there before anything is timed
    file.drop(0, pieces * READ_BYTES)  # what was just written
    while done < PASSES * pieces and (not done or seconds < READING):
        first = done % pieces * READ_BYTES
        begin = time.perf_counter()
        file.read_into(memory, first, READ_BYTES)
        seconds += time.perf_counter() - begin
        file.drop(first, READ_BYTES)
        done += 1
    return done * READ_BYTES / seconds


def host_rate() -> float:
    """Bytes a second that are copied in memory."""
    size = min(COPY_BYTES, free_bytes(torch.device("cpu")) // 8)
    source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    return _copy_rate(source, target, finish=lambda: None)


def card_rate(card: torch.device) -> float:
    """Bytes a second that come from pinned memory to a card.

    Raises:
        RuntimeError: it has not the memory, or none can be pinned.
    """
    source, target = _pinned_and_on(card)
    return _copy_rate(source, target, partial(torch.cuda.synchronize, card))


def _pinned_and_on(card: torch.device) -> tuple[Tensor, Tensor]:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory()
    return source, torch.empty(COPY_BYTES, dtype=torch.uint8, device=card)


def _copy_rate(source: Tensor, target: Tensor, finish: Callable[[], None]) -> float:
    target.copy_(source, non_blocking=True)  # the first copy prepares
    finish()
    begin = time.perf_counter()
    for _ in range(COPIES):
        target.copy_(source, non_blocking=True)
    finish()
    return COPIES * source.nbytes / (time.perf_counter() - begin)
