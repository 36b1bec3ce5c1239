"""safetensors shards written so that a killed export goes on with the tensor it stopped at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from qlora_tool.export.staging import GrowingFile, Staging
from qlora_tool.files import write_json
from qlora_tool.model.tensor_files import _DTYPE_NAMES, INDEX_NAME, TensorSpec, read_header, shard_name, shards


def write_shards(
    staging: Staging,
    specs: Sequence[TensorSpec],
    stream_from: Callable[[int], Iterator[tuple[str, Tensor]]],
    max_shard_size: int,
) -> list[str]:
    """Write all tensors in order, two of them in memory at a time; the index too where there are several files.

    Args:
        staging: what is there already is kept.
        specs: of all tensors.
        stream_from: gives the tensors from the one with this index on.
        max_shard_size: bytes of a file at most.

    Returns:
        The names of the files.
    """
    cut = shards(specs, max_shard_size)
    names = [shard_name(index, len(cut)) for index in range(len(cut))]
    stream, first = None, 0
    for name, shard in zip(names, cut, strict=True):
        if staging.done(name):
            stream = None
        else:
            with staging.grow(name) as file:
                written = _written(file, shard)
                stream = stream or stream_from(first + written)
                _write_rest(file, shard[written:], stream)
            _check(staging.folder / name, shard)
        first += len(shard)
    if len(cut) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, cut, strict=True) for spec in shard}
        metadata = {"total_size": sum(spec.nbytes for spec in specs)}
        write_json(staging.folder / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return names


def _write_rest(file: GrowingFile, specs: Sequence[TensorSpec], stream: Iterator[tuple[str, Tensor]]) -> None:
    """Write each tensor while the next one is made."""
    with ThreadPoolExecutor(1) as writer:
        writing: Future | None = None
        for spec in specs:
            data = _bytes_of(spec, *next(stream))
            if writing is not None:
                writing.result()
            writing = writer.submit(file.write, data)
        if writing is not None:
            writing.result()


def _written(file: GrowingFile, shard: Sequence[TensorSpec]) -> int:
    """How many tensors of the shard are in the file; writes the header where there is none yet."""
    header = _header(shard)
    if file.size == 0:
        file.write(header)
    position, count = len(header), 0
    while count < len(shard) and position + shard[count].nbytes <= file.size:
        position += shard[count].nbytes
        count += 1
    if position != file.size:  # it is saved after whole tensors alone
        raise ValueError(f"a shard that ends in the middle of a tensor, at {file.size} bytes")
    return count


def _header(shard: Sequence[TensorSpec]) -> bytes:
    """The beginning of a safetensors file, as `tensor_files.write_tensors` writes it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in shard:
        offsets = [offset, offset := offset + spec.nbytes]
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins on 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded


def _bytes_of(spec: TensorSpec, name: str, tensor: Tensor) -> memoryview:
    if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
        raise ValueError(f"announced {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
    return memoryview(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


def _check(file: Path, shard: Sequence[TensorSpec]) -> None:
    """Read the finished file's header back: its tensors, and the file as long as they are."""
    found = [(name, entry.dtype, entry.shape) for name, entry in read_header(file).items()]
    if found != [(spec.name, spec.dtype, spec.shape) for spec in shard]:
        raise ValueError(f"{file}: holds other tensors than were written")
