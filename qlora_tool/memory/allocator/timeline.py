"""What a trace that was made on a CPU, of a step that is meant for a CUDA device, takes there.

The births and deaths go through the model of PyTorch's caching allocator. What a CPU does not show is put in: cuBLAS
workspaces, what PyTorch's operators take inside, results of another size (`operators.py`). The CUDA context comes on
top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_tool.memory.allocator.cards import most_multiprocessors
from qlora_tool.memory.allocator.model import CachingAllocator
from qlora_tool.memory.allocator.operators import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    ESTIMATED,
    RANDOM_STATE,
    Attention,
    about_estimated_context,
    cublas_workspace,
    estimated_context,
    temporaries_inside,
)
from qlora_tool.memory.trace.classify import part_of
from qlora_tool.memory.trace.timeline import Event, Timeline
from qlora_tool.memory.trace.tracer import PRODUCTS, Call, Storage, Trace

if TYPE_CHECKING:
    from qlora_tool.memory.allocator.blocks import Block
    from qlora_tool.memory.allocator.calibrate import Calibration
    from qlora_tool.memory.allocator.target import CudaTarget
    from qlora_tool.memory.breakdown import Breakdown


@dataclass(frozen=True)
class CudaPrediction:
    """What a run takes on a CUDA device, in bytes.

    Attributes:
        timeline: by part over time, in blocks of the allocator; what they hold beyond the request is `framework`.
        allocated_peak, reserved_peak, requested_peak: the most at once, as `torch.cuda.max_memory_allocated`,
            `max_memory_reserved` and the sum of what tensors asked for.
        context_bytes: the CUDA context, which the allocator does not count.
        workspace_bytes: all cuBLAS workspaces together; part of the peaks.
        estimated: what of this was estimated, in words, rather than read from a source or measured.
    """

    timeline: Timeline
    allocated_peak: int
    reserved_peak: int
    requested_peak: int
    context_bytes: int
    workspace_bytes: int
    estimated: tuple[str, ...]

    def breakdown(self) -> Breakdown:
        return self.timeline.breakdown(reserved_bytes=self.reserved_peak, context_bytes=self.context_bytes)


def cuda_timeline(
    trace: Trace,
    *,
    expandable_segments: bool = False,
    limit: int | None = None,
    compute_capability: tuple[int, int],
    calibration: Calibration | None = None,
    multiprocessors: int | None = None,
) -> CudaPrediction:
    """Replay a trace on a modelled CUDA device.

    Args:
        trace: of CPU tensors, in the device's compute dtype, of a step that was meant for the device (`predict` with a
            `target`).
        expandable_segments: as `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.
        limit: the most bytes that the allocator may reserve: the card's memory less the context. Near it, cached
            segments are given back, so that less is reserved than without.
        compute_capability: of the device; decides the attention kernel and the workspaces.
        calibration: the context and the workspaces as they were measured on the device.
        multiprocessors: of the device, for deterministic kernels; None: the most of those of its capability.

    Raises:
        qlora_tool.memory.allocator.model.OutOfMemory: `limit` is too little.
    """
    allocator = CachingAllocator(expandable_segments, limit)
    shared_out = (multiprocessors or most_multiprocessors(compute_capability)) if trace.deterministic else None
    replay = _Replay(allocator, _Differences(trace, compute_capability, shared_out), calibration)
    replay.run(trace)
    estimated = replay.differences.estimated
    context = calibration.context_bytes if calibration else estimated_context(compute_capability)
    return CudaPrediction(
        Timeline.from_events(replay.events), allocator.peak_allocated_bytes, allocator.peak_reserved_bytes,
        allocator.peak_requested_bytes, context, sum(replay.workspaces.values()),
        (*(() if calibration else (about_estimated_context(compute_capability),)), *estimated),
    )  # fmt: skip


def replay_on(trace: Trace, target: CudaTarget) -> CudaPrediction:
    """Replay a trace, made for the same target, on the card."""
    return cuda_timeline(
        trace, expandable_segments=target.expandable_segments, compute_capability=target.capability,
        calibration=target.calibration, multiprocessors=target.multiprocessors,
    )  # fmt: skip


class _Differences:
    """What the device allocates differently from the CPU.

    Attributes:
        capability: of the device.
        sizes: bytes of storages that have others on the device, by id; 0 for one that is not on it.
        companions: bytes of what comes and goes with a storage, by its id.
        estimated: what is estimated, in words.
        deterministic_on: of deterministic kernels, the device's multiprocessors.
    """

    def __init__(self, trace: Trace, capability: tuple[int, int], deterministic_on: int | None = None):
        self.capability, self.deterministic_on = capability, deterministic_on
        self.sizes: dict[int, int] = {}
        self.companions: dict[int, tuple[int, ...]] = {}
        names: dict[str, None] = {}
        for call in trace.calls:
            if call.operator in (CPU_ATTENTION, CPU_ATTENTION_BACKWARD):
                attention = Attention.of(call)
                kernel = attention.kernel(capability)
                names[kernel] = None
                if call.operator == CPU_ATTENTION and len(call.results) == 2:
                    logsumexp = id(call.results[1])
                    self.sizes[logsumexp] = attention.logsumexp(kernel)
                    self.companions[logsumexp] = RANDOM_STATE
            elif call.operator == "aten::bernoulli_":
                # Dropout on a CPU keeps noise in the dtype of its input, on CUDA a mask of one byte an element.
                for noise in call.results:
                    self.sizes[id(noise)] = noise.nbytes // call.itemsize
            else:
                names[call.operator] = None
        self.estimated = tuple(dict.fromkeys(ESTIMATED[name] for name in names if name in ESTIMATED))
        for storage in trace.storages:
            if storage.paged:  # in managed memory, which the allocator does not count
                self.sizes[id(storage)] = 0

    def nbytes(self, storage: Storage) -> list[int]:
        """The requests that stand for a storage."""
        return [self.sizes.get(id(storage), storage.nbytes), *self.companions.get(id(storage), ())]


class _Replay:
    def __init__(self, allocator: CachingAllocator, differences: _Differences, calibration: Calibration | None):
        self.allocator, self.differences = allocator, differences
        self.events: list[Event] = []
        self.workspaces: dict[bool, int] = {}  # by whether it is the thread of the backward passes
        deterministic = differences.deterministic_on is not None
        size = cublas_workspace(differences.capability, deterministic)
        measured = calibration if not deterministic else None  # with the workspace that PyTorch chooses by itself
        self._sizes = {
            False: measured.workspace_forward if measured else size,
            True: measured.workspace_backward if measured else size,
        }
        self._blocks: dict[int, list[tuple[Block, int, int]]] = {}

    def run(self, trace: Trace) -> None:
        calls = iter([*trace.calls, None])
        call = next(calls)
        for index, ((storage, sign), phase) in enumerate(zip(trace.events, trace.phases(), strict=True)):
            while call is not None and call.event <= index:
                self._call(call)
                call = next(calls)
            labels = (part_of(storage), phase, storage.module, storage.operator)
            if sign > 0:
                held = [self._take(size, *labels) for size in self.differences.nbytes(storage) if size]
                self._blocks[id(storage)] = held
            else:
                for block in self._blocks.pop(id(storage)):
                    self._give_back(*block, *labels)
        while call is not None:
            self._call(call)
            call = next(calls)

    def _call(self, call: Call) -> None:
        if call.operator in PRODUCTS:
            self._workspace(call)
        labels = ("temporaries", call.phase, call.module, call.operator)
        taken = temporaries_inside(call, self.differences.capability, self.differences.deterministic_on)
        inside = [self._take(size, *labels) for size in taken]
        for block in inside:
            self._give_back(*block, *labels)

    def _workspace(self, call: Call) -> None:
        """Of the thread's cuBLAS handle, with its first product; kept for good."""
        if call.in_backward not in self.workspaces:
            size = self.workspaces[call.in_backward] = self._sizes[call.in_backward]
            if size:
                self._take(size, "framework", call.phase, call.module, "cublasSetWorkspace")

    def _take(self, nbytes: int, part: str, phase: str, module: str, operator: str) -> tuple[Block, int, int]:
        """A block, the bytes asked for, and those that it has beyond them."""
        block = self.allocator.allocate(nbytes)
        more = block.size - nbytes
        self.events.append(Event(part, nbytes, phase, module, operator))
        if more:
            self.events.append(Event("framework", more, phase, module, operator))
        return block, nbytes, more

    def _give_back(
        self, block: Block, nbytes: int, more: int, part: str, phase: str, module: str, operator: str
    ) -> None:
        self.allocator.free(block)
        self.events.append(Event(part, -nbytes, phase, module, operator))
        if more:
            self.events.append(Event("framework", -more, phase, module, operator))
