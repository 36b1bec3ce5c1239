"""What a training step takes on a CUDA device: the same run with random weights, watched by PyTorch's own allocator.

No tracer is near it. The allocator records every allocation and free with its address; meanwhile it is noted how many
there were when a phase began, and at which addresses weights, gradients, checkpoint boundaries and the optimizer's
state lay. Put together afterwards, they make the same `Trace` that a tracer makes on a CPU.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_tool.errors import UserError
from qlora_tool.files.atomic import replacing_file
from qlora_tool.memory.allocator.blocks import round_size
from qlora_tool.memory.allocator.calibrate import LARGEST_CONTEXT, context_bytes
from qlora_tool.memory.allocator.operators import cublas_workspace
from qlora_tool.memory.breakdown import Breakdown
from qlora_tool.memory.trace.classify import timeline, weights_by_category
from qlora_tool.memory.trace.predict import BatchShape, Watch, trial_run
from qlora_tool.memory.trace.timeline import Timeline
from qlora_tool.memory.trace.tracer import Storage, Trace

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.config import Config
    from qlora_tool.model.causal_lm import CausalLM
    from qlora_tool.model.checkpointing import Recomputation
    from qlora_tool.training.optimizers import Optimizer

KEPT_OF_A_SNAPSHOT = ("action", "addr", "size", "stream")


@dataclass(frozen=True)
class CudaMeasurement:
    """What a run took on a CUDA device.

    Attributes:
        device_name: as `torch.cuda.get_device_name` says it.
        breakdown: the peaks are the allocator's own counts; the parts at the peak are told from its history, and what
            is not in it (rounding) is `framework`.
        snapshot: `torch.cuda.memory._snapshot()` after the run, without stacks.
    """

    device_name: str
    breakdown: Breakdown
    snapshot: dict[str, Any] = field(repr=False)


def measure_on_cuda(
    config: Config, model_config, shape: BatchShape, compute_dtype: torch.dtype,
    recomputation: Recomputation | None = None, device: int = 0,
) -> CudaMeasurement:  # fmt: skip
    """Load a model with random weights and run two training steps on a CUDA device.

    Begin it in a fresh process: what ran before leaves cached segments and workspaces behind.

    Args:
        device: its number.

    Raises:
        UserError: there is no such device.
        torch.OutOfMemoryError: the device is too small.
    """
    if not torch.cuda.is_available() or device >= torch.cuda.device_count():
        raise UserError("there is no CUDA device to measure on; run this on the machine that has it")
    memory = torch.cuda.memory
    with torch.cuda.device(device):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        history = History(device)
        memory._record_memory_history(enabled="all", context=None)
        try:
            trial_run(config, model_config, shape, compute_dtype, recomputation, watch=history, device=f"cuda:{device}")
            torch.cuda.synchronize(device)
            snapshot = memory._snapshot()
        finally:
            memory._record_memory_history(enabled=None)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        context = context_bytes(device)
        workspace = cublas_workspace(torch.cuda.get_device_capability(device), config.training.full_determinism)
    trace = trace_of(snapshot["device_traces"][device], history, [workspace])
    breakdown = with_remainder(timeline(trace).breakdown(reserved_bytes=reserved, context_bytes=context), allocated)
    return CudaMeasurement(torch.cuda.get_device_name(device), breakdown, snapshot)


class History(Watch):
    """Notes, by the number of allocations and frees so far, what the allocator's history does not say.

    Attributes:
        marks: (number, phase, step) where a phase began.
        recomputed: (number, +1 or -1) where recomputation began and ended.
        names: (number, address, category): what lay there at that moment.
        end: the number when the last step was done; None before that.

    Args:
        device: its number.
        phase: what is going on at first.
    """

    def __init__(self, device: int, phase: str = "load"):
        self._device = device
        self._start = 0
        self._start = self.count()
        self._phase = (phase, 0)
        self.marks: list[tuple[int, str, int]] = [(0, *self._phase)]
        self.end: int | None = None
        self.recomputed: list[tuple[int, int]] = []
        self.names: list[tuple[int, int, str]] = []

    def count(self) -> int:
        """Allocations and frees since the beginning."""
        blocks = torch.cuda.memory_stats_as_nested_dict(self._device)["allocation"]["all"]
        return blocks["allocated"] + blocks["freed"] - self._start

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        self._phase = (name, step)
        self.marks.append((self.count(), name, step))
        yield  # and it goes on until the next begins: what follows a phase is its aftermath

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        self.recomputed.append((self.count(), +1))
        try:
            yield
        finally:
            self.recomputed.append((self.count(), -1))

    def loaded(self, model: CausalLM, adapters: AdapterSet) -> list[RemovableHandle]:
        """The model is loaded. Gives the hooks, to be removed where it lives on."""
        self.name(weights_by_category(model.module, adapters.parameters()))
        return [layer.register_forward_pre_hook(self._enter_layer) for layer in model.checkpointed_layers()]

    def _enter_layer(self, _module: nn.Module, args: tuple) -> None:
        if self._phase[0] == "forward" and args and isinstance(args[0], Tensor):
            self.name([(args[0], "boundaries")])

    def has_gradients(self, optimizer: Optimizer) -> None:
        self.name((gradient, "gradients") for gradient in optimizer.gradients())

    def has_state(self, optimizer: Optimizer) -> None:
        self.name((tensor, "optimizer_state") for tensor in optimizer.state_tensors())

    def finished(self) -> None:
        self.end = self.count()

    def name(self, tensors: Iterable[tuple[Tensor, str]]) -> None:
        number = self.count()
        for tensor, category in tensors:
            if tensor.is_cuda:
                self.names.append((number, tensor.untyped_storage().data_ptr(), category))


class RunningStep:
    """One step of a run that goes on, watched by the allocator; what was there before is named as it lies there.

    Attributes:
        breakdown, timeline: of the step, once the context is left.
        history: what to tell phases and recomputation to.
    """

    def __init__(self, device: torch.device):
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self.breakdown: Breakdown | None = None
        self.timeline: Timeline | None = None

    @contextmanager
    def watch(self, model: CausalLM, adapters: AdapterSet, optimizer: Optimizer) -> Iterator[History]:
        device, memory = self._device, torch.cuda.memory
        with torch.cuda.device(device):
            gc.collect()  # nothing of earlier steps is to be freed in this one
            torch.cuda.synchronize(device)
            before = live_blocks(memory._snapshot(), device)
            torch.cuda.reset_peak_memory_stats(device)
            history = History(device, "optimizer")  # the step before ended with it
            hooks = history.loaded(model, adapters)
            history.has_state(optimizer)
            memory._record_memory_history(enabled="all", context=None)
            try:
                yield history
                history.finished()
                torch.cuda.synchronize(device)
                snapshot = memory._snapshot()
            finally:
                memory._record_memory_history(enabled=None)
                for hook in hooks:
                    hook.remove()
            allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
            free, total = torch.cuda.mem_get_info(device)
            context = total - free - torch.cuda.memory_reserved(device)
            workspace = cublas_workspace(torch.cuda.get_device_capability(device))
        trace = trace_of(snapshot["device_traces"][device], history, [workspace], before)
        # Memory of other programs on the card cannot be told from the context; more than any has is none.
        context = context if 0 <= context <= LARGEST_CONTEXT else None
        self.timeline = timeline(trace)
        found = self.timeline.breakdown(reserved_bytes=reserved, context_bytes=context)
        self.breakdown = with_remainder(found, allocated)


def live_blocks(snapshot: Mapping[str, Any], device: int) -> list[tuple[int, int]]:
    """(address, bytes) of everything that is allocated on a device, by `torch.cuda.memory._snapshot()`."""
    found = []
    for segment in snapshot["segments"]:
        address = segment["address"]
        for block in segment["blocks"] if segment["device"] == device else ():
            if block["state"] == "active_allocated":
                found.append((block.get("address", address), block["size"]))
            address += block["size"]
    return found


def trace_of(
    history: Sequence[Mapping[str, Any]],
    notes: History,
    workspaces: Sequence[int] = (),
    before: Sequence[tuple[int, int]] = (),
) -> Trace:
    """The allocator's history as a trace.

    Args:
        history: one device's events, in the form of `torch.cuda.memory._snapshot()["device_traces"]`.
        notes: its `marks`, `recomputed`, `names` and `end` are read.
        workspaces: bytes of cuBLAS workspaces: blocks of such a size that are never freed are `framework`.
        before: (address, bytes) of what was allocated when the history began. The optimizer's state among it comes
            last, in a phase of its own, as if the run had begun there.

    Returns:
        A trace whose storages have the size of their blocks, but for remainders too small to split off.
    """
    trace = Trace()
    live = _begin_with(before, notes, trace)
    notes_in_order = _in_order(notes)
    note = next(notes_in_order, None)
    phase, step, depth, number = "load", 0, 0, 0
    for event in [*history, None]:
        if event is not None and event["action"] not in ("alloc", "free_requested"):
            continue
        if number == notes.end:  # what comes after is not of the run
            event = None
        while note is not None and (note[0] <= number or event is None):
            kind, *values = note[1:]
            if kind == "phase":
                phase, step = values
                trace.marks.append((len(trace.events), phase, step))
            elif kind == "recomputed":
                depth += values[0]
            elif (named := live.get(values[0])) is not None:
                named.category = named.category or values[1]
            note = next(notes_in_order, None)
        if event is None:
            break
        number += 1
        place = len(trace.events)
        if event["action"] == "alloc":
            storage = Storage(round_size(event["size"]), place, phase, step, "", "", depth > 0)
            live[event["addr"]] = storage
            trace.storages.append(storage)
            trace.events.append((storage, +1))
        elif (storage := live.pop(event["addr"], None)) is not None:  # else it was there before the history began
            storage.death, storage.died_in, storage.died_in_step = place, phase, step
            trace.events.append((storage, -1))
    sizes = {round_size(size) for size in workspaces}
    for storage in live.values():
        if not storage.category and storage.nbytes in sizes:
            storage.category = "framework"
    return trace


def _begin_with(before: Sequence[tuple[int, int]], notes: History, trace: Trace) -> dict[int, Storage]:
    """Storages for what is there already, by address."""
    live: dict[int, Storage] = {}
    states = {address for number, address, category in notes.names if number == 0 and category == "optimizer_state"}
    for phase, chosen in (("load", False), ("optimizer", True)):
        if before:
            trace.marks.append((len(trace.events), phase, 0))
        for address, size in before:
            if (address in states) is chosen:
                live[address] = Storage(size, len(trace.events), phase, 0, "", "", False)
                trace.storages.append(live[address])
                trace.events.append((live[address], +1))
    return live


def _in_order(notes: History) -> Iterator[tuple]:
    """(number, kind, values …) of everything that was noted; of one moment, names before phases."""
    found = [(number, 0, "name", *name) for number, *name in notes.names]
    found += [(number, 1, "recomputed", change) for number, change in notes.recomputed]
    found += [(number, 2, "phase", *mark) for number, *mark in notes.marks]
    found.sort(key=lambda note: note[:2])  # stable: those of one kind stay in the order they were noted in
    return ((number, *rest) for number, _, *rest in found)


def with_remainder(breakdown: Breakdown, peak_bytes: int) -> Breakdown:
    """The same with the allocator's own peak; what it has beyond the history's is `framework`."""
    more = peak_bytes - breakdown.peak_bytes
    if more <= 0:
        return breakdown
    phase = breakdown.peak_phase
    return replace(
        breakdown,
        peak_bytes=peak_bytes,
        at_peak=breakdown.at_peak | {"framework": breakdown.at_peak["framework"] + more},
        phase_peak_bytes=breakdown.phase_peak_bytes | {phase: peak_bytes},
    )


def save_snapshot(snapshot: Mapping[str, Any], file: Path) -> None:
    """Pickle what `allocator_replay.compare_with_snapshot` needs of a snapshot."""
    traces = [[_short(event) for event in trace] for trace in snapshot["device_traces"]]
    segments = [
        {**segment, "frames": [], "blocks": [{**block, "frames": []} for block in segment["blocks"]]}
        for segment in snapshot["segments"]
    ]
    with replacing_file(file) as temporary, temporary.open("wb") as stream:
        pickle.dump({"segments": segments, "device_traces": traces}, stream, protocol=pickle.HIGHEST_PROTOCOL)


def _short(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: event[name] for name in (*KEPT_OF_A_SNAPSHOT, "pool_id", "device_free") if name in event}
