"""Holding the model of the CUDA caching allocator against what a real one recorded, event by event."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_tool.errors import UserError
from qlora_tool.memory.allocator.blocks import MIB, Block
from qlora_tool.memory.allocator.model import CachingAllocator
from qlora_tool.memory.allocator.start import Entry, restore, segments_before, stream_of

SHOWN_MISMATCHES = 10
_SEGMENT_ACTIONS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


@dataclass
class Comparison:
    """What the model did where a real allocator recorded what it did.

    Attributes:
        events: how many recorded events were held against the model.
        mismatches: how many of them the model met differently: a block at another address, a segment taken or not
            taken, of another size, or at another moment.
        first_mismatches: the first of them, in words.
        predicted_reserved_peak, recorded_reserved_peak: bytes, the most that segments held during the trace.
        predicted_allocated_peak: bytes, the most that blocks held.
    """

    events: int = 0
    mismatches: int = 0
    first_mismatches: list[str] = field(default_factory=list)
    predicted_reserved_peak: int = 0
    recorded_reserved_peak: int = 0
    predicted_allocated_peak: int = 0

    def differ(self, number: int, what: str) -> None:
        self.mismatches += 1
        if len(self.first_mismatches) < SHOWN_MISMATCHES:
            self.first_mismatches.append(f"event {number}: {what}")


def compare_with_snapshot(snapshot: dict[str, Any], device: int | None = None) -> Comparison:
    """Replay the trace of a snapshot through the model.

    Args:
        snapshot: what `torch.cuda.memory._snapshot()` gives, or its pickle file holds. Its trace may begin in the
            middle of a run.
        device: the number of the device; None: the one with the most events.

    Raises:
        UserError: there is no trace: memory history was not recorded.
    """
    traces = snapshot.get("device_traces") or []
    if device is None:
        device = max(range(len(traces)), key=lambda number: len(traces[number]), default=0)
    trace = traces[device] if device < len(traces) else []
    if not trace:
        raise UserError(
            f"the snapshot holds no events of device {device}; "
            "record them with torch.cuda.memory._record_memory_history() before the work begins"
        )
    segments = [segment for segment in snapshot.get("segments", ()) if segment.get("device", 0) == device]
    setting = (snapshot.get("allocator_settings") or {}).get("expandable_segments")
    expandable = setting in (True, "True") if setting is not None else _looks_expandable(trace, segments)
    return replay(trace, expandable_segments=expandable, segments=segments_before(trace, segments))


def replay(trace: Sequence[Entry], *, expandable_segments: bool = False, segments: Iterable[Entry] = ()) -> Comparison:
    """Send recorded requests and frees through the model and compare where it puts them.

    New segments get the recorded addresses, since where a device puts them is not the allocator's choice. Segments that
    were given back are given back in the model too: that depends on the device's free memory, and on the program.

    Args:
        trace: the events of one device, in order, in the form of `torch.cuda.memory._snapshot()['device_traces']`.
        expandable_segments: how the allocator was set.
        segments: what it held before the first event, in the form of `torch.cuda.memory_snapshot()`.
    """
    run = _Replay(restore(segments, expandable_segments, record_history=True))
    for number, event in enumerate(trace):
        run.step(number, event)
    run.finish()
    return run.result


def _looks_expandable(trace: Iterable[Entry], segments: Iterable[Entry]) -> bool:
    mapped = any(event["action"] in ("segment_map", "segment_unmap") for event in trace)
    return mapped or any(segment.get("is_expandable") for segment in segments)


class _Replay:
    """The state of one replay.

    Segments that are taken are recorded before the request that needs them: they wait until it comes.
    """

    def __init__(self, allocator: CachingAllocator):
        self.allocator = allocator
        self.result = Comparison()
        self.blocks: dict[int, Block] = dict(allocator.active)  # by the address that was recorded
        self.waiting: list[tuple[int, Entry]] = []  # recorded segments, each with its event's number
        self.recorded_reserved = self.result.recorded_reserved_peak = allocator.reserved_bytes
        place = allocator.place_segment
        allocator.place_segment = lambda size: self._recorded_address() or place(size)

    def _recorded_address(self) -> int | None:
        """Where the next recorded segment lies, if any is left: at the front of those that wait."""
        taken = sum(event["action"] in ("segment_alloc", "segment_map") for event in self.allocator.history)
        return self.waiting[taken][1]["addr"] if taken < len(self.waiting) else None

    def step(self, number: int, event: Entry) -> None:
        action = event["action"]
        if action in _SEGMENT_ACTIONS:
            self.result.events += 1
            self.recorded_reserved += _SEGMENT_ACTIONS[action] * event["size"]
            self.result.recorded_reserved_peak = max(self.result.recorded_reserved_peak, self.recorded_reserved)
            if _SEGMENT_ACTIONS[action] > 0:
                self.waiting.append((number, event))
            else:
                self._take_waiting()
                self._give_back(number, event)
        elif action == "alloc":
            self.result.events += 1
            self._allocate(number, event)
        elif action in ("free_requested", "free_completed"):
            self.result.events += 1
            self._free(number, event)

    def finish(self) -> None:
        for number, event in self.waiting:
            self.result.differ(number, f"{_name(event)} served no request")
        self.result.predicted_reserved_peak = self.allocator.peak_reserved_bytes
        self.result.predicted_allocated_peak = self.allocator.peak_allocated_bytes

    def _allocate(self, number: int, event: Entry) -> None:
        self.allocator.history.clear()
        block = self.allocator.allocate(event["size"], stream_of(event))
        self.blocks[event["addr"]] = block
        taken = [_name(done) for done in self.allocator.history[:-1]]
        recorded = [_name(waiting) for _, waiting in self.waiting]
        if taken != recorded:
            self.result.differ(number, f"took {_list(taken)}; recorded: {_list(recorded)}")
        elif block.address != event["addr"]:
            asked = f"{event['size']} bytes"
            self.result.differ(number, f"put {asked} at {block.address:#x}; recorded: {event['addr']:#x}")
        self.waiting.clear()

    def _free(self, number: int, event: Entry) -> None:
        block = self.blocks.get(event["addr"])
        requested = event["action"] == "free_requested"
        if block is None or block.idle or (requested and not block.allocated):
            self.result.differ(number, f"{event['action']} at {event['addr']:#x}, where the model holds no block")
            return
        if requested:
            self.allocator.request_free(block)
            return
        if block.allocated:
            self.allocator.request_free(block)
        self.allocator.complete_free(block)
        del self.blocks[event["addr"]]

    def _take_waiting(self) -> None:
        """Take the segments that wait without a request: it failed, and what it took is there all the same."""
        for number, event in self.waiting:
            if not self.allocator.take_segment(event["addr"], event["size"], stream_of(event)):
                self.result.differ(number, f"{_name(event)} is not where the model would grow")
        self.waiting.clear()

    def _give_back(self, number: int, event: Entry) -> None:
        if not self.allocator.give_back(event["addr"], event["size"]):
            self.result.differ(number, f"{_name(event)} is in use in the model")


def _name(event: Entry) -> str:
    return f"{event['action']} of {event['size'] / MIB:g} MiB at {event['addr']:#x}"


def _list(names: list[str]) -> str:
    return ", ".join(names) or "no segment"
