"""Weights that are read as they are asked for: the same bits as resident ones, in the order of the passes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.tensors import TensorSpec, read_header, write_tensors
from qlora_tool.ops.linear import frozen_linear
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.quantized import disk_field, disk_group, quantize, to_disk
from qlora_tool.weights.streamed import DiskStream, Part, Place, StreamedHandle


def written(folder: Path, values: list[torch.Tensor]) -> Path:
    """Tensors one after the other in one file, as many parts."""
    file = folder / "parts.safetensors"
    specs = [TensorSpec(str(index), value.dtype, tuple(value.shape)) for index, value in enumerate(values)]
    write_tensors(file, specs, zip(map(str, range(len(values))), values, strict=True), {})
    return file


def parts_of(file: Path) -> list[Part]:
    return [Part(entry.start, entry.stop) for entry in read_header(file).values()]


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[DiskStream, list[torch.Tensor]]:
    """Six parts of unlike, odd sizes."""
    values = [torch.full((5000 + 1001 * index,), index, dtype=torch.uint8) for index in range(6)]
    file = written(tmp_path, values)
    return DiskStream(file, parts_of(file)), values


def ask(stream: DiskStream, values: list[torch.Tensor], *order: int) -> list[int]:
    """Ask for parts, and return the ones that were read from the disk meanwhile."""
    read, plain = [], stream._read
    stream._read = lambda buffer, index: (read.append(index), plain(buffer, index))[1]
    for index in order:
        torch.testing.assert_close(stream.part(index), values[index], rtol=0, atol=0)
    for filling in stream._filling:
        if filling is not None:
            filling.result()
    stream._read = plain
    return read


def test_parts_are_read_ahead_and_once_a_pass(numbers):
    stream, values = numbers
    assert ask(stream, values, 0, 0, 1, 2, 3, 4, 5, 5) == [0, 1, 2, 3, 4, 5]
    assert ask(stream, values, 4, 5) == []


def test_any_order_gives_the_right_parts(numbers):
    stream, values = numbers
    order = torch.randint(6, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    ask(stream, values, *order)


class Layer(nn.Module):
    def __init__(self, handle: WeightHandle):
        super().__init__()
        self.handle = handle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(frozen_linear(x, self.handle))


def test_a_backward_pass_reads_the_preceding_part_ahead(tmp_path):
    weights = [torch.randn(8, 8) for _ in range(5)]
    file = written(tmp_path, weights)
    stream = DiskStream(file, parts_of(file))
    handles = [StreamedHandle(torch.empty(8, 8, device="meta"), {"values": Place(0, torch.float32, (8, 8))}, stream,
                              index) for index in range(5)]  # fmt: skip
    read, plain = [], stream._read
    stream._read = lambda buffer, index: (read.append(index), plain(buffer, index))[1]
    found = []
    for chosen in (handles, [WeightHandle(weight) for weight in weights]):
        x = torch.linspace(-1, 1, 16).view(2, 8).requires_grad_()
        y = x
        for handle in chosen:
            y = torch.utils.checkpoint.checkpoint(Layer(handle), y, use_reentrant=False)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    assert read == [0, 1, 2, 3, 4, 2, 1, 0]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(24, 64), (7, 45), (3, 16, 20)])
def test_a_weight_is_what_it_is_resident(kind, double, shape, tmp_path):
    value = quantize(torch.randn(*shape, generator=torch.Generator().manual_seed(1)), kind, double)
    stored = to_disk("w.weight", value)
    file = tmp_path / "w.safetensors"
    write_tensors(file, [TensorSpec(name, one.dtype, tuple(one.shape)) for name, one in stored.items()],
                  list(stored.items()), {})  # fmt: skip
    entries = read_header(file)
    assert set(disk_group("w.weight", entries)) == set(entries)
    start = min(entry.start for entry in entries.values())
    stream = DiskStream(file, [Part(start, max(entry.stop for entry in entries.values()))])
    fields = {disk_field("w.weight", name): entry for name, entry in entries.items()}
    fields.pop(None, None)
    places = {field: Place(entry.start - start, entry.dtype, tuple(value.tensors()[field].shape))
              for field, entry in fields.items()}  # fmt: skip
    handle = StreamedHandle(value, places, stream, 0)
    assert torch.equal(handle.dense(torch.float32), value.dequantize(torch.float32))
    assert sum(tensor.nbytes for tensor in handle.tensors().values()) <= 4 * max(1, shape[0])  # offsets alone stay
    assert not handle.is_trained and handle.device.type == "cpu" and handle.dtype == value.dtype


def test_a_file_that_ends_early_is_told(tmp_path):
    file = written(tmp_path, [torch.zeros(9000, dtype=torch.uint8)] * 2)
    parts = parts_of(file)
    with file.open("rb+") as opened:
        opened.truncate(file.stat().st_size - 100)
    stream = DiskStream(file, parts)
    stream.part(0)
    with pytest.raises(UserError, match="ends 100 bytes early"):
        stream.part(1)
    with pytest.raises(UserError, match="ends 100 bytes early"):  # and again, not other bytes
        stream.part(1)


def test_a_disk_that_fails_is_told(numbers, monkeypatch):
    stream, values = numbers

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    ask(stream, values, 0)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(MachineError, match=r"cannot be read: Input/output error"):
        stream.part(3)
    monkeypatch.undo()
    ask(stream, values, 3, 2)  # it is gone on with when the disk is there again


def test_without_direct_reads_nothing_changes(numbers, monkeypatch):
    stream, values = numbers
    plain, flags = os.open, []

    def without(path, flag, *rest):
        flags.append(flag)
        if flag & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return plain(path, flag, *rest)

    monkeypatch.setattr(os, "open", without)
    other = DiskStream(stream.file, stream.parts)
    monkeypatch.undo()
    assert len(flags) == 2 and not other._file.direct
    ask(other, values, 0, 1, 2, 3, 4, 5, 3)
