"""A base whose decoder layers lie in pinned host memory, quantized on the device one weight at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_tool.errors import MachineError
from qlora_tool.files.direct_reads import PAGE
from qlora_tool.model.load import Loading
from qlora_tool.model.streamed_base import layer_weights, note_stream
from qlora_tool.ops.free_memory import free_bytes
from qlora_tool.sizes import memory_size
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.on_card import HostStream, Queues
from qlora_tool.weights.quantized import QuantizedTensor
from qlora_tool.weights.streamed import ALIGNMENT, Place, StreamedHandle, to_page

KEPT_FREE = 0.05  # of the host's memory


class HostLayers:
    """The weights of decoder layers, moved to host memory as soon as they are quantized: an `Apart`.

    Args:
        loading: of the model.
        resident: how many of the first layers stay on the device.
        queues: of the model's device.

    Raises:
        MachineError: the host has not the memory, or it cannot be pinned.
    """

    def __init__(self, loading: Loading, resident: int, queues: Callable[[torch.device], Queues]):
        self.loading = loading
        there = set(loading.source.names)
        groups = [[name for name in names if name in there]
                  for names in layer_weights(loading.model, loading.slots, resident).values()]  # fmt: skip
        groups = [group for group in groups if group]
        self._part = {name: index for index, group in enumerate(groups) for name in group}
        self._missing = [len(group) for group in groups]
        self._pieces: list[list[Tensor]] = [[] for _ in groups]  # of a part, until it is complete
        self._sizes = [0] * len(groups)
        self._stream = HostStream(len(groups), loading.device, queues(loading.device)) if groups else None

    def place(self, name: str) -> bool:
        """See `Apart`."""
        if name not in self._part:
            return False
        self.loading.place(name)
        owner, _, attribute = name.rpartition(".")
        handle = getattr(self.loading.model.get_submodule(owner), attribute)
        self.loading.put(name, self._moved(handle, self._part[name]))
        return True

    def _moved(self, handle: WeightHandle, part: int) -> StreamedHandle:
        value, places = handle.stored(), {}
        tensors = value.tensors() if isinstance(value, QuantizedTensor) else {"values": value}
        for field, tensor in tensors.items():
            if field == "nested_offset":
                continue
            places[field] = Place(self._sizes[part], tensor.dtype, tuple(tensor.shape))
            piece = tensor.detach().contiguous().view(-1).view(torch.uint8).to("cpu")
            self._pieces[part].append(piece)
            self._sizes[part] += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
        self._missing[part] -= 1
        if not self._missing[part]:
            self._complete(part)
        assert self._stream is not None
        return StreamedHandle(value, places, self._stream, part, handle.dtype)

    def _complete(self, part: int) -> None:
        """All weights of a part are there: lay them into memory of its own, from where a page begins."""
        assert self._stream is not None
        size = self._sizes[part]
        if not part:
            _refuse_little_memory(size * len(self._sizes))
        memory = torch.empty(-(-size // PAGE) * PAGE + PAGE, dtype=torch.uint8)
        memory, start = memory[to_page(memory) :], 0
        for piece in self._pieces[part]:
            memory[start : start + piece.nbytes] = piece
            start += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
        self._pieces[part] = []
        self._stream.hold(part, memory[:size])

    def finish(self) -> None:
        """See `Apart`."""
        if self._stream is not None:
            self._stream.begin()
            elsewhere = {"host_bytes": self._stream.nbytes, "disk_bytes": 0}
            note_stream(self.loading.model, self._stream.buffers, elsewhere)


def _refuse_little_memory(needed: int) -> None:
    """
    Raises:
        MachineError: the host has not that much.
    """
    free = int(free_bytes(torch.device("cpu")) * (1 - KEPT_FREE))
    if needed > free:
        raise MachineError(f"model.weights: host: the layers take {memory_size(needed)} of host memory, and "
                           f"{memory_size(free)} are free; set model.weights: disk")  # fmt: skip
