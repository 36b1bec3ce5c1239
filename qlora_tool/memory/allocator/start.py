"""The state in which a recorded trace of the CUDA caching allocator began, and an allocator in that state.

A snapshot (`torch.cuda.memory._snapshot()`) shows the segments at its end. The trace often begins in the middle of a
run: recording was switched on late, or old events were dropped. Undoing the events from the last to the first gives
the segments at its beginning.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from qlora_tool.memory.allocator.blocks import (
    BLOCK_STEP,
    LARGE_SEGMENT,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    Arena,
    Block,
    round_size,
)
from qlora_tool.memory.allocator.model import UNLIMITED_DEVICE, CachingAllocator

Entry = dict[str, Any]  # a segment, a block or an event, in PyTorch's own form


def stream_of(entry: Entry) -> Hashable:
    """Whose pools an event or a segment belongs to: its stream, and its private pool (of CUDA graphs) if it has one."""
    private_pool = tuple(entry.get("pool_id") or entry.get("segment_pool_id") or (0, 0))
    return (entry["stream"], *private_pool) if any(private_pool) else entry["stream"]


def segments_before(trace: Sequence[Entry], segments_after: Sequence[Entry]) -> list[Entry]:
    """The segments as they were before the first event.

    Args:
        trace: the events of one device, in order.
        segments_after: the segments after the last event, in the form of `torch.cuda.memory_snapshot()`.

    Returns:
        Segments in the same form, by address. A block that was freed during the trace has the size that its request
        needs, and what it kept of a remainder too small to split where that can be told.
    """
    segments = {segment["address"]: segment for segment in segments_after if not segment.get("is_expandable")}
    pages = _Pages(segment for segment in segments_after if segment.get("is_expandable"))
    blocks = {
        block["address"]: block
        for segment in segments_after
        for block in _with_addresses(segment)
        if block["state"] != "inactive"
    }
    for event in reversed(trace):
        action, address = event["action"], event.get("addr")
        if action == "alloc":
            blocks.pop(address, None)
        elif action == "free_completed":
            freed = {"address": address, "requested_size": event["size"], "state": "active_pending_free"}
            blocks[address] = freed
        elif action == "free_requested":
            if address in blocks:
                blocks[address] = {**blocks[address], "state": "active_allocated"}
        elif action == "segment_alloc":
            segments.pop(address, None)
        elif action == "segment_free":
            segments[address] = {**event, "address": address, "total_size": event["size"]}
        elif action == "segment_map":
            pages.remove(event)
        elif action == "segment_unmap":
            pages.add(event)
    found = [_segment(segment, is_expandable=False) for segment in segments.values()] + pages.segments()
    found.sort(key=lambda segment: segment["address"])
    _place_blocks(found, blocks)
    _keep_remainders(found, trace)
    return found


def restore(
    segments: Iterable[Entry], expandable_segments: bool, *, limit: int | None = None, record_history: bool = False
) -> CachingAllocator:
    """An allocator that holds these segments, with everything between their active blocks free.

    Args:
        segments: in the form of `torch.cuda.memory_snapshot()`; every active block needs its `size`. An expandable
            segment is taken to begin where its first memory lies: pages given back before that are not known of.
        expandable_segments, limit, record_history: as in `CachingAllocator`.
    """
    allocator = CachingAllocator(expandable_segments, limit, record_history=record_history)
    last: dict[tuple[Hashable, bool], Block] = {}  # of each expandable segment, its unmapped end
    for segment in sorted(segments, key=lambda segment: segment["address"]):
        pool = allocator.pool(stream_of(segment), segment["segment_type"] == "small")
        start, total = segment["address"], segment["total_size"]
        whole = Block(start, total, pool)
        if segment.get("is_expandable"):
            end = last.get((pool.stream, pool.small))
            if end is None or start + total > end.end or (start - end.arena.start) % pool.page:
                arena = Arena(start, (UNLIMITED_DEVICE // pool.page) * pool.page, pool.page)
                end = Block(start, arena.size, pool, arena, mapped=False)
                pool.add(end)
            whole, last[pool.stream, pool.small] = _map_part(end, start, total)
        pool.add(whole)
        allocator.reserved_bytes += total
        for entry in segment["blocks"]:
            if entry["state"] != "inactive":
                whole = _cut_out(allocator, whole, entry)
    allocator.reset_peaks()
    return allocator


def _with_addresses(segment: Entry) -> list[Entry]:
    """The blocks of a segment; old versions of PyTorch wrote no addresses."""
    address, blocks = segment["address"], []
    for block in segment["blocks"]:
        requested = block.get("requested_size", block["size"])
        blocks.append({**block, "address": address, "requested_size": requested})
        address += block["size"]
    return blocks


def _segment(entry: Entry, is_expandable: bool) -> Entry:
    """A segment without blocks, from one with blocks or from an event."""
    small = entry["segment_type"] == "small" if "segment_type" in entry else entry["total_size"] == SMALL_SEGMENT
    return {
        "address": entry["address"],
        "total_size": entry["total_size"],
        "stream": entry["stream"],
        "segment_pool_id": entry.get("segment_pool_id") or entry.get("pool_id") or (0, 0),
        "segment_type": "small" if small else "large",
        "is_expandable": is_expandable,
        "blocks": [],
    }


class _Pages:
    """The memory behind expandable segments, in pieces of 2 MiB (the page of the small pool, and a divisor of the
    large one's)."""

    def __init__(self, segments: Iterable[Entry]):
        self._owner: dict[int, Entry] = {}  # address of a piece -> a segment it is like, without blocks
        for segment in segments:
            like = _segment(segment, is_expandable=True)
            self._owner.update(dict.fromkeys(self._pieces(segment["address"], segment["total_size"]), like))

    def _pieces(self, address: int, size: int) -> range:
        return range(address, address + size, SMALL_SEGMENT)

    def add(self, event: Entry) -> None:
        small = event["size"] % LARGE_SEGMENT != 0
        segment_type = "small" if small else "large"
        like = {**event, "address": event["addr"], "total_size": event["size"], "segment_type": segment_type}
        like = _segment(like, is_expandable=True)
        self._owner.update(dict.fromkeys(self._pieces(event["addr"], event["size"]), like))

    def remove(self, event: Entry) -> None:
        for piece in self._pieces(event["addr"], event["size"]):
            self._owner.pop(piece, None)

    def segments(self) -> list[Entry]:
        """One segment for each stretch without gaps."""
        found: list[Entry] = []
        for piece, like in sorted(self._owner.items(), key=lambda item: item[0]):
            whose = (stream_of(like), like["segment_type"])
            if found and found[-1]["address"] + found[-1]["total_size"] == piece:
                before = found[-1]
                if (stream_of(before), before["segment_type"]) == whose:
                    before["total_size"] += SMALL_SEGMENT
                    continue
            found.append({**like, "address": piece, "total_size": SMALL_SEGMENT, "blocks": []})
        return found


def _place_blocks(segments: list[Entry], blocks: dict[int, Entry]) -> None:
    """Lay each block into the segment that it lies in, with the size that its request needs where none is known."""
    starts = [segment["address"] for segment in segments]
    for address in sorted(blocks):
        number = bisect_right(starts, address) - 1
        if number < 0 or address >= starts[number] + segments[number]["total_size"]:
            continue  # freed in a segment that neither the snapshot nor the trace knows
        size = blocks[address].get("size") or round_size(blocks[address]["requested_size"])
        segments[number]["blocks"].append({**blocks[address], "size": size})


def _keep_remainders(segments: list[Entry], trace: Sequence[Entry]) -> None:
    """Give blocks of large segments back what they kept of a remainder too small to split (at most 1 MiB).

    In such a segment no free block is that small. A larger gap is a free block, perhaps with a remainder before it;
    the first request that the gap serves shows where the free block begins.
    """
    gaps: dict[int, tuple[int, Entry]] = {}  # start -> end, and the block before it
    for segment in segments:
        if segment["is_expandable"] or segment["segment_type"] == "small":
            continue
        ends = [block["address"] for block in segment["blocks"][1:]] + [segment["address"] + segment["total_size"]]
        for block, end in zip(segment["blocks"], ends, strict=False):
            start = block["address"] + block["size"]
            if end - start <= SMALL_REQUEST:
                block["size"] = end - block["address"]
            else:
                gaps[start] = (end, block)
    starts = sorted(gaps)
    open_blocks = {block["address"]: start for start, (_, block) in gaps.items()}
    for event in trace:
        if event["action"] == "free_completed":
            open_blocks.pop(event["addr"], None)
        elif event["action"] == "alloc" and starts:
            start = starts[max(0, bisect_right(starts, event["addr"]) - 1)]
            end, block = gaps[start]
            kept = event["addr"] - start
            if 0 <= kept < end - start and open_blocks.pop(block["address"], None) is not None:
                block["size"] += kept if kept <= SMALL_REQUEST and kept % BLOCK_STEP == 0 else 0


def _map_part(end: Block, start: int, size: int) -> tuple[Block, Block]:
    """Put memory behind a part of an expandable segment's unmapped end: the mapped block and the new end."""
    pool, arena = end.pool, end.arena
    pool.remove(end)
    mapped = end
    if start > end.address:
        mapped = Block(start, end.size - (start - end.address), pool, arena)
        mapped.insert_after(end)
        end.size = start - end.address
        pool.add(end)
    rest = Block(start + size, mapped.size - size, pool, arena, mapped=False)
    rest.insert_after(mapped)
    pool.add(rest)
    mapped.size = size
    mapped.mapped = True
    return mapped, rest


def _cut_out(allocator: CachingAllocator, free: Block, entry: Entry) -> Block:
    """Hand out a part of a free block as the snapshot has it; what is free after it (or the part, if nothing is)."""
    pool = free.pool
    pool.remove(free)
    before = entry["address"] - free.address
    block = free
    if before:
        block = Block(entry["address"], free.size - before, pool, free.arena)
        block.insert_after(free)
        free.size = before
        pool.add(free)
    left_over = block.size - entry["size"]
    block.size = entry["size"]
    block.requested_size = entry["requested_size"]
    block.allocated = entry["state"] == "active_allocated"
    block.awaiting_free = not block.allocated
    allocator.active[block.address] = block
    allocator.requested_bytes += block.requested_size
    allocator.allocated_bytes += block.size if block.allocated else 0
    if not left_over:
        return block
    rest = Block(block.address + block.size, left_over, pool, block.arena)
    rest.insert_after(block)
    pool.add(rest)
    return rest
