"""safetensors shards written so that a killed export goes on with the tensor it stopped at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from qlora_tool.export.staging import GrowingFile, Staging
from qlora_tool.files.tensors import (
    TensorSpec,
    encoded_header,
    read_header,
    shard_name,
    shards,
    tensor_bytes,
    write_index,
    write_tensors,
)


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
    write_index(staging.folder, names, cut)
    return names


def write_at_once(
    specs: list[TensorSpec], tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_size: int
) -> list[str]:
    """Write all tensors in order into a folder, nothing being kept of a run that is stopped.

    Returns:
        The names of the files.
    """
    cut = shards(specs, max_shard_size)
    names = [shard_name(index, len(cut)) for index in range(len(cut))]
    for name, shard in zip(names, cut, strict=True):
        stream = (tensor for _, tensor in zip(shard, tensors, strict=False))
        write_tensors(folder / name, shard, stream, {"format": "pt"})
    write_index(folder, names, cut)
    return names


def _write_rest(file: GrowingFile, specs: Sequence[TensorSpec], stream: Iterator[tuple[str, Tensor]]) -> None:
    """Write each tensor while the next one is made."""
    with ThreadPoolExecutor(1) as writer:
        writing: Future | None = None
        for spec in specs:
            data = tensor_bytes(spec, *next(stream))
            if writing is not None:
                writing.result()
            writing = writer.submit(file.write, data)
        if writing is not None:
            writing.result()


def _written(file: GrowingFile, shard: Sequence[TensorSpec]) -> int:
    """How many tensors of the shard are in the file; writes the header where there is none yet."""
    header = encoded_header(shard, {"format": "pt"})
    if file.size == 0:
        file.write(header)
    position, count = len(header), 0
    while count < len(shard) and position + shard[count].nbytes <= file.size:
        position += shard[count].nbytes
        count += 1
    if position != file.size:  # it is saved after whole tensors alone
        raise ValueError(f"a shard that ends in the middle of a tensor, at {file.size} bytes")
    return count


def _check(file: Path, shard: Sequence[TensorSpec]) -> None:
    """Read the finished file's header back: its tensors, and the file as long as they are."""
    found = [(name, entry.dtype, entry.shape) for name, entry in read_header(file).items()]
    if found != [(spec.name, spec.dtype, spec.shape) for spec in shard]:
        raise ValueError(f"{file}: holds other tensors than were written")
