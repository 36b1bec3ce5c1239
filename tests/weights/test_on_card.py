"""Weights copied to a device while it computes: no part is overwritten while it is in use, none is used before it is
there, whatever the two queues of the device do in which order; without a device."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from qlora_tool.errors import MachineError
from qlora_tool.files.tensors import TensorSpec, read_header, write_tensors
from qlora_tool.weights.on_card import CudaQueues, DiskToCardStream, HostStream, unpinnable
from qlora_tool.weights.streamed import Part

CPU = torch.device("cpu")
SIZES = [5000, 6001, 5000, 7003, 100, 6000, 5501]


class Lagging:
    """Two queues that do what they are asked for later, in any order that their events allow.

    Args:
        seed: of the order.
        forgotten: which of the methods' waits are left out, to see that the test sees it.
    """

    def __init__(self, seed: int, forgotten: str = ""):
        self.random, self.forgotten = random.Random(seed), forgotten
        self.queues: dict[str, list] = {"computing": [], "copying": []}
        self.happened: set[int] = set()
        self.events, self.pinned = 0, []

    def _event(self, queue: str) -> int:
        self.events += 1
        event = self.events
        self.queues[queue].append((None, lambda: self.happened.add(event)))
        return event

    def share(self, _buffers) -> int:
        return self.computed()

    def computed(self) -> int:
        return self._event("computing")

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: int) -> int:
        assert source.data_ptr() >= 0 and any(source.untyped_storage().data_ptr() == held for held in self.pinned)
        waits = None if self.forgotten == "copy" else after
        self.queues["copying"].append((waits, lambda: target.copy_(source)))
        return self._event("copying")

    def compute_after(self, event: int) -> None:
        if self.forgotten != "compute_after":
            self.queues["computing"].append((event, lambda: None))

    def finish(self, event: int) -> None:
        if self.forgotten != "finish":
            while event not in self.happened:
                self.step()

    def pin(self, memory: torch.Tensor) -> None:
        self.pinned.append(memory.untyped_storage().data_ptr())

    def compute(self, action) -> None:
        self.queues["computing"].append((None, action))

    def step(self) -> bool:
        """Do what comes next in one of the queues that do not wait; False where both are empty."""
        able = [queue for queue in self.queues.values() if queue and (queue[0][0] in self.happened or not queue[0][0])]
        assert able or not any(self.queues.values()), "both queues wait for ever"
        if able:
            _, action = self.random.choice(able).pop(0)
            action()
        return bool(able)

    def some(self) -> None:
        for _ in range(self.random.choice([0, 0, 1, 2, 5, 30])):
            self.step()


def numbers() -> list[torch.Tensor]:
    return [torch.full((size,), index + 1, dtype=torch.uint8) for index, size in enumerate(SIZES)]


def from_host(_folder: Path, queues: Lagging) -> HostStream:
    stream = HostStream(len(SIZES), CPU, queues)
    for index, part in enumerate(numbers()):
        stream.hold(index, part)
    stream.begin()
    return stream


def from_disk(folder: Path, queues: Lagging) -> DiskToCardStream:
    file, values = folder / "parts.safetensors", numbers()
    if not file.exists():
        specs = [TensorSpec(str(index), value.dtype, tuple(value.shape)) for index, value in enumerate(values)]
        write_tensors(file, specs, zip(map(str, range(len(values))), values, strict=True), {})
    return DiskToCardStream(file, [Part(entry.start, entry.stop) for entry in read_header(file).values()], CPU, queues)


def wrong_bytes(stream, queues: Lagging, order: list[int], at_once: bool) -> int:
    """How many of the parts, asked for in an order and computed with later, were not what they should be.

    Args:
        at_once: let the thread that reads be done each time, as the queues here are no threads' to share.
    """
    wrong = []

    def check(index: int, part: torch.Tensor) -> None:
        wrong.extend([index] * (not torch.equal(part, numbers()[index])))

    for index in order:
        part = stream.part(index)
        for _ in range(2):  # two products with weights of the same part
            queues.compute(lambda index=index, part=part: check(index, part))
        if at_once:
            for filling in stream._filling:
                if filling is not None:
                    filling.result()
        queues.some()
    while queues.step():
        pass
    return len(wrong)


def passes(seed: int) -> list[int]:
    """Three forward passes, the second of which jumps about."""
    order = list(range(len(SIZES)))
    return [*order, 0, 4, 2, 2, 6, 5, 0, *order, *random.Random(seed).choices(order, k=5)]


@pytest.mark.parametrize("made", [from_host, from_disk])
def test_every_order_of_the_queues_gives_the_right_bytes(made, tmp_path):
    for seed in range(40):
        queues = Lagging(seed)
        assert wrong_bytes(made(tmp_path, queues), queues, passes(seed), made is from_disk) == 0


@pytest.mark.parametrize(("made", "forgotten"), [
    (from_host, "copy"), (from_host, "compute_after"), (from_disk, "copy"), (from_disk, "compute_after"),
    (from_disk, "finish"),
])  # fmt: skip
def test_a_wait_that_is_forgotten_is_seen(made, forgotten, tmp_path):
    found = 0
    for seed in range(40):
        queues = Lagging(seed, forgotten)
        found += wrong_bytes(made(tmp_path, queues), queues, passes(seed), made is from_disk)
    assert found > 0


@pytest.mark.parametrize("made", [from_host, from_disk])
def test_a_use_that_is_not_told_is_seen(made, tmp_path, monkeypatch):
    """The schedule's own word that a buffer has been used, left out."""
    monkeypatch.setattr(HostStream, "used", lambda *_: None)
    monkeypatch.setattr(DiskToCardStream, "used", lambda *_: None)
    found = 0
    for seed in range(40):
        queues = Lagging(seed)
        found += wrong_bytes(made(tmp_path, queues), queues, passes(seed), made is from_disk)
    assert found > 0


def test_nothing_waits_on_the_host_for_what_is_in_host_memory(tmp_path):
    queues = Lagging(0)
    queues.finish = None  # nothing calls it
    stream = from_host(tmp_path, queues)
    for index in [*range(len(SIZES)), 3, 1]:
        stream.part(index)
    assert not queues.happened  # nothing was done yet, and nothing had to be
    assert stream.nbytes == sum(SIZES)


def test_memory_that_cannot_be_pinned_is_told(tmp_path, monkeypatch):
    class Cudart:
        cudaHostRegister = staticmethod(lambda *_: 2)  # cudaErrorMemoryAllocation

    queues = object.__new__(CudaQueues)
    queues._pinned = []
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    with pytest.raises(MachineError, match=r"9\.5 MiB more of host memory cannot be pinned .*error 2.*weights: disk"):
        HostStream(1, CPU, queues).hold(0, torch.zeros(10_000_000, dtype=torch.uint8))
    assert not queues._pinned
    assert "two layers alone" in str(unpinnable(1, "no"))
