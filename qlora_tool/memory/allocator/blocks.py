"""The blocks of the caching allocator's model, the pools in which idle ones wait, and the sizes that they come in."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from typing import Any

MIB = 2**20
GIB = 2**30

BLOCK_STEP = 512  # kMinBlockSize: sizes of blocks are multiples of this
SMALL_REQUEST = MIB  # kSmallSize: the largest request of the small pool, and the least that a large block keeps
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # large_segment_size
OWN_SEGMENT = 10 * MIB  # kMinLargeAlloc: from here on, a request gets a segment of its own size
SEGMENT_STEP = 2 * MIB  # kRoundLarge: the size of such a segment is a multiple of this


def round_size(nbytes: int) -> int:
    """The size in bytes of the block that a request of `nbytes` needs."""
    return max(BLOCK_STEP, -(-nbytes // BLOCK_STEP) * BLOCK_STEP)


def segment_size(size: int) -> int:
    """The bytes that are taken from the device for a block of `size` bytes, without expandable segments."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < OWN_SEGMENT:
        return LARGE_SEGMENT
    return -(-size // SEGMENT_STEP) * SEGMENT_STEP


class Block:
    """A stretch of a segment: allocated, free, or (expandable segments) address space without memory behind it.

    Attributes:
        address, size: bytes. `size` is what `torch.cuda.memory_allocated` counts.
        requested_size: the bytes that were asked for; 0 while free.
        allocated: whether a tensor holds it. awaiting_free: freed, but another stream may still use it.
        mapped: whether there is memory behind it.
    """

    __slots__ = (
        "address",
        "allocated",
        "arena",
        "awaiting_free",
        "mapped",
        "next",
        "pool",
        "prev",
        "requested_size",
        "size",
    )

    def __init__(self, address: int, size: int, pool: Pool | None, arena: Arena | None = None, mapped: bool = True):
        self.address = address
        self.size = size
        self.pool = pool
        self.arena = arena  # its expandable segment
        self.mapped = mapped
        self.requested_size = 0
        self.allocated = False
        self.awaiting_free = False
        self.prev: Block | None = None  # its neighbours in the segment
        self.next: Block | None = None

    @property
    def end(self) -> int:
        return self.address + self.size

    @property
    def stream(self) -> Hashable:
        return self.pool.stream if self.pool else 0

    @property
    def idle(self) -> bool:
        """Whether it may be handed out, or merged with its neighbours."""
        return not (self.allocated or self.awaiting_free)

    def insert_after(self, block: Block) -> None:
        """Become the neighbour that follows `block`."""
        self.prev, self.next = block, block.next
        if block.next:
            block.next.prev = self
        block.next = self


class Arena:
    """The address space of one expandable segment. It is filled with memory page by page.

    Attributes:
        start, size: bytes. page: the bytes of one page.
    """

    __slots__ = ("page", "size", "start")

    def __init__(self, start: int, size: int, page: int):
        self.start, self.size, self.page = start, size, page

    def page_start(self, address: int) -> int:
        return self.start + (address - self.start) // self.page * self.page

    def page_end(self, address: int) -> int:
        return self.start - (self.start - address) // self.page * self.page


class Pool:
    """The idle blocks of one stream, small or large."""

    __slots__ = ("at", "by_size", "small", "stream", "unmapped")

    def __init__(self, stream: Hashable, small: bool):
        self.stream = stream
        self.small = small
        self.by_size: list[tuple[int, int]] = []  # (size, address) of free blocks, ascending
        self.unmapped: list[int] = []  # addresses of unmapped blocks, ascending
        self.at: dict[int, Block] = {}  # both kinds, by address

    @property
    def page(self) -> int:
        return SMALL_SEGMENT if self.small else LARGE_SEGMENT

    def add(self, block: Block) -> None:
        self.at[block.address] = block
        if block.mapped:
            insort(self.by_size, (block.size, block.address))
        else:
            insort(self.unmapped, block.address)

    def remove(self, block: Block) -> None:
        del self.at[block.address]
        if block.mapped:
            del self.by_size[bisect_left(self.by_size, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, block.address)]

    def best_fit(self, size: int) -> Block | None:
        """The smallest free block of at least `size` bytes, of equals the lowest; not taken out yet.

        A block at the growing end of an expandable segment counts with the room that it can still grow into.
        """
        first = bisect_left(self.by_size, (size,))
        if first == len(self.by_size):
            return None
        best = self.at[self.by_size[first][1]]
        if best.arena is not None:
            for index in range(first + 1, len(self.by_size)):
                other = self.at[self.by_size[index][1]]
                if _room_to_grow(other) >= _room_to_grow(best):
                    break
                best = other
        return best


def _room_to_grow(block: Block) -> int:
    return block.size + (block.next.size if block.next and not block.next.mapped else 0)


def segments_of(blocks: Iterable[Block]) -> list[dict[str, Any]]:
    """Segments in the form of `torch.cuda.memory_snapshot()`, from all blocks with memory behind them, by address."""
    segments: list[dict[str, Any]] = []
    for block in blocks:
        if block.prev is None or not block.prev.mapped:
            segments.append(_segment_entry(block))
        _add_block_entry(segments[-1], block)
    return segments


def _segment_entry(first: Block) -> dict[str, Any]:
    return {
        "device": 0,
        "address": first.address,
        "total_size": 0,
        "allocated_size": 0,
        "active_size": 0,
        "requested_size": 0,
        "stream": first.stream,
        "segment_type": "small" if first.pool.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": first.arena is not None,
        "frames": [],
        "blocks": [],
    }


def _add_block_entry(segment: dict[str, Any], block: Block) -> None:
    segment["total_size"] += block.size
    segment["allocated_size"] += block.size if block.allocated else 0
    segment["active_size"] += 0 if block.idle else block.size
    segment["requested_size"] += block.requested_size
    state = "active_allocated" if block.allocated else "inactive" if block.idle else "active_pending_free"
    entry = {"address": block.address, "size": block.size, "requested_size": block.requested_size, "state": state}
    segment["blocks"].append({**entry, "frames": []})
