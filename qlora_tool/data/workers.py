"""Rows made into examples in several processes."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from qlora_tool.data.blocks import Block
from qlora_tool.data.encoding import Encoder
from qlora_tool.data.faults import RowFaults
from qlora_tool.data.layout import Layout
from qlora_tool.data.readers.rows import Row
from qlora_tool.data.report import DataReport
from qlora_tool.workers import Workers, count_for

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
    """

    block: Block
    report: DataReport
    faults: RowFaults = field(default_factory=RowFaults)


def encode(encoder: Encoder, blank: DataReport, chunk: Chunk) -> Encoded:
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
    return count_for(EACH)


PARALLEL_FROM = 32 << 20  # bytes of a source: some ten seconds' work for one process


def encode_all(
    encoder: Encoder, chunks: Iterable[Chunk], blank: DataReport, processes: int
) -> Iterator[Encoded]:
    """What comes of chunks, in their order, however many processes there are.

    Raises:
        UserError: what no row can be trained with.
        MachineError: a process died.
    """
    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with Workers(f"{__name__}:encode", processes if processes > 1 else 0, "tokenizes", environment) as workers:
        try:
            workers.tell((encoder, blank))
        except (pickle.PicklingError, TypeError, AttributeError):  # a tokenizer of its own kind
            processes = 1
        if processes < 2:
            yield from (encode(encoder, blank, chunk) for chunk in chunks)
            return
        waiting: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            waiting.append(workers.submit(chunk))
            if len(waiting) >= processes * AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
