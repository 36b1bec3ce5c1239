"""What each storage of a trace was: weights, gradients, activations or temporaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_tool.memory.trace.timeline import Event, Timeline
from qlora_tool.model.sharding import local
from qlora_tool.weights.handles import model_tensors

if TYPE_CHECKING:
    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.memory.trace.tracer import Storage, Trace, Tracer
    from qlora_tool.training.optimizers import Optimizer

_CATEGORIES = {"codes": "base_weights", "quantization_state": "quantization_state", "unquantized": "other_weights"}


def name_weights(tracer: Tracer, module: nn.Module, adapters: AdapterSet) -> None:
    """Tell the storages of the model's tensors apart."""
    for tensor, category in weights_by_category(module, adapters.parameters()):
        storage = tracer.adopt(tensor)
        storage.category = storage.category or category


def weights_by_category(module: nn.Module, trained: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, str]]:
    """What is trained, and every other tensor of a model, with their parts of the breakdown; of one that is shared out
    what this process holds."""
    seen = set()
    for parameter in trained:
        seen.add(id(parameter))
        yield parameter, "adapter_weights"
    for _, tensor, role in model_tensors(module):
        if id(tensor) not in seen:
            yield local(tensor), _CATEGORIES[role]


def name_optimizer(tracer: Tracer, optimizer: Optimizer) -> None:
    """The storages of the optimizer's state."""
    for tensor in optimizer.state_tensors():
        storage = tracer.adopt(tensor)
        storage.category = storage.category or "optimizer_state"
    for tensor in optimizer.paged_tensors():
        tracer.adopt(tensor).paged = True


def name_gradients(tracer: Tracer, optimizer: Optimizer) -> None:
    """The storages of the gradients, once backward is done."""
    for gradient in optimizer.gradients():
        if (storage := tracer.storage_of(gradient)) is not None:
            storage.category = storage.category or "gradients"


def part_of(storage: Storage) -> str:
    """One of PARTS. What no one named is told by its life: what outlives the forward pass it was born in is an
    activation, as is what recomputation leaves behind; the rest is temporary."""
    if storage.category:
        return storage.category
    if storage.phase == "forward" and (storage.died_in != "forward" or storage.died_in_step != storage.step):
        return "saved"
    if storage.recomputed:
        return "recomputed"
    return "temporaries"


def timeline(trace: Trace) -> Timeline:
    """The trace as bytes by part over time."""
    return Timeline.from_events(
        Event(part_of(storage), sign * storage.nbytes, phase, storage.module, storage.operator)
        for (storage, sign), phase in zip(trace.events, trace.phases(), strict=True)
    )
