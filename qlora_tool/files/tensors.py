"""safetensors files: small ones in one call by the library, large ones one tensor at a time.

`read_all` and `write_all` serve adapters and checkpoints. Models are streamed: a tensor is written as soon as it is
made, where the library's writer takes all of a file at once; and it is read into a buffer of PyTorch's, where the
library's reader maps the file (every page touched counts as the process's own) or reads into memory of Python's, which
is not aligned to the 64 bytes that oneMKL asks for to give the same bits again.

Format: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.files.atomic import write_json
from qlora_tool.files.reading import parse_json, refuse_other_than_file
from qlora_tool.files.weight_files import INDEX_NAME as INDEX_NAME
from qlora_tool.files.weight_files import SINGLE_NAME as SINGLE_NAME
from qlora_tool.files.weight_files import weight_files
from qlora_tool.sizes import counted

_TRIM_EVERY = 32 << 20  # bytes read

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its file, dtype, shape and the bytes `start` to `stop` of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Checkpoint(Mapping[str, TensorEntry]):
    """The tensors of a model folder by name, from one safetensors file or from shards with an index.

    Raises:
        UserError: no weights in the folder, only pickles, a missing or truncated shard, a broken header.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = weight_files(folder)
        self._entries: dict[str, TensorEntry] = {}
        self._read_bytes = 0  # since freed memory was last given back
        for file in self.files:
            self._entries.update(read_header(file))

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor, read from the disk into a buffer of its own, on `device`."""
        entry = self._entries[name]
        self._read_bytes += entry.nbytes * (4 if entry.dtype.itemsize == 1 else 1)  # it is dequantized from a byte
        if self._read_bytes >= _TRIM_EVERY:
            self._read_bytes = 0
            give_back_freed_memory()
        return read_tensor(entry, device)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())


def give_back_freed_memory() -> None:
    """Let the C library return what was freed to the system. Between the small tensors that stay, glibc keeps the holes
    of the large ones that were read and went: for a small model, more than the model."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to do
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in its order.

    Raises:
        UserError: the library refuses the header, or the file is not as long as its header says; a dtype without
            counterpart in PyTorch.
    """
    refuse_other_than_file(file, "download it again")
    with _refusals(file), safe_open(file, "pt", backend="pread"):
        pass
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, dict[str, Any]] = parse_json(stream.read(length).decode(), str(file), "download it again")
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"{file}: tensor {name} has dtype {entry['dtype']}, which is not supported; convert it to bfloat16 or "
                "another common dtype"
            )
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        entries[name] = TensorEntry(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop)
    return entries


@contextlib.contextmanager
def _refusals(file: Path) -> Iterator[None]:
    """Turn the library's refusal of `file` into a line."""
    try:
        yield
    except SafetensorError as error:
        if _is_pointer(file):
            raise UserError(
                f"{file}: a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`, or download it again"
            ) from error
        reason = " ".join(str(error).split()).removeprefix("Error while deserializing header: ")
        raise UserError(
            f"{file}: truncated, or not a safetensors file ({reason}; "
            f"{counted(file.stat().st_size, 'byte')}); download it again"
        ) from error


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(24).startswith(b"version https://git-lfs.")


def read_tensor(entry: TensorEntry, device: torch.device | str = "cpu") -> Tensor:
    """One tensor, read into a buffer of its own."""
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        view, done = memoryview(buffer.numpy().data), 0
        while done < entry.nbytes:
            count = stream.readinto(view[done:])
            if not count:
                raise UserError(
                    f"{entry.file}: ended {counted(entry.nbytes - done, 'byte')} early while it was read; download it "
                    "again"
                )
            done += count
    return buffer.view(entry.dtype).reshape(entry.shape).to(device)


def read_all(file: Path) -> dict[str, Tensor]:
    """Every tensor of one (small) file, on the CPU, in the order of their names.

    Raises:
        UserError: as `read_header`.
    """
    names = sorted(read_header(file))
    with _refusals(file), safe_open(file, "pt", backend="pread") as stored:
        return {name: stored.get_tensor(name).clone() for name in names}  # a clone's memory is aligned


def write_all(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one (small) file, in the library's order: by dtype, then by name. The caller hands in a path that is
    renamed afterwards, itself or its folder.

    Args:
        tensors: on any device; views and shared memory are written out.
        metadata: with one entry at most, the same tensors give the same bytes; the library shuffles several.

    Raises:
        OSError: the disk refuses.
    """
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(_apart(tensors), file, dict(metadata))
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(file), number) from error
        raise
    file.chmod(mode)  # the library's file is its owner's alone


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous, each in memory of its own: the library refuses others."""
    result: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return result


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    file: Path, specs: Iterable[TensorSpec], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file from a stream of tensors, in the order of `specs`.

    The same input gives the same bytes. The caller hands in a temporary path and renames it.

    Raises:
        ValueError: the stream does not keep to the order, dtypes or shapes announced.
    """
    specs = list(specs)
    expected = iter(specs)
    with file.open("wb") as stream:
        stream.write(encoded_header(specs, metadata))
        for name, tensor in tensors:
            stream.write(tensor_bytes(next(expected, None), name, tensor))
    if next(expected, None) is not None:
        raise ValueError(f"{file}: the stream of tensors ended early")


def write_as_they_come(
    file: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str], room: int
) -> None:
    """Write one safetensors file from a stream of tensors that nobody announces.

    Args:
        file: a temporary path, which the caller renames.
        tensors: by name.
        metadata: see `write_tensors`.
        room: bytes that the header has at most; what it does not need are spaces in it.

    Raises:
        ValueError: there was too little room.
    """
    start, specs = 8 + -(-room // 8) * 8, []
    with file.open("wb") as stream:
        stream.seek(start)
        for name, tensor in tensors:
            specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
            stream.write(tensor_bytes(specs[-1], name, tensor))
        header = encoded_header(specs, metadata)[8:]
        if len(header) > start - 8:
            raise ValueError(f"{file}: a header of {len(header)} bytes; there is room for {start - 8}")
        stream.seek(0)
        stream.write((start - 8).to_bytes(8, "little") + header.ljust(start - 8))


def encoded_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file that holds `specs` in this order, up to where the data begin."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset := offset + spec.nbytes],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins on 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded


def tensor_bytes(spec: TensorSpec | None, name: str, tensor: Tensor) -> memoryview:
    """The data of one tensor as they stand in a file.

    Raises:
        ValueError: it is not the tensor that `spec` announced.
    """
    if spec is None or (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
        raise ValueError(f"announced {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def write_index(folder: Path, names: Sequence[str], cut: Sequence[Sequence[TensorSpec]]) -> None:
    """Write the index of several shards, each named beside what it holds; a single file needs none."""
    if len(names) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, cut, strict=True) for spec in shard}
        total = {"total_size": sum(spec.nbytes for shard in cut for spec in shard)}
        write_json(folder / INDEX_NAME, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def shards(specs: Iterable[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """Cut `specs`, in order, into shards of at most `max_shard_size` bytes (a larger tensor gets its own)."""
    result: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not result or size + spec.nbytes > max_shard_size:
            result.append([])
            size = 0
        result[-1].append(spec)
        size += spec.nbytes
    return result


def shard_name(index: int, count: int) -> str:
    """The name of shard `index`, from 0, of `count`, as transformers names it."""
    return SINGLE_NAME if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def missing_names(names: Iterable[str], present: Mapping[str, object]) -> str:
    """`a, b and 3 more` for an error's line, with the closest name that is present."""
    names = sorted(names)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more + did_you_mean(names[0], present)
