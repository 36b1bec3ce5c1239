"""A quantized base that is written layer by layer and read layer by layer: none of it is ever whole in memory.

The file is the one that `cached_base` names. The weights of a decoder layer lie in it one after the other, as a part of
a stream; what comes once in a model (embeddings, the output projection, norms) is read when the model is opened and
stays. So are the first layers, where some are to stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.files.direct_reads import PAGE
from qlora_tool.files.tensors import Checkpoint, TensorEntry, write_as_they_come
from qlora_tool.model.cached_base import disk_tensors, module_tensors
from qlora_tool.model.checkpointing import decoder_layers
from qlora_tool.model.kept_hashes import KeptBase, hashed, write_hashes
from qlora_tool.model.load import Loading, handle_dtype, narrowed
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.model.slots import quantize_parameter
from qlora_tool.ops.declare import target_of
from qlora_tool.weights.handles import WeightHandle
from qlora_tool.weights.on_card import DiskToCardStream, Queues
from qlora_tool.weights.quantized import QuantizedTensor, disk_field, disk_group, disk_specs, from_disk, quantize
from qlora_tool.weights.streamed import ALIGNMENT, Buffers, DiskStream, NoStream, Part, Place, StreamedHandle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEADER_BYTES = 640  # a tensor's at most, of which a weight in 4 bits has six


def layer_weights(model: PreTrainedModel, slots: Mapping[str, object], resident: int = 0) -> dict[str, list[str]]:
    """The weights behind handles of each decoder layer, by the layer's name, in the order of a forward pass; without
    the first `resident` of them."""
    tied = tied_names(model)
    shared = tied.keys() | set(tied.values())
    found = {layer: [name for name in slots if name.startswith(f"{layer}.") and name not in shared]
             for layer in decoder_layers(model)}  # fmt: skip
    return dict([(layer, names) for layer, names in found.items() if names][resident:])


def stored_bytes(loading: Loading) -> int:
    """What the file of a base takes: its layers as they are stored, and all else in at most the dtype that it has."""
    source = loading.source
    layers = {name for group in layer_weights(loading.model, loading.slots).values() for name in group}
    return sum(
        _disk_bytes(_stored_form(loading, name)) if name in layers
        else math.prod(source.shapes[name]) * source.stored_dtype(name).itemsize
        for name in source.names
    )  # fmt: skip


def write_layer_by_layer(loading: Loading, file: Path, others: Callable[[], Sequence[str]] = tuple) -> PreTrainedModel:
    """Quantize a base into a file, one weight in memory at a time, and write its hashes beside it.

    Args:
        loading: of the model.
        file: that is written.
        others: writes more files beside it, and names them.

    Returns:
        The model without the weights of its layers, on meta or missing.
    """
    there = set(loading.source.names)
    groups = layer_weights(loading.model, loading.slots).values()
    streamed = dict.fromkeys(name for group in groups for name in group if name in there)
    loaded: list[PreTrainedModel] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in streamed:
            loading.place(name)
            owner, _, attribute = name.rpartition(".")
            module = loading.model.get_submodule(owner)
            handle = getattr(module, attribute)
            yield from disk_tensors(name, handle, module)
            delattr(module, attribute)
        for name in loading.source.names:
            if name not in streamed:
                loading.place(name)
        loaded.append(loading.finish())
        yield from module_tensors(loaded[0])

    hashes: dict[str, str] = {}
    write_as_they_come(file, hashed(tensors(), hashes), {"format": "pt"}, room=_HEADER_BYTES * 8 * len(there))
    write_hashes(file.parent, hashes, others())
    return loaded[0]


@dataclass(frozen=True)
class _Streamed:
    """A weight's tensors in the file, those that are streamed by their fields."""

    entries: Mapping[str, TensorEntry]
    streamed: Mapping[str, str]

    @property
    def span(self) -> Part:
        own = self.entries.values()
        return Part(min(entry.start for entry in own), max(entry.stop for entry in own))


class StreamedLayers:
    """The weights of decoder layers that a stream gives: an `Apart`.

    Args:
        loading: of the model.
        handles: by parameter.
        buffers: that they come to; None where there is nothing to stream.
        elsewhere: bytes that are not on the device, `host_bytes` and `disk_bytes`.
        disk: what reads them from there, if anything does.
    """

    def __init__(
        self, loading: Loading, handles: Mapping[str, WeightHandle], buffers: Buffers | None,
        elsewhere: Mapping[str, int], disk: DiskStream | None = None,
    ) -> None:  # fmt: skip
        self.loading, self.handles, self.buffers, self.elsewhere = loading, handles, buffers, elsewhere
        self.disk = disk

    def place(self, name: str) -> bool:
        """See `Apart`."""
        if name not in self.handles:
            return False
        self.loading.put(name, self.handles[name])
        return True

    def finish(self) -> None:
        """See `Apart`. What counts a model's bytes finds these on it."""
        note_stream(self.loading.model, self.buffers, self.elsewhere, self.disk)


