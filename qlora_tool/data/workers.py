"""Rows made into examples in several processes.

The processes are plain ones that take their work through pipes: forking a process that has threads
(torch's, the tokenizer's) may hang, and `multiprocessing`'s other ways run the main program once more, which a script
that calls `train` need not bear.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from qlora_tool.data.blocks import Block
from qlora_tool.data.encoding import Encoder
from qlora_tool.data.faults import RowFaults
from qlora_tool.data.layout import Layout
from qlora_tool.data.readers.rows import Row
from qlora_tool.data.report import DataReport
from qlora_tool.errors import MachineError, ToolError, UserError

MOST = 8  # processes
EACH = 1 << 30  # bytes of free memory for each: it takes half of that
AHEAD = 3  # chunks a process that wait to be made, or to be taken


@dataclass
class Chunk:
    """Some rows of one layout, and the faulty rows that were met while they were read."""

    layout: Layout
    rows: list[Row]
    faults: RowFaults = field(default_factory=RowFaults)


@dataclass
class Encoded:
    """What came of a chunk.

    Attributes:
        block: its examples.
        report: counts of its rows.
        faults: its faulty rows.
        error: why no more can be made, as lines.
    """

    block: Block
    report: DataReport
    faults: RowFaults = field(default_factory=RowFaults)
    error: list[str] | None = None


def encode(encoder: Encoder, chunk: Chunk, blank: DataReport) -> Encoded:
    """The examples of a chunk.

    Args:
        blank: a report without counts.

    Raises:
        UserError: what no row can be trained with.
    """
    report, faults = pickle.loads(pickle.dumps(blank)), RowFaults()
    faults.take(chunk.faults)
    rows = encoder.encode(chunk.rows, chunk.layout, report, faults)
    return Encoded(Block.of(rows), report, faults)


def processes_for(bytes_to_read: int) -> int:
    """How many processes are worth their start for a source of so many bytes: 1 is this one alone."""
    if bytes_to_read < PARALLEL_FROM:
        return 1
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST, psutil.virtual_memory().available // EACH))


PARALLEL_FROM = 32 << 20  # bytes of a source: some ten seconds' work for one process


def encode_all(
    encoder: Encoder, chunks: Iterable[Chunk], blank: DataReport, processes: int
) -> Iterator[Encoded]:
    """What comes of chunks, in their order, however many processes there are.

    Raises:
        UserError: what no row can be trained with.
        MachineError: a process died.
    """
    try:
        start = pickle.dumps((encoder, blank)) if processes > 1 else b""
    except (pickle.PicklingError, TypeError, AttributeError):  # a tokenizer of its own kind
        processes = 1
    if processes < 2:
        yield from (encode(encoder, chunk, blank) for chunk in chunks)
        return
    with _Pool(start, processes) as pool:
        waiting: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(chunk))
            if len(waiting) >= processes * AHEAD:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(future: Future[Encoded]) -> Encoded:
    encoded = future.result()
    if encoded.error is not None:
        raise UserError(encoded.error)
    return encoded


class _Pool:
    """Processes that encode, each served by a thread that waits for it."""

    def __init__(self, start: bytes, count: int):
        self.start, self.count = start, count
        self.threads = ThreadPoolExecutor(count)
        self.idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _Pool:
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        for _ in range(self.count):
            process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            )  # fmt: skip
            self.processes.append(process)
            self.idle.put(process)
        for process in self.processes:
            _send(process.stdin, self.start)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()  # they hold nothing that could be lost
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()
            process.wait()

    def submit(self, chunk: Chunk) -> Future[Encoded]:
        return self.threads.submit(self._run, chunk)

    def _run(self, chunk: Chunk) -> Encoded:
        process = self.idle.get()
        try:
            _send(process.stdin, pickle.dumps(chunk, pickle.HIGHEST_PROTOCOL))
            return pickle.loads(_receive(process.stdout))
        except (OSError, EOFError) as error:
            raise MachineError(
                f"a process that tokenizes ended early (exit code {process.poll()}); if memory ran out, free some"
            ) from error
        finally:
            self.idle.put(process)


def _send(stream: Any, message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "little"))
    stream.write(message)
    stream.flush()


def _receive(stream: Any) -> bytes:
    length = stream.read(8)
    message: bytes = stream.read(int.from_bytes(length, "little"))
    if len(length) < 8 or len(message) < int.from_bytes(length, "little"):
        raise EOFError
    return message


def serve() -> None:
    """Be one of the processes: encode what comes until nothing comes any more. What libraries print goes to stderr,
    for stdout has the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    receive, send = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    encoder, blank = pickle.loads(_receive(receive))
    while True:
        try:
            chunk = pickle.loads(_receive(receive))
        except EOFError:
            return
        try:
            encoded = encode(encoder, chunk, blank)
        except ToolError as error:
            encoded = Encoded(Block.of([]), blank, error=error.lines)
        _send(send, pickle.dumps(encoded, pickle.HIGHEST_PROTOCOL))
