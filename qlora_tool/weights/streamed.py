"""Frozen weights that stay on the disk while a model computes, read a part at a time.

A part is a run of bytes of one file, with the tensors of weights that are asked for together: those of a decoder layer.
Two buffers hold two parts (`schedule.py`); a thread fills one while what computes uses the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_tool.files.direct_reads import PAGE, DirectFile
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.quantized import QuantizedTensor
from qlora_tool.weights.schedule import Schedule

ALIGNMENT = 64  # of a tensor's first byte, for which products give the same bits whatever they are given


class Part(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    start: int
    stop: int

    def paged(self) -> tuple[int, int]:
        """The pages that they lie in: the first byte, and how many bytes there are."""
        first = self.start // PAGE * PAGE
        return first, -(-(self.stop - first) // PAGE) * PAGE

    @property
    def room(self) -> int:
        """What they take in pages, wherever the first one begins."""
        return -(-(self.stop - self.start) // PAGE) * PAGE + PAGE


class Place(NamedTuple):
    """Where a tensor lies in a part: its first byte there, its dtype and shape, and whether it lies there as (…, in,
    out), the other way round."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def of(self, part: Tensor) -> Tensor:
        """The tensor, a view where it is aligned."""
        found = part[self.offset : self.offset + self.nbytes]
        first = part.storage_offset() + self.offset  # of memory that begins on `ALIGNMENT`
        if first % self.dtype.itemsize:
            found = found.clone()  # a view of another dtype would be refused
        found = found.view(self.dtype).view(self.shape)
        if self.transposed:
            return found.transpose(-1, -2).contiguous()
        return found.clone() if first % ALIGNMENT and self.dtype.is_floating_point else found


class Buffers(nn.Module):
    """Where two parts are held; a module, so that what counts a model's tensors finds them.

    Args:
        size: of a part at most, in pages.
        device: of the buffers.
    """

    tensor_role = "codes"
    one: Tensor
    other: Tensor

    def __init__(self, size: int, device: torch.device):
        super().__init__()
        for name in ("one", "other"):
            self.register_buffer(name, torch.empty(size + PAGE, dtype=torch.uint8, device=device), persistent=False)

    def __getitem__(self, index: int) -> Tensor:
        """A buffer, from where a page begins."""
        memory = self.other if index else self.one
        return memory[to_page(memory) :]


def to_page(memory: Tensor) -> int:
    """Bytes up to the next page; 0 of tensors without values."""
    return 0 if isinstance(memory, FakeTensor) else -memory.data_ptr() % PAGE


class Stream(Protocol):
    """What gives the parts.

    Attributes:
        buffers: that they come to.
    """

    buffers: Buffers

    def part(self, index: int) -> Tensor:
        """The bytes of a part, uint8; they are another part's once two others have been asked for."""
        ...


Check = Callable[[memoryview], None] | None
"""Takes the bytes of a part, and raises where they are not what they should be; None: nothing is known of them."""


class DiskStream:
    """Parts of a file, read past the page cache where the file system lets them be.

    Args:
        file: that holds them.
        parts: in the order of a forward pass.
        buffers: that they come to; None: two on the CPU, each large enough for the largest.
        checks: of the parts, each made when its part is read first.

    Attributes:
        read_bytes, read_seconds: from the disk so far, and what the reading took.
        waited_seconds: of these, what computing waited for; None where the host does not see that.

    Raises:
        MachineError: while it is read: the disk fails.
        UserError: the file ends early.
    """

    def __init__(
        self, file: Path, parts: Sequence[Part], buffers: Buffers | None = None, checks: Sequence[Check] = ()
    ):
        self.file, self.parts = file, list(parts)
        self._checks = dict(enumerate(checks))
        self.read_bytes, self.read_seconds = 0, 0.0
        self.waited_seconds: float | None = 0.0
        self._file = DirectFile(file)
        self.buffers = buffers or Buffers(max(part.room for part in parts), torch.device("cpu"))
        self._filling: list[Future[None] | None] = [None, None]
        self._schedule = Schedule(len(self.parts), self)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._lock = threading.Lock()

    def part(self, index: int) -> Tensor:
        """See `Stream`."""
        with self._lock:
            buffer = self._schedule.ask(index, in_backward())
            return self.buffers[buffer][self._within(index)]

    def _within(self, index: int) -> slice:
        """Where a part lies in what was read of it."""
        start, stop = self.parts[index]
        first = self.parts[index].paged()[0]
        return slice(start - first, stop - first)

    def used(self, buffer: int) -> None:
        """Nothing: on a CPU what was asked for has been computed."""

    def copy(self, part: int, buffer: int) -> None:
        """Begin to read."""
        self._filling[buffer] = self._reader.submit(self._read, buffer, part)

    def ready(self, buffer: int) -> None:
        """Wait for the disk."""
        filling, self._filling[buffer] = self._filling[buffer], None
        if filling is not None:
            begin = time.perf_counter()
            filling.result()
            if self.waited_seconds is not None:
                self.waited_seconds += time.perf_counter() - begin

    def _read(self, buffer: int, index: int) -> None:
        self._read_into(self.buffers[buffer], index)

    def _read_into(self, memory: Tensor, index: int) -> None:
        first, size = self.parts[index].paged()
        needed = self.parts[index].stop - first
        begin = time.perf_counter()
        self.read_bytes += self._file.read_into(memoryview(memory.numpy().data)[:size], first, needed)
        self.read_seconds += time.perf_counter() - begin
        if (check := self._checks.pop(index, None)) is not None:
            check(memoryview(memory.numpy().data)[self._within(index)])
        self._file.drop(first, size)


def in_backward() -> bool:
    """Whether a backward pass is running in this thread, what it recomputes included."""
    return torch._C._current_graph_task_id() >= 0


class NoStream:
    """Stands in for a stream where only shapes count: a part is what a buffer happens to hold.

    Args:
        room: of a buffer.
        device: of the buffers.
    """

    def __init__(self, room: int, device: torch.device):
        self.buffers = Buffers(room, device)

    def part(self, index: int) -> Tensor:
        """See `Stream`."""
        return self.buffers[0]


class StreamedHandle(WeightHandle):
    """The handle of a weight that lies in a part of a stream.

    Args:
        value: the weight; of tensors that are streamed only shape and dtype are looked at.
        places: where the streamed tensors lie in the part, by `QuantizedTensor`'s fields, or as `values`.
        stream: that the part is of.
        part: which one.
        dtype: see `WeightHandle`.
    """

    _places: dict[str, Place]
    _stream: Stream
    _part: int

    def __init__(
        self, value: QuantizedTensor | Tensor, places: Mapping[str, Place], stream: Stream, part: int,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.__dict__.update(_places=dict(places), _stream=stream, _part=part)
        super().__init__(value, dtype)

    @property
    def place(self) -> tuple[int, int]:
        """The part that it lies in, and the bytes that are streamed of it."""
        return self._part, sum(place.nbytes for place in self._places.values())

    def _store(self, tensors: Mapping[str, Tensor]) -> None:
        super()._store({name: tensor for name, tensor in tensors.items() if name not in self._places})

    def _fetch(self) -> dict[str, Tensor]:
        part = self._stream.part(self._part)
        return super()._fetch() | {name: place.of(part) for name, place in self._places.items()}

    @property
    def device(self) -> torch.device:
        """Where `dense` gives the weight."""
        return self._stream.buffers.one.device

    @property
    def is_trained(self) -> bool:
        """False: what is trained is resident."""
        return False

    def hold(self, dtype: torch.dtype) -> None:
        """Nothing: all weights together would be the whole model."""