def note_stream(
    model: PreTrainedModel, buffers: Buffers | None, elsewhere: Mapping[str, int], disk: DiskStream | None = None
) -> None:
    """Note on a model where the weights are that are streamed to it."""
    if buffers is not None:
        model.weight_stream, model.weights_disk = buffers, disk
        model.weights_elsewhere = dict(elsewhere)


def disk_of(model: PreTrainedModel) -> DiskStream | None:
    """What reads a model's weights from the disk while it computes; None where nothing does."""
    return getattr(model, "weights_disk", None)


def weights_elsewhere(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of weights that are streamed to a model, `host_bytes` and `disk_bytes`; empty where none are."""
    return getattr(model, "weights_elsewhere", {})


def streamed_layer_bytes(model: PreTrainedModel) -> tuple[int, ...]:
    """What is brought of each layer that is streamed to a model, in the order of a forward pass."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, StreamedHandle):
            part, size = module.place
            sizes[part] = sizes.get(part, 0) + size
    return tuple(sizes[part] for part in sorted(sizes))


def streamed_handles(
    loading: Loading, cached: Checkpoint, resident: int = 0, queues: Callable[[torch.device], Queues] | None = None
) -> StreamedLayers:
    """The weights of decoder layers, streamed from a cached base.

    Args:
        loading: of the model.
        cached: the base.
        resident: how many of the first layers stay on the device.
        queues: of the model's device, where that is not the CPU.
    """
    (file,) = cached.files
    checks: list[Callable[[memoryview], None] | None] = []
    found: dict[str, list[tuple[str, _Streamed]]] = {}
    for layer, names in layer_weights(loading.model, loading.slots, resident).items():
        own = {name: entry for name, entry in cached.items() if name.startswith(f"{layer}.")}
        found[layer] = [(name, _of(name, own)) for name in names if name in own]
    parts = [Part(min(one.span.start for _, one in group), max(one.span.stop for _, one in group))
             for group in found.values() if group]  # fmt: skip
    if not parts:
        return StreamedLayers(loading, {}, None, {})
    if isinstance(cached, KeptBase):
        checks = [cached.check_of([one for _, weight in group for one in weight.entries], part.start)
                  for group, part in zip((group for group in found.values() if group), parts, strict=True)]  # fmt: skip
    elsewhere = {"host_bytes": 0, "disk_bytes": sum(part.stop - part.start for part in parts)}
    if queues is None:
        stream = DiskStream(file, parts, checks=checks)
    else:
        stream = DiskToCardStream(file, parts, loading.device, queues(loading.device), checks)
        elsewhere["host_bytes"] = stream.staging.one.nbytes + stream.staging.other.nbytes
    handles: dict[str, WeightHandle] = {
        name: _handle(loading, cached, name, one, stream, index)
        for index, group in enumerate(group for group in found.values() if group) for name, one in group
    }
    return StreamedLayers(loading, handles, stream.buffers, elsewhere, stream)


def _of(name: str, entries: Mapping[str, TensorEntry]) -> _Streamed:
    group = disk_group(name, entries)
    if not group:
        return _Streamed({name: entries[name]}, {"values": name})
    fields = {field: one for one in group if (field := disk_field(name, one)) is not None}
    return _Streamed({one: entries[one] for one in group}, fields)


def _handle(
    loading: Loading, cached: Checkpoint, name: str, weight: _Streamed, stream: DiskStream, part: int
) -> StreamedHandle:
    unread = set(weight.streamed.values())
    tensors = {one: _unread(entry) if one in unread else cached.read(one) for one, entry in weight.entries.items()}
    start, dtype = stream.parts[part].start, handle_dtype(loading.model, name, loading.compute_dtype)
    if "values" in weight.streamed:
        value, entry = tensors[name], weight.entries[name]
        turned = loading.slots[name].transposed
        place = Place(entry.start - start, entry.dtype, entry.shape, turned)
        return StreamedHandle(value.transpose(-1, -2) if turned else value, {"values": place}, stream, part, dtype)
    quantized = from_disk(name, tensors)
    if quantized.nested_offset is not None:
        quantized = replace(quantized, nested_offset=quantized.nested_offset.to(loading.device))
    fields = quantized.tensors()
    places = {field: Place(weight.entries[one].start - start, weight.entries[one].dtype, tuple(fields[field].shape))
              for field, one in weight.streamed.items()}  # fmt: skip
    return StreamedHandle(quantized, places, stream, part, dtype)


def _unread(entry: TensorEntry) -> Tensor:
    """A tensor of its dtype and shape that takes no memory."""
    return torch.zeros((), dtype=entry.dtype).expand(entry.shape)


def unread_handles(loading: Loading, where: str = "disk", resident: int = 0) -> StreamedLayers:
    """The weights of decoder layers as `streamed_handles` or `HostLayers` would give them, where only shapes count.

    Args:
        loading: of the model.
        where: the layers are: host or disk.
        resident: see `streamed_handles`.
    """
    weights = {layer: {name: _stored_form(loading, name) for name in names if name in loading.source.shapes}
               for layer, names in layer_weights(loading.model, loading.slots, resident).items()}  # fmt: skip
    if not weights:
        return StreamedLayers(loading, {}, None, {})
    size_of = _disk_bytes if where == "disk" else host_bytes
    sizes = [sum(size_of(value) for value in group.values()) for group in weights.values()]
    if loading.prepare is not None and where == "disk":
        # Made when the file is written, each from the weight before it is quantized.
        for name in (name for group in weights.values() for name in group):
            slot = loading.slots[name]
            quantize_parameter(name, loading.source.read(name), slot, loading.quantization, loading.prepare)
    room = max(Part(0, size).room if where == "disk" else size for size in sizes)
    stream = NoStream(room, loading.device)
    staging = 2 * (room + PAGE) if target_of(torch.empty(0, device=loading.device)).type == "cuda" else 0
    elsewhere = {"host_bytes": staging, "disk_bytes": sum(sizes)}
    if where == "host":
        elsewhere = {"host_bytes": sum(sizes), "disk_bytes": 0}
    handles: dict[str, WeightHandle] = {
        name: _unread_handle(loading, name, value, stream, index)
        for index, group in enumerate(weights.values()) for name, value in group.items()
    }
    if loading.prepare is not None and where == "host":
        return _ReadOnce(loading, handles, stream.buffers, elsewhere)
    return StreamedLayers(loading, handles, stream.buffers, elsewhere)


class _ReadOnce(StreamedLayers):
    """The same, each weight read, prepared and quantized before it goes where it is streamed from."""

    def place(self, name: str) -> bool:
        """See `Apart`."""
        if name in self.handles:
            self.loading.place(name)
        return super().place(name)


def _stored_form(loading: Loading, name: str) -> QuantizedTensor | Tensor:
    """A weight as it is stored, on meta; under a prediction's modes it is none of what the run makes."""
    with _disable_current_modes():
        return _on_meta(loading, name)


def _on_meta(loading: Loading, name: str) -> QuantizedTensor | Tensor:
    shape, slot = loading.source.shapes[name], loading.slots[name]
    shape = (*shape[:-2], *shape[-2:][::-1]) if slot.transposed else shape
    kind = slot.kind or loading.quantization.kind
    if kind == "none":
        # The configuration's dtype would not do: the skeleton has the products'.
        dtype = loading.source.stored_dtype(name)
        return narrowed(torch.empty(shape, dtype=dtype, device="meta"), loading.compute_dtype)
    stored = torch.empty(shape, dtype=loading.compute_dtype, device="meta")
    return quantize(stored, kind, loading.quantization.double_quant)


def _disk_bytes(value: QuantizedTensor | Tensor) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in disk_specs("", value).values())


def host_bytes(value: QuantizedTensor | Tensor) -> int:
    """What a weight takes in a part that lies in host memory."""
    sizes = [tensor.nbytes for field, tensor in _tensors(value).items() if field != "nested_offset"]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _tensors(value: QuantizedTensor | Tensor) -> dict[str, Tensor]:
    return {"values": value} if isinstance(value, Tensor) else value.tensors()


def _unread_handle(
    loading: Loading, name: str, value: QuantizedTensor | Tensor, stream: NoStream, part: int
) -> StreamedHandle:
    places, offset = {}, 0
    for field, tensor in _tensors(value).items():
        if field != "nested_offset":
            places[field] = Place(offset, tensor.dtype, tuple(tensor.shape))
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    if isinstance(value, QuantizedTensor) and value.nested_offset is not None:
        value = replace(value, nested_offset=torch.zeros(value.nested_offset.shape, device=loading.device))
    return StreamedHandle(value, places, stream, part, handle_dtype(loading.model, name, loading.compute_dtype))
