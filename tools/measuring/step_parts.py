"""Where the time of a step goes on a CPU, told by part, and what the process read from the disk meanwhile.

The package is not changed for it: operations are seen by a dispatch mode, which calls each and takes the time, and the
functions of a stream are wrapped. A step takes 0.1 to 0.5 % longer under it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

PARTS = {
    "dequantizing": ("dequantize_4bit", "dequantize_int8"),
    "products": ("matmul", "matmul_add", "mm", "addmm", "addmm_", "bmm", "baddbmm", "_linear_pointwise"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}  # fmt: skip
_PART_OF = {operation: part for part, operations in PARTS.items() for operation in operations}
WAITING, COPYING, READING = "waiting for reads", "copying what is not aligned", "reading (another thread)"


def disk_bytes_read() -> int:
    """What this process has had read from the disk so far; bytes that came out of the page cache do not count."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


class _Timed(TorchDispatchMode):
    """Seconds of every operation, by part."""

    def __init__(self, seconds: dict[str, float]):
        super().__init__()
        self._seconds = seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        try:
            return func(*args, **kwargs or {})
        finally:
            part = _PART_OF.get(func.overloadpacket.__name__, "other operations")
            self._seconds[part] += time.perf_counter() - start


@contextlib.contextmanager
def parts_of_time() -> Iterator[dict[str, float]]:
    """Seconds of what runs meanwhile, by part; complete once it is over.

    `waiting for reads` is what the thread that computes loses; the reading itself goes on beside it, in another one,
    and is no part of the whole. `the rest` is Python's own, and whatever is no operation.
    """
    from qlora_tool.weights.streamed import DiskStream, Place

    seconds: dict[str, float] = defaultdict(float)
    wrapped = {(DiskStream, "part"): WAITING, (DiskStream, "_read"): READING, (Place, "of"): COPYING}
    before = {place: getattr(*place) for place in wrapped}
    for (owner, name), part in wrapped.items():
        setattr(owner, name, _timed(before[owner, name], part, seconds))
    start = time.perf_counter()
    try:
        with _Timed(inner := defaultdict(float)):
            yield seconds
    finally:
        total = time.perf_counter() - start
        for (owner, name), function in before.items():
            setattr(owner, name, function)
        # What lies in those two is no other operation's: `Place.of` is made of a few.
        inner["other operations"] -= min(inner["other operations"], seconds[COPYING])
        seconds |= inner
        own = sum(taken for part, taken in seconds.items() if part != READING)
        seconds["the rest"] = total - own


def _timed(function: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds[part] += time.perf_counter() - start

    return timed


def measured(step: Callable[[], float], by_part: bool) -> dict[str, Any]:
    """A step's loss; seconds, of the clock and of the processor, by part if asked for; bytes read from the disk."""
    read, processor, start = disk_bytes_read(), time.process_time(), time.perf_counter()
    with parts_of_time() if by_part else contextlib.nullcontext({}) as parts:
        loss = step()
    return {
        "loss": loss, "seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor,
        "disk_bytes": disk_bytes_read() - read, "parts": dict(parts),
    }  # fmt: skip
