"""Frozen weights that are copied to a card while it computes: from host memory, or from the disk by way of it.

What computes and what copies are two queues of the card. A copy into a buffer waits for all that computes with what the
buffer had; what computes waits for the copy. Both wait on the card: the host only says so, and goes on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_tool.errors import MachineError
from qlora_tool.sizes import memory_size
from qlora_tool.weights.schedule import Schedule
from qlora_tool.weights.streamed import Buffers, Check, DiskStream, Part, in_backward

Event = Any  # a moment in a queue: `torch.cuda.Event`


class Queues(Protocol):
    """A device's two queues, one that computes and one that copies."""

    def share(self, buffers: Buffers) -> Event:
        """Let both use buffers from now on; the event: what computed before, perhaps in the same memory, is done."""
        ...

    def computed(self) -> Event:
        """The event: all that computing has been asked for so far is done."""
        ...

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """Have a tensor in pinned host memory copied after an event; the event: it is there."""
        ...

    def compute_after(self, event: Event) -> None:
        """Have what computing is asked for from here on wait for an event."""
        ...

    def finish(self, event: Event) -> None:
        """Wait, on the host, for an event."""
        ...

    def pin(self, memory: Tensor) -> None:
        """Let copies read host memory while the host goes on, as long as these queues are there.

        Raises:
            MachineError: it cannot be pinned.
        """
        ...


class CudaQueues:
    """The queues of a CUDA device: the stream that computes, and one of its own that copies."""

    def __init__(self, device: torch.device):
        self.device = device
        self._copying = torch.cuda.Stream(device)
        self._pinned: list[Tensor] = []
        # The memory must not be given back before it is no longer pinned, nor that while it is read.
        weakref.finalize(self, _unpin, self._copying, self._pinned).atexit = False

    def share(self, buffers: Buffers) -> Event:
        """See `Queues`."""
        for memory in (buffers.one, buffers.other):
            memory.record_stream(self._copying)
        return self.computed()

    def computed(self) -> Event:
        """See `Queues`."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """See `Queues`."""
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._copying.record_event()

    def compute_after(self, event: Event) -> None:
        """See `Queues`."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: Event) -> None:
        """See `Queues`."""
        event.synchronize()

    def pin(self, memory: Tensor) -> None:
        """See `Queues`. Not by PyTorch's own pinned allocator, which rounds sizes up to powers of two."""
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code:
            raise unpinnable(memory.nbytes, f"CUDA's error {code}")
        self._pinned.append(memory)


def _unpin(copying: torch.cuda.Stream, pinned: list[Tensor]) -> None:
    copying.synchronize()
    for memory in pinned:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def unpinnable(size: int, reason: str) -> MachineError:
    """What to say of host memory that cannot be pinned."""
    return MachineError(
        f"model.weights: {memory_size(size)} more of host memory cannot be pinned for copies to the card ({reason}); "
        "free memory or raise the limit of locked memory (ulimit -l); model.weights: disk pins two layers alone"
    )


class HostStream:
    """Parts in pinned host memory, copied to two buffers on a device.

    Args:
        parts: how many there will be, in the order of a forward pass.
        device: where the buffers are.
        queues: of the device.

    Attributes:
        nbytes: of all parts, in host memory.
        read_bytes: that were copied so far.

    Raises:
        MachineError: memory cannot be pinned.
    """

    buffers: Buffers

    def __init__(self, parts: int, device: torch.device, queues: Queues):
        self._parts: list[Tensor | None] = [None] * parts
        self.device, self._queues = device, queues
        self.read_bytes = 0
        self._used: list[Event] = [None, None]  # per buffer: what computed with it before
        self._there: list[Event] = [None, None]  # per buffer: its copy
        self._schedule = Schedule(parts, self)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of all parts, in host memory."""
        return sum(part.nbytes for part in self._parts if part is not None)

    def hold(self, index: int, part: Tensor) -> None:
        """Keep the bytes of a part, uint8 in host memory."""
        self._queues.pin(part)
        self._parts[index] = part

    def begin(self) -> None:
        """All parts are there: make the buffers."""
        self.buffers = Buffers(max(part.nbytes for part in self._parts if part is not None), self.device)
        self._used = [self._queues.share(self.buffers)] * 2

    def part(self, index: int) -> Tensor:
        """See `Stream`."""
        with self._lock:
            buffer = self._schedule.ask(index, in_backward())
            return self.buffers[buffer][: self._bytes(index).nbytes]

    def _bytes(self, index: int) -> Tensor:
        found = self._parts[index]
        assert found is not None
        return found

    def used(self, buffer: int) -> None:
        """See `Copier`."""
        self._used[buffer] = self._queues.computed()

    def copy(self, part: int, buffer: int) -> None:
        """See `Copier`."""
        source = self._bytes(part)
        self.read_bytes += source.nbytes
        self._there[buffer] = self._queues.copy(source, self.buffers[buffer][: source.nbytes], self._used[buffer])

    def ready(self, buffer: int) -> None:
        """See `Copier`."""
        self._queues.compute_after(self._there[buffer])


class DiskToCardStream(DiskStream):
    """Parts of a file on a device: read into pinned host memory by a thread, which then has them copied.

    Args:
        file, parts: see `DiskStream`.
        device: where the buffers are.
        queues: of the device.
        checks: see `DiskStream`.

    Raises:
        MachineError: memory cannot be pinned; and see `DiskStream`.
    """

    def __init__(
        self, file: Path, parts: Sequence[Part], device: torch.device, queues: Queues, checks: Sequence[Check] = ()
    ):
        room = max(part.room for part in parts)
        super().__init__(file, parts, Buffers(room, device), checks)
        # The host waits for the thread that reads, and that for the card: not because the card has nothing to do.
        self.waited_seconds = None
        self.staging = Buffers(room, torch.device("cpu"))
        self._queues = queues
        for memory in (self.staging.one, self.staging.other):
            queues.pin(memory)
        self._used: list[Event] = [queues.share(self.buffers)] * 2
        self._there: list[Event] = [None, None]

    def used(self, buffer: int) -> None:
        """See `Copier`."""
        self._used[buffer] = self._queues.computed()

    def copy(self, part: int, buffer: int) -> None:
        """See `Copier`."""
        self._filling[buffer] = self._reader.submit(self._bring, part, buffer, self._used[buffer])

    def _bring(self, part: int, buffer: int, used: Event) -> None:
        if self._there[buffer] is not None:
            self._queues.finish(self._there[buffer])  # what is copied from this memory
        self._read_into(self.staging[buffer], part)
        within = self._within(part)
        self._there[buffer] = self._queues.copy(self.staging[buffer][within], self.buffers[buffer][within], used)

    def ready(self, buffer: int) -> None:
        """See `Copier`. Waits for the disk, and not for the copy."""
        super().ready(buffer)
        self._queues.compute_after(self._there[buffer])
